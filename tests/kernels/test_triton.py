"""The CUDA kernels: their choice, their layout, and `triton_cases.py` in the interpreter and on a GPU."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quantkit.errors import BackendError
from quantkit.kernels import ops, reference
from quantkit.kernels import triton as kernels
from quantkit.kernels.triton import unpack_ptx
from quantkit.kernels.triton.layout import place, tile_cols
from quantkit.quantize import quantize
from quantkit.quantize.nf4 import NF4_CODEBOOK
from quantkit.quantize.packing import unpack_zeros
from quantkit.schemes import SCHEMES, QuantScheme, int_scheme
from quantkit.tensor import QuantizedTensor, empty_quantized
from tests.kernels.cases import in_the_interpreter_and_on_a_gpu, run_cases
from tests.kernels.ptx_machine import assembled
from tests.paths import ROOT

QUANTIZED = [scheme for scheme in SCHEMES.values() if scheme.quantized]


def random_matrix(scheme: QuantScheme, shape: tuple[int, int]) -> QuantizedTensor:
    return quantize(torch.randn(shape, generator=torch.Generator().manual_seed(0)), scheme, torch.bfloat16)


@in_the_interpreter_and_on_a_gpu
@pytest.mark.parametrize("file", ["triton_cases.py", "row_cases.py"])
def test_the_kernels_meet_the_oracle(file: str, device: str) -> None:
    done = run_cases(f"tests/kernels/{file}", device)
    assert done.returncode == 0, done.stdout + done.stderr


def test_importing_the_package_needs_no_triton() -> None:
    program = (
        "import sys; sys.modules['triton'] = None; import torch, quantkit.models.loader;"
        "from quantkit.kernels import triton; print(triton.packs.__module__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "quantkit.kernels.triton", done.stderr


@pytest.mark.parametrize("shape", [(1, 8), (33, 256), (9, 301)])
@pytest.mark.parametrize("scheme", QUANTIZED, ids=lambda scheme: scheme.name)
def test_every_code_lies_where_the_drawing_says(scheme: QuantScheme, shape: tuple[int, int]) -> None:
    weight = random_matrix(scheme, shape)
    packed = kernels.pack([weight])
    tiles, (rows, cols), bits = packed.tiles, shape, scheme.bits
    n, k = torch.arange(rows)[:, None], torch.arange(cols)[None, :]
    in_tile = k % tile_cols(bits)
    i, half = in_tile // 32, in_tile % 32
    nf4 = scheme.method == "nf4"
    at = 4 * (i // 2) + 2 * (i % 2) + half % 2 if nf4 else half % 2 * (16 // bits) + i
    codes = tiles.codes[k // tile_cols(bits), n, half // 2].long() >> at * bits & (2**bits - 1)
    if nf4:
        found = torch.tensor(NF4_CODEBOOK)[codes]
        ones = torch.ones(weight.scales.shape)  # an absmax of 1
        plain = QuantizedTensor(SCHEMES["nf4"], shape, weight.codes, ones)
        assert torch.equal(found, reference.dequantize(plain))
    else:
        group = k // (tiles.group or cols)
        zeros = 2 ** (bits - 1) if weight.zeros is None else unpack_zeros(weight.zeros, rows)[n, group]
        if tiles.zeros is not None:
            assert torch.equal(tiles.zeros[group, n // 8] >> (n % 8 * 4) & 15, zeros.int())
        found = (codes - zeros) * tiles.scales.float()[group, n]
        assert torch.equal(found, reference.dequantize(weight))


@pytest.mark.parametrize("scheme", QUANTIZED, ids=lambda scheme: scheme.name)
def test_tiles_take_no_more_bytes_where_nothing_is_ragged(scheme: QuantScheme) -> None:
    weight = random_matrix(scheme, (64, 512))
    packed = kernels.pack([weight])
    parts = [part for part in vars(packed.tiles).values() if isinstance(part, torch.Tensor)]
    assert sum(part.nbytes for part in parts) == packed.nbytes == weight.nbytes
    assert packed.shape == (64, 512)
    assert packed.device == weight.device


def test_what_cannot_be_packed_stays_for_the_reference() -> None:
    weight = random_matrix(int_scheme(4, 12, True), (16, 48))
    assert ops.prepare(weight, "triton") is weight
    with pytest.raises(BackendError, match="fusable"):
        kernels.pack([weight])
    assert kernels.packs(SCHEMES["int8"], (1 << 16, (1 << 15) - 64))
    assert not kernels.packs(SCHEMES["int8"], (1 << 16, 1 << 15))  # 2**31 elements
    huge = empty_quantized((1 << 17, 1 << 15), SCHEMES["int4-g128"], torch.bfloat16, "meta")
    assert ops.prepare(huge, "triton") is huge


def test_what_cannot_be_fused_is_not() -> None:
    even = random_matrix(SCHEMES["int8"], (16, 64))
    assert kernels.fusable([even, random_matrix(SCHEMES["int8"], (10, 64))])
    assert not kernels.fusable([even, random_matrix(SCHEMES["nf4"], (16, 64))])
    assert not kernels.fusable([even, random_matrix(SCHEMES["int8"], (16, 72))])
    nested, across = (
        random_matrix(SCHEMES[name], shape) for name, shape in (("nf4-dq", (16, 64)), ("nf4", (16, 72)))
    )
    assert not kernels.fusable([nested, nested])
    assert not kernels.fusable([across, across])
    odd = random_matrix(SCHEMES["int4-g32-asym"], (10, 64))
    assert not kernels.fusable([odd, odd])
    large = empty_quantized((1 << 15, 1 << 15), SCHEMES["int8"], torch.bfloat16, "meta")
    assert kernels.fusable([large])
    assert not kernels.fusable([large, large])  # 2**31 elements
    assert ops.fuse([odd, odd], "triton") is None


def test_on_a_cpu_the_operator_says_what_it_needs() -> None:
    packed = ops.prepare(random_matrix(SCHEMES["int8"], (16, 64)), "triton")
    with pytest.raises(BackendError, match="run on a CUDA GPU where Triton is installed, not on cpu"):
        ops.linear(torch.randn(1, 64), packed)


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
class TestSharedMemory:
    """What a kernel with a table of its own must ask of CUDA; the driver is pretended."""

    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int | None, int, int]]:
        from quantkit.kernels.triton import arguments

        calls: list[tuple[int | None, int, int]] = []

        class Driver:
            def __init__(self, name: str) -> None:
                assert name == "libcuda.so.1"

            def cuFuncSetAttribute(self, function: Any, attribute: int, value: int) -> int:
                calls.append((function.value, attribute, value))
                return int(function.value == 13)

        monkeypatch.setattr(arguments, "_GRANTED", set())
        monkeypatch.setattr(arguments.ctypes, "CDLL", Driver)
        return calls

    @staticmethod
    def compiled(function: int, shared: int) -> Any:
        return SimpleNamespace(metadata=SimpleNamespace(shared=shared), run=None, function=function)

    def test_it_asks_once_for_each_kernel(self, asked: list[tuple[int | None, int, int]]) -> None:
        from quantkit.kernels.triton import arguments

        for function in (7, 7, 8):
            arguments.grant_shared(self.compiled(function, 20_992))
        assert asked == [(7, 8, 20_992), (8, 8, 20_992)]

    def test_it_leaves_alone_what_triton_asks_for(self, asked: list[tuple[int | None, int, int]]) -> None:
        from quantkit.kernels.triton import arguments

        arguments.grant_shared(self.compiled(7, arguments.UNASKED_SHARED + 1))
        assert not asked

    @pytest.mark.usefixtures("asked")
    def test_a_refusal_is_said(self) -> None:
        from quantkit.kernels.triton import arguments

        with pytest.raises(BackendError, match="CUDA grants no 20,992 bytes of shared memory"):
            arguments.grant_shared(self.compiled(13, 20_992))


class TestChoice:
    """Of a backend; the GPU is pretended."""

    @pytest.fixture(autouse=True)
    def _hopper(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ops._say_once.cache_clear()
        monkeypatch.setattr(ops, "find_spec", lambda name: object())
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        monkeypatch.setattr(kernels, "cannot_start", lambda: None)

    def test_a_gpu_runs_triton(self) -> None:
        assert ops.choose_backend("auto", "cuda") == "triton"
        assert ops.choose_backend("triton", "cuda:1") == "triton"
        assert ops.choose_backend("reference", "cuda") == "reference"
        with pytest.raises(BackendError, match="cannot run on cpu: it needs a CUDA GPU"):
            ops.choose_backend("triton", "cpu")

    @pytest.mark.parametrize(
        ("lacking", "words"),
        [
            ("triton", "Triton is not installed"),
            ("gpu", "no CUDA GPU is visible to PyTorch"),
            ("rocm", "PyTorch was built for ROCm"),
            ("capability", "its compute capability is 7.0, and the kernels need 7.5"),
            ("compiler", "Triton cannot start: no compiler"),
        ],
    )
    def test_what_is_lacking_is_said(
        self, lacking: str, words: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        if lacking == "triton":
            monkeypatch.setattr(ops, "find_spec", lambda name: None)
        elif lacking == "gpu":
            monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        elif lacking == "rocm":
            monkeypatch.setattr(torch.version, "hip", "7.0")
        elif lacking == "compiler":
            monkeypatch.setattr(kernels, "cannot_start", lambda: "Triton cannot start: no compiler")
        else:
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
        with pytest.raises(BackendError, match=f"the triton backend cannot run on cuda: {words}"):
            ops.choose_backend("triton", "cuda")
        with caplog.at_level(logging.WARNING, "quantkit"):
            assert [ops.choose_backend("auto", "cuda") for _ in range(2)] == ["reference"] * 2
        assert len(caplog.messages) == 1
        assert words in caplog.text
        assert "slow reference" in caplog.text


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
class TestStart:
    """Of Triton, whose driver is pretended."""

    @staticmethod
    def reason(monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> str | None:
        import triton.runtime

        class Driver:
            @property
            def active(self) -> Any:
                if error is not None:
                    raise error
                return SimpleNamespace(get_current_target=lambda: "cuda")

        monkeypatch.setattr(triton.runtime, "driver", Driver())
        return kernels.cannot_start.__wrapped__()

    def test_it_starts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.reason(monkeypatch, None) is None

    def test_no_compiler_no_headers_and_what_else_there_is(self, monkeypatch: pytest.MonkeyPatch) -> None:
        error: Exception = RuntimeError("Failed to find C compiler.\nPlease specify")
        assert (
            self.reason(monkeypatch, error)
            == "Triton cannot start: Failed to find C compiler. Please specify"
        )
        found = self.reason(monkeypatch, subprocess.CalledProcessError(1, ["gcc", "main.c"]))
        assert found == "the C compiler that Triton calls fails; it needs Python's headers (python3-dev)"
        assert self.reason(monkeypatch, ImportError()) == "Triton cannot start: ImportError"


class TestPtx:
    """The instructions that unpack codes, followed on the CPU: what the interpreter cannot run."""

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
    def test_every_code_at_every_place(self, kind: str, dtype: torch.dtype) -> None:
        bits, nf4 = 8 if kind == "int8" else 4, kind == "nf4"
        per, codebook = 16 // bits, torch.tensor(NF4_CODEBOOK).to(dtype)
        values = codebook if nf4 else (torch.arange(2.0**bits) - 2 ** (bits - 1)).to(dtype)
        codes, words = every_code(bits, nf4)
        program = unpack_ptx.nf4(dtype) if nf4 else unpack_ptx.integers(bits, dtype)
        assert torch.equal(unpacked(program, words, per, dtype, codebook if nf4 else None), values[codes])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("scales", [1, 2, 4])
    @pytest.mark.parametrize("nf4", [False, True])
    def test_every_code_times_its_groups_scale(self, nf4: bool, scales: int, dtype: torch.dtype) -> None:
        codebook = torch.tensor(NF4_CODEBOOK).to(dtype)
        values = codebook if nf4 else (torch.arange(16.0) - 8).to(dtype)
        codes, words = every_code(4, nf4)
        lane = torch.arange(len(words)) % 32
        factors = torch.linspace(0.3, 1.9, 2 * scales).view(scales, 2)  # of an even row and of the next
        if nf4:
            factors = factors[:, :1].expand(-1, 2)
            given = factors[:, 0].contiguous().view(torch.int32)
            program = unpack_ptx.nf4(dtype, scales)
        else:
            factors = factors.to(dtype).float()
            given = factors.to(dtype).view(torch.int32)[:, 0]
            program = unpack_ptx.integers(4, dtype, scales)
        operands = torch.cat((words, given.repeat_interleave(2).expand(len(words), -1)), dim=1)
        found = unpacked(program, operands, 4, dtype, codebook if nf4 else None)
        expected = factors[:, lane // 4 % 2].T.repeat_interleave(4 // scales, dim=1)[
            :, None
        ]  # (threads, 1, 4)
        assert torch.equal(found, (values[codes].float() * expected).to(dtype))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_the_whole_table_is_written(self, dtype: torch.dtype) -> None:
        codebook = torch.tensor(NF4_CODEBOOK).to(dtype)
        threads, count = unpack_ptx.LEAST_THREADS, unpack_ptx.TABLE_BYTES // 4 // unpack_ptx.LEAST_THREADS
        program = ["{", ".reg .b32 at;", "mov.u32 at, quantkit_nf4_table;", f"add.u32 at, at, ${count};"]
        program += [f"ld.shared.b32 ${i}, [at + {4 * threads * i}];" for i in range(count)]
        starts = 4 * torch.arange(threads, dtype=torch.int32)[:, None]
        found = assembled("\n".join([*program, "}"]), starts, count, unpack_ptx.nf4_table(dtype), codebook)
        rows = found.T.reshape(256, 32)  # of a byte's two codes, a copy for each lane
        halves = torch.stack((rows & 0xFFFF, rows >> 16 & 0xFFFF), dim=-1).to(torch.uint16).view(dtype)
        byte = torch.arange(256)
        expected = torch.stack((codebook[byte & 15], codebook[byte >> 4]), dim=-1)
        assert torch.equal(halves, expected[:, None].expand(-1, 32, -1)), "not all of the table is written"

    def test_constraints_are_of_the_operands(self) -> None:
        for bits, program in (
            (8, unpack_ptx.integers(8, torch.bfloat16)),
            (4, unpack_ptx.nf4(torch.float16)),
        ):
            operands = set(re.findall(r"\$\d+", program))
            assert operands == {f"${i}" for i in range(len(unpack_ptx.constraints(bits).split(",")))}
        for scales in (1, 2, 4):
            program = unpack_ptx.integers(4, torch.bfloat16, scales)
            used = {int(each) for each in re.findall(r"\$(\d+)", program)}
            assert used == {*range(5), *range(5, 5 + 2 * scales, 2)}
            assert unpack_ptx.constraints(4, scales) == ",".join(["=r"] * 4 + ["r"] * (1 + 2 * scales))


def every_code(bits: int, nf4: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes (threads, 2, PER) of both halves of words, each code everywhere, and the words (threads, 1)."""
    per = 16 // bits
    codes = torch.arange(2**bits).repeat(2 * per, 1)
    codes = torch.stack([row.roll(3 * at) for at, row in enumerate(codes)], dim=1).view(-1, 2, per)
    codes = codes.repeat(max(1, 64 // len(codes)), 1, 1)
    words = sum(
        codes[:, side, i] << bits * place(bits, nf4, i, side) for side in range(2) for i in range(per)
    )
    return codes, torch.as_tensor(words)[:, None].to(torch.uint32).view(torch.int32)


def unpacked(
    program: str, operands: torch.Tensor, per: int, dtype: torch.dtype, codebook: torch.Tensor | None
) -> torch.Tensor:
    """Return the pairs (threads, 2, PER) that a program makes of operands (threads, count)."""
    before = "" if codebook is None else unpack_ptx.nf4_table(dtype)
    found = assembled(program, operands, per, before, codebook)
    halves = torch.stack((found & 0xFFFF, found >> 16 & 0xFFFF), dim=1)
    return halves.to(torch.uint16).view(dtype)
