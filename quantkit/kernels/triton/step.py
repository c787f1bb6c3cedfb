"""The launches of what tokens need beside their linears. Importing this imports Triton.

B sequences with T new tokens each, R = B T rows; a decoded token, T = 1, has attention of its own. A linear comes as
parts (splits, R, N), to be added in the order of the splits, and its bias where that is left to add.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton

from calculators.units import ceil_div
from quantkit.kernels.triton import attention_kernels, step_kernels
from quantkit.kernels.triton.arguments import INTERPRETED, early
from quantkit.kernels.triton.launching import launch
from quantkit.quantize.vectors import rotation_factors

_TENSOR_CORES = 16  # rows that they take at least
_WORDS_WANTED = 32  # of a head: columns of the tensor cores for each of four warps
_AT_ONCE = 3 * 132  # programs of attention that a Hopper runs at the same time
_FULL = 0.95  # share of such a wave, or of the last of several, that is worth no further split
_MOST_SPLITS = 64
_BLOCK = {16: 64, 8: 64, 4: 128}  # keys that a program reads at once
_USUAL_HEAD = 128  # elements
_FEW_ROWS = 64  # as many as decoded sequences
_WORD_BITS = (32, 16, 8)
_WORDS = {32: torch.int32, 16: torch.int16, 8: torch.uint8}


@dataclass(frozen=True)
class Parts:
    """A linear's result before it is added up.

    Attributes:
        sums: (splits, R, N), float32 or the compute dtype; the columns of one row lie together.
        bias: (N,), None where there is none left to add.
    """

    sums: torch.Tensor
    bias: torch.Tensor | None = None


@dataclass(frozen=True)
class Slab:
    """The keys and values of one layer where a KV cache holds them.

    Attributes:
        keys: (B, n_kv_heads, slots, head_dim), or uint8 codes of 8 or 4 bits.
        values: likewise.
        key_scales: float16 (B, n_kv_heads, slots, groups), None where nothing is quantized.
        value_scales: likewise.
        bits: of an element.
    """

    keys: torch.Tensor
    values: torch.Tensor
    key_scales: torch.Tensor | None
    value_scales: torch.Tensor | None
    bits: int

    @property
    def slots(self) -> int:
        return self.keys.shape[2]


def norm(x: torch.Tensor, parts: Parts | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Add a linear to x (R, hidden) in place, and return the RMSNorm of that."""
    out = torch.empty_like(x)
    sums, bias = (None, None) if parts is None else (parts.sums, parts.bias)
    constants = norm_constants(x.shape[1], 0 if sums is None else sums.shape[0])
    launch(step_kernels.norm_kernel, (x.shape[0],), (x, sums, bias, weight, out, eps), constants)
    return out


def norm_constants(width: int, splits: int) -> dict[str, Any]:
    """Return the compile-time arguments of `norm_kernel`."""
    return {
        "SPLITS": splits,
        "WIDTH": width,
        "BLOCK": triton.next_power_of_2(width),
        "INTERPRET": INTERPRETED,
        "num_warps": 8,
        "enable_fp_fusion": True,
    }


def swiglu(gate: Parts, up: Parts, dtype: torch.dtype) -> torch.Tensor:
    """Return silu(gate) * up (R, ffn), in the place of `gate` where that is whole."""
    splits, rows, width = gate.sums.shape
    if splits == 1 and gate.sums.dtype == dtype and gate.sums.is_contiguous():
        out = gate.sums[0]
    else:
        out = torch.empty(rows, width, dtype=dtype, device=gate.sums.device)
    constants = swiglu_constants(splits, up.sums.shape[0], rows)
    arguments = (
        gate.sums, up.sums, gate.bias, up.bias, out, gate.sums.stride(1), up.sums.stride(1), width,
    )  # fmt: skip
    launch(step_kernels.swiglu_kernel, (rows, ceil_div(width, constants["BLOCK"])), arguments, constants)
    return out


