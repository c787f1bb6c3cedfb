"""The CPU kernels: weights repacked once, then multiplied without ever being dequantized in memory.

`layout.h` draws the bytes of a repacked matrix, `product.inl` holds the kernels, one source that is compiled for
each instruction set. `QUANTKIT_ISA` names one (`portable`, `avx2`, `avx512`, `avx512bf16`) in place of the best
this machine has.

Factors are exact in float32, and for bfloat16 x too, with one exception: with `avx512bf16` NF4's codebook is
rounded to bfloat16, at most 0.156% of a weight (`codebook.h`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch

from calculators.units import ceil_div
from quantkit.errors import BackendError
from quantkit.quantize.nf4 import dynamic_map
from quantkit.schemes import QuantScheme
from quantkit.tensor import QuantizedTensor

PANEL_ROWS = 16  # rows that are packed together
_BLOCK_COLS = 8


@lru_cache
def extension() -> ModuleType | None:
    """Return the compiled module, None where the package was installed without a compiler, or never."""
    try:
        from quantkit.kernels.native import _native  # after torch, whose OpenMP runtime it shares
    except ImportError:
        return None
    return _native


@dataclass(frozen=True)
class PackedWeight:
    """A quantized (N, K) matrix in the layout of the CPU kernels.

    Attributes:
        data: uint8, the panels one after another.
        shape: (N, K).
        scheme: the precision.
        scale_dtype: of the scales as stored; uint8 where they are quantized in turn.
    """

    data: torch.Tensor
    shape: tuple[int, int]
    scheme: QuantScheme
    scale_dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and padding."""
        return self.data.nbytes

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def layout(self) -> tuple[str, int, int, int, str, bool]:
        """What describes the bytes to the kernels: kind, N, K, group, dtype of scales, zero points."""
        return _layout_key(self.scheme, self.shape, self.scale_dtype)


def takes(weight: QuantizedTensor) -> bool:
    """Whether the kernels can run this matrix: groups are whole blocks of 8 columns, or whole rows."""
    scheme = weight.scheme
    return scheme.group % _BLOCK_COLS == 0 or (scheme.method == "int" and scheme.group >= weight.shape[1])


def fusable(weights: Sequence[QuantizedTensor]) -> bool:
    """Whether matrices of one K can be packed into one, below each other."""
    first = weights[0]
    return all(
        takes(weight)
        and weight.scheme == first.scheme
        and weight.scales.dtype == first.scales.dtype
        and weight.shape[1] == first.shape[1]
        and weight.shape[0] % PANEL_ROWS == 0
        for weight in weights
    )


def pack(weights: Sequence[QuantizedTensor]) -> PackedWeight:
    """Repack one matrix, or several `fusable` ones below each other, with torch's number of threads.

    Raises:
        BackendError: there is no extension, or it cannot take the matrices.
    """
    native = _required()
    if not weights or not (takes(weights[0]) if len(weights) == 1 else fusable(weights)):
        raise BackendError("the native backend cannot take these matrices: groups must be multiples of 8")
    scheme, cols = weights[0].scheme, weights[0].shape[1]
    scale_dtype = weights[0].scales.dtype
    layouts = [_layout(*_layout_key(scheme, weight.shape, scale_dtype)) for weight in weights]
    data = torch.empty(sum(layout.nbytes for layout in layouts), dtype=torch.uint8)
    start = 0
    for weight, layout in zip(weights, layouts, strict=True):
        offset = weight.nested_offset
        native.pack(
            layout,
            codes=weight.codes,
            scales=weight.scales,
            zeros=weight.zeros,
            nested_scales=weight.nested_scales,
            nested_offset=0.0 if offset is None else float(offset),
            map=dynamic_map() if scheme.nested else None,
            out=data[start : start + layout.nbytes],
            threads=torch.get_num_threads(),
        )
        start += layout.nbytes
    return PackedWeight(data, (sum(weight.shape[0] for weight in weights), cols), scheme, scale_dtype)


def linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x @ W.T + bias for x (..., K), in x's dtype; float16 is computed in float32."""
    return torch.ops.quantkit.packed_linear(x, weight.data, bias, *weight.layout)


def _layout_key(
    scheme: QuantScheme, shape: tuple[int, int], scale_dtype: torch.dtype
) -> tuple[str, int, int, int, str, bool]:
    kind = scheme.method if scheme.method == "nf4" else f"int{scheme.bits}"
    return kind, *shape, scheme.group or shape[1], str(scale_dtype).removeprefix("torch."), not scheme.symmetric


@lru_cache(maxsize=None)
def _layout(kind: str, rows: int, cols: int, group: int, scale: str, zeros: bool) -> Any:
    return _required().Layout(kind, rows, cols, group, scale, zeros)


def _required() -> ModuleType:
    native = extension()
    if native is None:
        raise BackendError(
            "the native backend is not built: install quantkit where there is a C++ compiler (pip install -e .)"
        )
    return native


# An operator, so that torch.compile and tracing see one node where the kernel runs.
_LIBRARY = torch.library.Library("quantkit", "FRAGMENT")
_LIBRARY.define(
    "packed_linear(Tensor x, Tensor weight, Tensor? bias, str kind, int rows, int cols, int group, str scale, "
    "bool zeros) -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order,),
)


@torch.library.impl(_LIBRARY, "packed_linear", "CPU")
def _packed_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    kind: str,
    rows: int,
    cols: int,
    group: int,
    scale: str,
    zeros: bool,
) -> torch.Tensor:
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    if x.dtype == torch.float16:
        flat = flat.float()
    out = torch.empty(flat.shape[0], rows, dtype=flat.dtype)
    _required().multiply(
        _layout(kind, rows, cols, group, scale, zeros),
        weight,
        flat,
        out,
        None if bias is None else bias.float(),
        dynamic_map() if scale == "uint8" else None,
        torch.get_num_threads(),
    )
    return out.to(x.dtype).view(*x.shape[:-1], rows)


@torch.library.register_fake("quantkit::packed_linear", lib=_LIBRARY)
def _packed_linear_fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    kind: str,
    rows: int,
    cols: int,
    group: int,
    scale: str,
    zeros: bool,
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], rows)
