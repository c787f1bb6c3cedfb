"""Follows a kernel's PTX on the CPU: what Triton's interpreter does not see.

A machine knows the instructions that this package's kernels come to; another one is an error, and so is a branch that
threads in step take differently. What the threads of a program do at the same time it does in some `Order`: all in
step, or parties of them one after another from barrier to barrier, the first or the last of them first. What runs
behind their backs does so at either end of its time: copies to shared memory when they are asked for and products of a
warpgroup when they are waited for, or the other way round. A kernel that reads what has not come, or overwrites what
is still read, gives other results in one order or another.

Sources: NVIDIA's PTX ISA 8.8; its sections on `mma`, `ldmatrix` and `wgmma` draw which thread holds which elements.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

LANES, WARPGROUP = 32, 128
_ENDED = object()
GLOBAL = 1 << 40  # where global memory begins
ALIGNMENT = 256  # of a tensor there
SHARED_BYTES = 232_448
_TYPES = {
    "b8": np.uint8, "u8": np.uint8, "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "b32": np.uint32,
    "u32": np.uint32, "s32": np.int32, "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f32": np.float32,
}  # fmt: skip
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal,
}  # fmt: skip
_ARITHMETIC: dict[str, Callable[[Array, Array], Array]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "and": lambda a, b: a & b, "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b, "not": lambda a, b: ~a, "neg": lambda a, b: -a, "abs": lambda a, b: np.abs(a),
    "min": np.minimum, "max": np.maximum, "div": lambda a, b: _divided(a, b), "rem": np.fmod,
    "rsqrt": lambda a, b: 1 / np.sqrt(a), "sqrt": lambda a, b: np.sqrt(a), "ex2": lambda a, b: np.exp2(a),
}  # fmt: skip
_OTHERS = {"fma", "shl", "shr"}
_NOTHING = {"bar", "griddepcontrol", "fence"}  # to a machine
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Instruction:
    """One instruction; `guard` is a predicate and whether it is negated."""

    name: str
    kind: tuple[str, ...]
    operands: tuple[str, ...]
    guard: tuple[str, bool] | None


class Program:
    """A kernel of some PTX: its instructions, labels, parameters and shared variables."""

    def __init__(self, text: str) -> None:
        text = re.sub(r"//[^\n]*", "", text)
        entry = text[text.index(".entry") :]
        self.parameters = re.findall(r"\.param\s[^,)]*?(\w+)(?=[,\s]*[,)\n])", entry[: entry.index("{")])
        self.threads = int(re.search(r"\.(?:req|max)ntid (\d+)", text).group(1))  # type: ignore[union-attr]
        self.shared, end = {}, 0
        for align, name, size in re.findall(r"\.shared \.align (\d+) \.b8 (\w+)\[(\d*)\];", text):
            if size:  # one without belongs to the launch, and comes last
                end = -(-end // int(align)) * int(align)
                self.shared[name], end = end, end + int(size)
        self.shared["global_smem"] = -(-end // 1024) * 1024
        body = entry[entry.index("{") :]
        body = re.sub(r"^\s*\.(loc|file|section|pragma|reg|shared|b8|b32|b64)\b[^\n]*$", "", body, flags=re.M)
        self.labels: dict[str, int] = {}
        self.instructions: list[Instruction] = []
        for statement in re.split(r";|^(\$?\w+):", body, flags=re.M):
            if statement is None:
                continue
            statement = statement.strip().lstrip("{} \t\n")  # of scopes, whose registers nothing else uses
            if re.fullmatch(r"\$\w+", statement):
                self.labels[statement] = len(self.instructions)
            elif statement:
                self.instructions.append(_instruction(statement))


def _instruction(statement: str) -> Instruction:
    guard = None
    if statement.startswith("@"):
        name, statement = statement[1:].split(None, 1)
        guard = name.lstrip("!"), name.startswith("!")
    opcode, *rest = statement.split(None, 1)
    operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", rest[0] if rest else "")
    name, *kind = opcode.split(".")
    return Instruction(name, tuple(kind), tuple(operand.strip() for operand in operands), guard)


class Memory:
    """Global memory that holds tensors of a CPU; `back` gives what kernels wrote."""

    def __init__(self) -> None:
        self._tensors: dict[int, tuple[torch.Tensor, int]] = {}
        self.bytes = np.zeros(0, np.uint8)

    def place(self, tensor: torch.Tensor) -> int:
        """Return the address of a tensor's first element. Views of one storage share its bytes."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._tensors:
            start = -(-len(self.bytes) // ALIGNMENT) * ALIGNMENT
            whole = torch.empty(0, dtype=torch.uint8).set_(storage)
            grown = np.zeros(start + len(whole), np.uint8)
            grown[: len(self.bytes)] = self.bytes
            grown[start:] = whole.numpy()
            self.bytes = grown
            self._tensors[storage.data_ptr()] = whole, start
        start = self._tensors[storage.data_ptr()][1]
        return GLOBAL + start + tensor.storage_offset() * tensor.element_size()

    def back(self) -> None:
        """Write all bytes back to the tensors."""
        for whole, start in self._tensors.values():
            whole.copy_(torch.from_numpy(self.bytes[start : start + len(whole)]))


@dataclass(frozen=True)
class Order:
    """When what happens that may happen at once; see the module.

    Attributes:
        copies_late: whether copies are made when they are waited for, and products when they are asked for.
        apart: whether the program's warps take turns, or its warpgroups where these make products.
        backwards: whether the last of them comes first.
    """

    copies_late: bool = False
    apart: bool = False
    backwards: bool = False

    def parties(self, program: Program) -> list[range]:
        """Return the threads that are in step, in turn."""
        threads = size = program.threads
        if self.apart:
            size = WARPGROUP if any(one.name == "wgmma" for one in program.instructions) else LANES
        found = [range(start, start + size) for start in range(0, threads, size)]
        return found[::-1] if self.backwards else found


IN_STEP = (Order(), Order(copies_late=True))
APART = tuple(Order(late, True, backwards) for late in (False, True) for backwards in (False, True))


class Machine:
    """Threads in step of one program of a kernel.

    Args:
        program: the kernel.
        memory: global memory.
        shared: bytes of the program's shared memory.
        arguments: addresses and numbers of the parameters, floats as such.
        at: of the program, along three axes.
        grid: programs along them.
        party: which threads.
        copies_late: see `Order`.
    """

    def __init__(
        self,
        program: Program,
        memory: Memory,
        shared: Array,
        arguments: Sequence[int | float],
        at: tuple[int, int, int],
        grid: tuple[int, int, int],
        party: range,
        copies_late: bool,
    ) -> None:
        self._program, self._memory, self._shared, self._late = program, memory, shared, copies_late
        self._count = len(party)
        threads = np.arange(party.start, party.stop, dtype=np.uint64)
        self._held: dict[str, Array] = {
            "%tid.x": threads, "%ntid.x": self._all(program.threads), "%laneid": threads % LANES,
            **{f"%ctaid.{axis}": self._all(place) for axis, place in zip("xyz", at, strict=True)},
            **{f"%nctaid.{axis}": self._all(count) for axis, count in zip("xyz", grid, strict=True)},
            **{name: self._all(address) for name, address in program.shared.items()},
        }  # fmt: skip
        given = list(arguments) + [0] * (len(program.parameters) - len(arguments))  # Triton's own scratch
        self._parameters = {
            name: self._all(int(np.float32(value).view(np.uint32)) if isinstance(value, float) else value)
            for name, value in zip(program.parameters, given, strict=True)
        }
        self._copies: list[list[Callable[[], None]]] = [[]]
        self._products: list[list[Callable[[], None]]] = [[]]

    def follow(self) -> Iterator[None]:
        """Follow the program to its end, and pause at each barrier."""
        at, instructions = 0, self._program.instructions
        while at < len(instructions):
            one = instructions[at]
            mask = self._mask(one.guard)
            at += 1
            if one.name in ("bra", "ret"):
                if mask.any() != mask.all():
                    raise AssertionError(f"threads of one program part at {one}")
                if mask.all():
                    at = self._program.labels[one.operands[-1]] if one.name == "bra" else len(instructions)
            elif one.name == "bar" and one.kind[0] == "sync":
                if one.operands != ("0",):
                    raise AssertionError(f"the machine knows no barrier of some threads: {one}")
                yield
            elif one.name not in _NOTHING:
                self._step(one, mask)

    # Values

    def _all(self, value: int) -> Array:
        return np.full(self._count, value & 0xFFFF_FFFF_FFFF_FFFF, np.uint64)

    def _mask(self, guard: tuple[str, bool] | None) -> Array:
        if guard is None:
            return np.ones(self._count, bool)
        return self._bits(guard[0]).astype(bool) ^ guard[1]

    def _bits(self, operand: str) -> Array:
        """Return 64 bits a thread."""
        if operand in self._held:
            return self._held[operand]
        if operand.startswith("0f"):
            return self._all(int(operand[2:], 16))
        if operand in ("true", "false"):
            return self._all(int(operand == "true"))
        if re.fullmatch(r"(-?\d+|0[xX][0-9a-fA-F]+)U?", operand):
            return self._all(int(operand.rstrip("U"), 0))
        if re.fullmatch(r"-?\d+\.\d+", operand):
            return self._all(int(np.float32(float(operand)).view(np.uint32)))
        raise AssertionError(f"nothing has written {operand}")

    def _value(self, operand: str, kind: str) -> Array:
        """Return an operand as numbers of a type; halves as float32."""
        bits = self._bits(operand)
        if kind == "pred":
            return bits.astype(bool)
        if kind in ("bf16", "f16"):
            return _wide(bits.astype(np.uint16), kind)
        kept = np.dtype(_TYPES[kind])
        return bits.astype(f"u{kept.itemsize}").view(kept)

    def _set(self, name: str, value: Array, kind: str, mask: Array) -> None:
        """Write numbers of a type, halves from float32, where the mask says so."""
        if kind == "pred":
            bits = value.astype(np.uint64)
        elif kind in ("bf16", "f16"):
            bits = _narrow(value, kind).astype(np.uint64)
        else:
            kept = np.dtype(_TYPES[kind])
            bits = np.ascontiguousarray(value.astype(kept)).view(f"u{kept.itemsize}").astype(np.uint64)
        self._held[name] = bits if mask.all() else np.where(mask, bits, self._held.get(name, self._all(0)))

    def _pairs(self, operand: str, kind: str) -> Array:
        """Return the two halves of a register: float32 (threads, 2)."""
        if kind == "f32":
            return self._bits(operand).view(np.float32).reshape(-1, 2)
        bits = self._bits(operand).astype(np.uint32)
        return _wide(np.stack((bits & 0xFFFF, bits >> 16), axis=1).astype(np.uint16), kind)

    def _set_pairs(self, name: str, value: Array, kind: str, mask: Array) -> None:
        if kind == "f32":
            self._set(name, np.ascontiguousarray(value, np.float32).view(np.uint64)[:, 0], "b64", mask)
            return
        halves = _narrow(value, kind).astype(np.uint32)
        self._set(name, halves[:, 0] | halves[:, 1] << 16, "b32", mask)

    def _address(self, operand: str) -> Array:
        base, *offset = re.split(r"\s*\+\s*", operand.strip("[] "))
        return self._bits(base) + np.uint64(int(offset[0], 0) if offset else 0)

    # Instructions

    def _step(self, one: Instruction, mask: Array) -> None:
        name, kind, operands = one.name, one.kind, one.operands
        step = getattr(self, f"_do_{name}", None)
        if step is not None:
            step(kind, operands, mask)
            return
        if name not in _ARITHMETIC and name not in _OTHERS:
            raise AssertionError(f"the machine does not know {name}")
        last = kind[-1]
        _only(kind[:-1], {"rn", "approx", "ftz", "full"})
        if last.endswith("x2"):
            half = last[:-2]
            inputs = [self._pairs(operand, half).astype(np.float64) for operand in operands[1:]]
            self._set_pairs(operands[0], _arithmetic(name, inputs), half, mask)
            return
        inputs = [self._value(operand, last) for operand in operands[1:]]
        if last in ("bf16", "f16"):
            inputs = [each.astype(np.float64) for each in inputs]
        self._set(operands[0], _arithmetic(name, inputs), last, mask)

    def _do_mov(self, kind: tuple[str, ...], operands: tuple[str, ...], mask: Array) -> None:
        into, *source = operands
        width = {"b32": 16, "b64": 32}.get(kind[0], 0)
        if into.startswith("{"):
            for at, part in enumerate(_names(into)):
                self._set(part, self._bits(source[0]) >> np.uint64(width * at), f"b{width}", mask)
        elif source[0].startswith("{"):
            parts = [self._value(part, f"b{width}").astype(np.uint64) for part in _names(source[0])]
            self._set(into, parts[0] | parts[1] << np.uint64(width), kind[0], mask)
        else:
            self._set(into, self._value(source[0], kind[0]), kind[0], mask)

    def _do_setp(self, kind: tuple[str, ...], operands: tuple[str, ...], mask: Array) -> None:
        first, second = (self._value(operand, kind[-1]) for operand in operands[1:])
        self._set(operands[0], _COMPARE[kind[0]](first, second), "pred", mask)

    def _do_selp(self, kind: tuple[str, ...], operands: tuple[str, ...], mask: Array) -> None:
        first, second = (self._value(operand, kind[-1]) for operand in operands[1:3])
        self._set(operands[0], np.where(self._value(operands[3], "pred"), first, second), kind[-1], mask)

    def _do_cvt(self, kind: tuple[str, ...], operands: tuple[str, ...], mask: Array) -> None:
        into, source = kind[-2:]
        _only(kind[:-2], {"rn", "rzi"})
        if into.endswith("x2"):
            high, low = (self._value(operand, source) for operand in operands[1:])
            self._set_pairs(operands[0], np.stack((low, high), axis=1), into[:-2], mask)
            return
        self._set(operands[0], self._value(operands[1], source), into, mask)

    def _do_mul(self, kind: tuple[str, ...], operands: tuple[str, ...], mask: Array) -> None:
        self._multiply(kind, operands, mask, None)

    def _do_mad(self, kind: tuple[str, ...], operands: tuple[str, ...], mask: Array) -> None:
        self._multiply(kind, operands, mask, operands[3])

    def _multiply(
        self, kind: tuple[str, ...], operands: tuple[str, ...], mask: Array, added: str | None
    ) -> None:
        last = kind[-1]
        _only(kind[:-1], {"rn", "lo", "wide"} | ({"hi"} if last == "u32" else set()))
        if last.endswith("x2"):
            product = self._pairs(operands[1], last[:-2]) * self._pairs(operands[2], last[:-2])
            self._set_pairs(operands[0], product, last[:-2], mask)
            return
        first, second = (self._value(operand, last) for operand in operands[1:3])
        if "wide" in kind:
            last = f"{last[0]}{2 * int(last[1:])}"
            first, second = first.astype(_TYPES[last]), second.astype(_TYPES[last])
        if "hi" in kind:
            first, second = first.astype(np.uint64), second.astype(np.uint64)
            product = (first * second >> np.uint64(32)).astype(np.uint32)
        else:
            product = first * second
        self._set(operands[0], product if added is None else product + self._value(added, last), last, mask)

    def _do_bfe(self, kind: tuple[str, ...], operands: tuple[str, ...], mask: Array) -> None:
        value, start, length = (self._value(operand, "s64") for operand in operands[1:])
        value = self._value(operands[1], "u32").astype(np.int64) >> start
        field = value & ((np.int64(1) << length) - 1)
        if kind[-1] == "s32":
            field = np.where(field >> (length - 1) & 1, field - (np.int64(1) << length), field)
        self._set(operands[0], field, kind[-1], mask)

    def _do_prmt(self, kind: tuple[str, ...], operands: tuple[str, ...], mask: Array) -> None:
        first, second, chosen = (self._value(operand, "u32").astype(np.uint64) for operand in operands[1:])
        both, found = first | second << np.uint64(32), np.zeros_like(first)
        for at in range(4):
            place = (chosen >> np.uint64(4 * at)) & np.uint64(7)
            found |= (both >> (np.uint64(8) * place) & np.uint64(0xFF)) << np.uint64(8 * at)
        self._set(operands[0], found, "b32", mask)

    def _do_lop3(self, kind: tuple[str, ...], operands: tuple[str, ...], mask: Array) -> None:
        a, b, c = (self._value(operand, "u32") for operand in operands[1:4])
        table, found = int(operands[4], 0), np.zeros_like(a)
        for at in range(8):
            if table >> at & 1:
                found |= (a if at & 4 else ~a) & (b if at & 2 else ~b) & (c if at & 1 else ~c)
        self._set(operands[0], found, "b32", mask)

    def _do_shfl(self, kind: tuple[str, ...], operands: tuple[str, ...], mask: Array) -> None:
        lane = np.arange(self._count) % LANES
        moved = self._value(operands[2], "u32").astype(np.int64)
        source = {"bfly": lane ^ moved, "idx": moved}[kind[1]] % LANES
        values = self._bits(operands[1])
        self._set(operands[0], values[np.arange(self._count) - lane + source], "b32", mask)

    # Memory

    def _do_ld(self, kind: tuple[str, ...], operands: tuple[str, ...], mask: Array) -> None:
        into, source = operands
        if kind[0] == "param":
            self._set(into, self._parameters[source.strip("[]")], kind[-1], mask)
            return
        names, size = _names(into), np.dtype(_TYPES[kind[-1]]).itemsize
        found = self._read(kind[0], self._address(source), size * len(names), mask)
        values = found.view(f"u{size}")
        for at, name in enumerate(names):
            self._set(name, values[:, at], f"u{8 * size}", mask)

    def _do_st(self, kind: tuple[str, ...], operands: tuple[str, ...], mask: Array) -> None:
        size = np.dtype(_TYPES[kind[-1]]).itemsize
        values = [self._bits(name).astype(f"u{size}") for name in _names(operands[1])]
        self._write(kind[0], self._address(operands[0]), np.stack(values, axis=1).view(np.uint8), mask)

    def _read(self, space: str, address: Array, size: int, mask: Array) -> Array:
        """Return (threads, size) bytes, zeros where masked."""
        whole, at = self._where(space, address, mask)
        found = np.zeros((self._count, size), np.uint8)
        if at.size:
            found[mask] = whole[at[:, None] + np.arange(size)]
        return found

    def _write(self, space: str, address: Array, values: Array, mask: Array) -> None:
        whole, at = self._where(space, address, mask)
        if at.size:
            whole[at[:, None] + np.arange(values.shape[1])] = values[mask]

    def _where(self, space: str, address: Array, mask: Array) -> tuple[Array, Array]:
        whole = self._shared if space == "shared" else self._memory.bytes
        start = 0 if space == "shared" else GLOBAL
        at = address[mask].astype(np.int64) - start
        if at.size and not (at.min() >= 0 and at.max() < len(whole)):
            raise AssertionError(f"an address lies outside of {space} memory")
        return whole, at

    def _do_cp(self, kind: tuple[str, ...], operands: tuple[str, ...], mask: Array) -> None:
        if "commit_group" in kind:
            self._copies.append([])
        elif "wait_group" in kind or "wait_all" in kind:
            _settle(self._copies, int(operands[0]) if operands else 0)
        else:
            size = int(operands[2], 0)
            kept = self._value(operands[3], "u32") if len(operands) > 3 else np.full(self._count, size)
            into, source = self._address(operands[0]), self._address(operands[1])
            found = self._read("global", source, size, mask & (kept == size))  # others become zeros
            self._later(self._copies, lambda: self._write("shared", into, found, mask), self._late)

    def _later(self, groups: list[list[Callable[[], None]]], work: Callable[[], None], late: bool) -> None:
        if late:
            groups[-1].append(work)
        else:
            work()

    # Matrices

    def _by_warp(self, values: Array) -> Array:
        return values.reshape(-1, LANES, *values.shape[1:])

    def _do_ldmatrix(self, kind: tuple[str, ...], operands: tuple[str, ...], mask: Array) -> None:
        names, lane = _names(operands[0]), np.arange(LANES)
        address = self._by_warp(self._address(operands[1]))  # (warps, 32)
        for at, name in enumerate(names):
            rows = address[:, 8 * at : 8 * at + 8].reshape(-1)
            whole, places = self._where("shared", rows, np.ones(len(rows), bool))
            matrix = whole[places[:, None] + np.arange(16)].view(np.uint16).reshape(-1, 8, 8)
            matrix = matrix.transpose(0, 2, 1) if "trans" in kind else matrix
            pairs = matrix[:, lane // 4].reshape(-1, LANES, 4, 2)[:, lane, lane % 4].astype(np.uint32)
            self._set(name, (pairs[..., 0] | pairs[..., 1] << 16).reshape(-1), "b32", mask)

    def _do_stmatrix(self, kind: tuple[str, ...], operands: tuple[str, ...], mask: Array) -> None:
        address, lane = self._by_warp(self._address(operands[0])), np.arange(LANES)
        for at, name in enumerate(_names(operands[1])):
            held = self._by_warp(self._value(name, "u32"))
            matrix = np.zeros((len(held), 8, 8), np.uint16)
            for half in range(2):
                matrix[:, lane // 4, 2 * (lane % 4) + half] = held >> 16 * half & 0xFFFF
            matrix = matrix.transpose(0, 2, 1) if "trans" in kind else matrix
            rows = address[:, 8 * at : 8 * at + 8].reshape(-1)
            whole, places = self._where("shared", rows, np.ones(len(rows), bool))
            whole[places[:, None] + np.arange(16)] = (
                np.ascontiguousarray(matrix).reshape(-1, 8).view(np.uint8)
            )

    def _do_mma(self, kind: tuple[str, ...], operands: tuple[str, ...], mask: Array) -> None:
        if "m16n8k16" not in kind:
            raise AssertionError(f"no product of {kind}")
        a = self._fragment(operands[1], kind[-2], 16)
        b = np.concatenate(
            [self._by_warp(self._pairs(name, kind[-2])) for name in _names(operands[2])], axis=2
        )
        columns = b.reshape(-1, 8, 4, 2, 2).transpose(0, 3, 2, 4, 1).reshape(-1, 16, 8)  # (warps, k, n)
        sums = np.stack([self._by_warp(self._value(name, "f32")) for name in _names(operands[3])], axis=2)
        found = _spread(_gathered(sums, 1) + a @ columns)
        for at, name in enumerate(_names(operands[0])):
            self._set(name, found[:, :, at].reshape(-1), "f32", mask)

    def _fragment(self, operand: str, kind: str, rows: int) -> Array:
        """Return the left operand: float32 (warps, 16, 16), or (warpgroups, 64, 16)."""
        first, below, right, both = (self._by_warp(self._pairs(name, kind)) for name in _names(operand))
        upper, lower = (
            np.concatenate([each.reshape(-1, 8, 8) for each in pair], axis=2)
            for pair in ((first, right), (below, both))
        )
        return np.concatenate((upper, lower), axis=1).reshape(-1, rows, 16)

    def _do_wgmma(self, kind: tuple[str, ...], operands: tuple[str, ...], mask: Array) -> None:
        if "commit_group" in kind:
            self._products.append([])
        elif "wait_group" in kind:
            _settle(self._products, int(operands[0]))
        elif "mma_async" in kind:
            size = re.match(r"m64n(\d+)k16", kind[3])
            assert size is not None
            columns, names = int(size.group(1)), _names(operands[0])
            scaled, *signs, transposed = operands[3:]
            if signs != ["1", "1"] or transposed != "0" or not operands[1].startswith("{"):
                raise AssertionError(f"no product of {operands[1:]}")

            def multiply() -> None:
                right = self._described(self._bits(operands[2]), columns, kind[-1])
                found = self._fragment(operands[1], kind[-2], 64) @ right
                if self._mask((scaled, False)).all():
                    sums = np.stack([self._by_warp(self._value(name, "f32")) for name in names], axis=2)
                    found = found + _gathered(sums, columns // 8).reshape(-1, 64, columns)
                spread = _spread(found.reshape(-1, 16, columns))
                for at, name in enumerate(names):
                    self._set(name, spread[:, :, at].reshape(-1), "f32", mask)

            self._later(self._products, multiply, not self._late)

    def _described(self, descriptor: Array, columns: int, kind: str) -> Array:
        """Return the right operand in shared memory, whose rows lie along k: float32 (warpgroups, 16, columns)."""
        whole = descriptor.reshape(-1, WARPGROUP)
        if (whole != whole[:, :1]).any():
            raise AssertionError("threads of a warpgroup have several descriptors")
        found = []
        for one in whole[:, 0].tolist():
            start, apart = (one & 0x3FFF) << 4, (one >> 32 & 0x3FFF) << 4
            width = {1: 128, 2: 64, 3: 32}[one >> 62]  # bytes of a row whose chunks are swizzled
            n, k = np.arange(columns)[:, None], np.arange(16)[None, :]
            at = start + n // 8 * apart + n % 8 * width + 2 * k
            at ^= (at >> 7 & (width // 16 - 1)) << 4
            bits = self._shared[at[..., None] + np.arange(2)].view(np.uint16)[..., 0]
            found.append(_wide(bits, kind).T)
        return np.stack(found)


def _only(modifiers: tuple[str, ...], known: set[str]) -> None:
    if not known.issuperset(modifiers):
        raise AssertionError(f"the machine does not know .{'.'.join(modifiers)}")


def _settle(groups: list[list[Callable[[], None]]], pending: int) -> None:
    """Do what was put off, but for the last `pending` groups."""
    done = max(0, len(groups) - 1 - pending)
    for work in [work for group in groups[:done] for work in group]:
        work()
    del groups[:done]


def _gathered(sums: Array, tiles: int) -> Array:
    """Return (warps, 16, 8 tiles) of what lanes hold, (warps, 32, 4 tiles)."""
    parts = sums.reshape(-1, 8, 4, tiles, 2, 2)  # row of eight, column pair, tile, upper or lower, column
    return parts.transpose(0, 4, 1, 3, 2, 5).reshape(-1, 16, 8 * tiles)


def _spread(matrix: Array) -> Array:
    """Return what `_gathered` takes."""
    tiles = matrix.shape[2] // 8
    parts = matrix.reshape(-1, 2, 8, tiles, 4, 2)
    return parts.transpose(0, 2, 4, 3, 1, 5).reshape(-1, LANES, 4 * tiles)


def _arithmetic(name: str, inputs: list[Array]) -> Array:
    """Return what an instruction makes of numbers of one type."""
    first, *rest = inputs
    second = rest[0] if rest else first
    if name in ("shl", "shr"):
        bits = 8 * first.dtype.itemsize
        amount = np.minimum(second.astype(np.int64), bits - 1).astype(first.dtype)
        moved = first << amount if name == "shl" else first >> amount
        return np.where(second.astype(np.int64) < bits, moved, moved >> amount if name == "shr" else 0)
    with np.errstate(all="ignore"):
        if name == "fma":
            return first.astype(np.float64) * second + rest[1]
        return _ARITHMETIC[name](first, second)


def _divided(a: Array, b: Array) -> Array:
    """Return the quotient, of integers rounded to zero."""
    return a / b if a.dtype == np.float32 else (a - np.fmod(a, b)) // b


def _names(operand: str) -> list[str]:
    return [name.strip() for name in operand.strip("{} ").split(",")]


def _wide(bits: Array, kind: str) -> Array:
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _narrow(values: Array, kind: str) -> Array:
    """Return the bits of float32 or float64 values rounded once to 16 bits."""
    single = np.ascontiguousarray(values, np.float32)
    if (
        values.dtype == np.float64
    ):  # where that is not exact, to an odd last bit: the next rounding alone counts
        bits = np.where(np.abs(single) > np.abs(values), single.view(np.uint32) - 1, single.view(np.uint32))
        single = (bits | (single != values)).astype(np.uint32).view(np.float32)
    with np.errstate(all="ignore"):
        if kind == "f16":
            return single.astype(np.float16).view(np.uint16)
    bits = single.view(np.uint32)
    rounded = (bits.astype(np.uint64) + 0x7FFF + (bits >> 16 & 1) >> np.uint64(16)).astype(np.uint16)
    return np.where(np.isnan(single), np.uint16(0x7FC0), rounded)


def run(program: Program, grid: tuple[int, int, int], arguments: Sequence[Any], order: Order) -> None:
    """Run a whole grid over numbers and tensors of the CPU, which are written in place."""
    memory = Memory()
    given = [memory.place(each) if isinstance(each, torch.Tensor) else each for each in arguments]
    for x, y, z in itertools.product(*map(range, grid)):
        shared = np.full(SHARED_BYTES, 0xFF, np.uint8)  # what nobody wrote is no number
        parties = [
            Machine(program, memory, shared, given, (x, y, z), grid, party, order.copies_late).follow()
            for party in order.parties(program)
        ]
        done: set[bool] = set()
        while True not in done:
            done = {next(party, _ENDED) is _ENDED for party in parties}
        if False in done:
            raise AssertionError("some threads end where others wait at a barrier")
    memory.back()


def assembled(
    text: str, operands: torch.Tensor, results: int, before: str = "", codebook: torch.Tensor | None = None
) -> torch.Tensor:
    """Return int32 (threads, results), $0 and on, of inline assembly for int32 operands (threads, count) behind them.

    `before` is what all threads run first: its $1 is the address of a codebook in float32.
    """
    threads, count = operands.shape
    memory = torch.zeros(threads, results + count, dtype=torch.int32)
    memory[:, results:] = operands
    table = torch.zeros(1) if codebook is None else codebook.float()
    inputs = [f"ld.global.b32 %q{at}, [%rd3 + {4 * at}];" for at in range(results, results + count)]
    outputs = [f"st.global.b32 [%rd3 + {4 * at}], %q{at};" for at in range(results)]
    lines = [
        ".visible .entry assembled(\n.param .u64 .ptr first,\n.param .u64 .ptr second\n)",
        f".reqntid {threads}\n{{",
        "ld.param.b64 %rd1, [first];", "ld.param.b64 %rd2, [second];", "mov.u32 %r1, %tid.x;",
        f"mad.wide.u32 %rd3, %r1, {4 * (results + count)}, %rd1;",
        before.replace("$0", "%r2").replace("$1", "%rd2"), ";", *inputs,
        re.sub(r"\$(\d+)", r"%q\1", text), ";", *outputs, "ret;\n}",
    ]  # fmt: skip
    run(Program("\n".join(lines)), (1, 1, 1), [memory, table], Order())
    return memory[:, :results]