def swiglu_constants(gate_splits: int, up_splits: int, rows: int) -> dict[str, Any]:
    """Return the compile-time arguments of `swiglu_kernel`: programs of few elements until there are many rows."""
    return {
        "GATE_SPLITS": gate_splits,
        "UP_SPLITS": up_splits,
        "BLOCK": 256 if rows <= _FEW_ROWS else 1024,
        "INTERPRET": INTERPRETED,
        "num_warps": 2 if rows <= _FEW_ROWS else 4,
        "enable_fp_fusion": True,
    }


@dataclass(frozen=True)
class Step:
    """What the tokens of one cache have in common.

    Attributes:
        batch: B.
        n_heads: query heads.
        n_kv_heads: heads of the cache.
        head_dim: elements of a head.
        slots: of the cache.
        bits: of an element of the cache.
        groups: scales of a head, 0 where nothing is quantized.
        dtype: compute dtype, bfloat16 or float16.
        cosines: (positions, head_dim / 2), in the compute dtype.
        sines: likewise.
        position: int64 (1,), the first new token's; on the device.
        early: whether a decoded token's kernels begin before the one ahead has ended, which lets the next one do so.
    """

    batch: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    slots: int
    bits: int
    groups: int
    dtype: torch.dtype
    cosines: torch.Tensor
    sines: torch.Tensor
    position: torch.Tensor
    early: bool = False

    @property
    def splits(self) -> int:
        """Programs that share the keys of a head: as few as fill a GPU, each with a block of keys at least."""
        heads = self.batch * self.n_kv_heads
        most = min(_MOST_SPLITS, ceil_div(self.slots, self._block))

        def fill(splits: int) -> float:
            waves = heads * splits / _AT_ONCE
            return waves / math.ceil(waves)

        return next((splits for splits in range(1, most) if fill(splits) >= _FULL), most)

    def heads(self, q: Parts, k: Parts, v: Parts, slab: Slab) -> torch.Tensor:
        """Return queries (R, n_heads, head_dim), and write keys and values to the slots of the new tokens.

        Positions beyond the last slot go on from the first; no two tokens of a sequence may meet there.
        """
        rows = q.sums.shape[1]
        queries = torch.empty(rows, self.n_heads, self.head_dim, dtype=self.dtype, device=q.sums.device)
        constants = self.heads_constants(q.sums.shape[0], k.sums.shape[0], v.sums.shape[0], rows)
        arguments = (
            q.sums, k.sums, v.sums, q.bias, k.bias, v.bias,
            q.sums.stride(1), k.sums.stride(1), v.sums.stride(1), self.cosines, self.sines, self.position,
            queries, slab.keys, slab.values, slab.key_scales, slab.value_scales,
            self.slots, rows // self.batch,
        )  # fmt: skip
        heads = self.n_heads + 2 * self.n_kv_heads
        launch(step_kernels.heads_kernel, (rows * heads,), arguments, constants)
        return queries

    def heads_constants(self, q_splits: int, k_splits: int, v_splits: int, rows: int) -> dict[str, Any]:
        """Return the compile-time arguments of `heads_kernel`."""
        block = triton.next_power_of_2(self.head_dim)
        order = self.head_dim & -self.head_dim if self.groups else 1
        q_factor, k_factor = rotation_factors(order)
        return early(self.early and rows == self.batch) | {
            "Q_SPLITS": q_splits,
            "K_SPLITS": k_splits,
            "V_SPLITS": v_splits,
            "HEADS": self.n_heads,
            "KV_HEADS": self.n_kv_heads,
            "WIDTH": self.head_dim,
            "BLOCK": block,
            "ORDER": order,
            "STAGES": order.bit_length() - 1,
            "Q_FACTOR": q_factor,
            "K_FACTOR": k_factor,
            "BITS": self.bits,
            "GROUP": block if self.groups < 2 else self.head_dim // self.groups,
            "INTERPRET": INTERPRETED,
            "num_warps": 1,  # whose threads add and compare without a barrier
            "enable_fp_fusion": False,  # products and sums round apart, as in the operators
        }

    def attention(self, queries: torch.Tensor, slab: Slab) -> torch.Tensor:
        """Return softmax(q K^T / sqrt(head_dim)) V (B, n_heads * head_dim) over all keys up to the new token's."""
        constants, device = self.attention_constants(), queries.device
        kv_heads, shared = self.batch * self.n_kv_heads, self.n_heads // self.n_kv_heads
        sums = torch.empty(kv_heads, self.splits, shared, self.head_dim, device=device)
        stats = torch.empty(kv_heads, self.splits, 2, constants["ROWS"], device=device)
        arguments = (
            queries, self._words(slab.keys), self._words(slab.values), slab.key_scales, slab.value_scales,
            self.position, sums, stats, self.slots, 1 / math.sqrt(self.head_dim),
        )  # fmt: skip
        launch(attention_kernels.attention_kernel, (self.splits, kv_heads), arguments, constants)
        out = torch.empty(self.batch, self.n_heads * self.head_dim, dtype=self.dtype, device=device)
        combined = sums, stats, self.position, out, self.slots, self.splits
        launch(attention_kernels.combine_kernel, (shared, kv_heads), combined, self.combine_constants())
        return out

    def attention_constants(self) -> dict[str, Any]:
        """Return the compile-time arguments of `attention_kernel`."""
        per = self._word_bits // self.bits
        return early(self.early) | {
            "HEADS": self.n_heads // self.n_kv_heads,
            "ROWS": max(_TENSOR_CORES, triton.next_power_of_2(self.n_heads // self.n_kv_heads)),
            "WIDTH": self.head_dim,
            "BITS": self.bits,
            "PER": per,
            "WORDS": max(_TENSOR_CORES, triton.next_power_of_2(self.head_dim // per)),
            "GROUPS": self.groups,
            "BLOCK": self._block,
            "INTERPRET": INTERPRETED,
            "num_warps": 4,
            # scales of several groups take registers, and so do the addresses of narrow words
            "num_stages": 2 if self.groups > 1 or per == 2 else 3,
            "enable_fp_fusion": True,
        }

    def combine_constants(self) -> dict[str, Any]:
        """Return the compile-time arguments of `combine_kernel`."""
        chosen = self.attention_constants()
        return early(self.early) | {
            "HEADS": chosen["HEADS"],
            "ROWS": chosen["ROWS"],
            "WIDTH": self.head_dim,
            "BLOCK_WIDTH": triton.next_power_of_2(self.head_dim),
            "SPLITS": triton.next_power_of_2(self.splits),
            "BLOCK": chosen["BLOCK"],
            "INTERPRET": INTERPRETED,
            "num_warps": 4,
            "enable_fp_fusion": True,
        }

    @property
    def _block(self) -> int:
        """Keys that a program reads at once; fewer where more registers go to elements, scales or addresses."""
        keys = _BLOCK[self.bits] * _USUAL_HEAD // max(_USUAL_HEAD, triton.next_power_of_2(self.head_dim))
        crowded = self.groups > 1 or self.head_dim & (self.head_dim - 1)
        return keys // 2 if self.bits == 4 and crowded and self.head_dim <= _USUAL_HEAD else keys

    @property
    def _word_bits(self) -> int:
        """The widest word of which a head has enough for all warps, or the narrowest."""
        if self.bits == 16:
            return 16
        head_bits = self.head_dim * self.bits
        fitting = [bits for bits in _WORD_BITS if head_bits % bits == 0]
        enough = (bits for bits in fitting if triton.next_power_of_2(head_bits // bits) >= _WORDS_WANTED)
        return next(enough, fitting[-1])

    def _words(self, codes: torch.Tensor) -> torch.Tensor:
        return codes if self.bits == 16 else codes.view(_WORDS[self._word_bits])
