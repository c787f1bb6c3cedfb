"""The CPU kernels: weights repacked once, then multiplied without ever being dequantized in memory.

`layout.h` draws the bytes of a repacked matrix, `product.inl` holds the kernels, one source that is compiled for
each instruction set. `QUANTKIT_ISA` names one (`portable`, `avx2`, `avx512`, `avx512bf16`, `amx`) in place of the
best this machine has.

Factors are exact in float32, and for bfloat16 x too, with two exceptions: from `avx512bf16` on NF4's codebook is
rounded to bfloat16, at most 0.156% of a weight (`codebook.h`), and where integers are multiplied faster, as for one
row, x is taken as integers of blocks (`integer.inl`; `bytes.inl` and `isa_avx2.cpp` say how fine NF4's codebook is).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

# what every product looks up: torch's own dictionaries are in no cache between two of them
from torch import Tensor, get_num_threads, is_inference_mode_enabled
from torch._C import _len_torch_dispatch_stack
from torch.compiler import is_dynamo_compiling

from quantkit.errors import BackendError
from quantkit.quantize.nf4 import dynamic_map
from quantkit.schemes import QuantScheme
from quantkit.tensor import QuantizedTensor

PANEL_ROWS = 16  # rows that are packed together
MOST_HEAD_DIM = 256  # that attention takes
_HEAD_STEP = 16  # a head is a multiple of it
_BLOCK_COLS = 8
_HUGE_PAGE = 1 << 21  # bytes


@cache
def extension() -> ModuleType | None:
    """Return the compiled module, None where the package was installed without a compiler, or never.

    Raises:
        BackendError: `QUANTKIT_ISA` names what cannot run here.
    """
    try:  # after torch, whose OpenMP runtime it shares
        module = import_module("quantkit.kernels.native._native")
    except ModuleNotFoundError:
        return None
    try:
        module.isa()
    except ValueError as error:
        raise BackendError(str(error)) from None
    return module


@dataclass(frozen=True)
class PackedWeight:
    """A quantized (N, K) matrix in the layout of the CPU kernels.

    Attributes:
        data: uint8, the panels one after another.
        shape: (N, K).
        scheme: the precision.
        scale_dtype: of the scales as stored; uint8 where they are quantized in turn.
        nbytes: of the codes and scales as a checkpoint has them; `data` pads ragged rows and columns.
    """

    data: torch.Tensor
    shape: tuple[int, int]
    scheme: QuantScheme
    scale_dtype: torch.dtype
    nbytes: int

    @property
    def device(self) -> torch.device:
        return self.data.device

    @cached_property
    def layout(self) -> str:
        """What describes the bytes to the kernels, in one word: an operator passes it at little cost."""
        return _layout_name(self.scheme, self.shape, self.scale_dtype)

    @cached_property
    def kernel_layout(self) -> Any:
        """`layout` as the kernels take it."""
        return layout_of(self.layout)


def packs(scheme: QuantScheme, cols: int) -> bool:
    """Whether `pack` takes matrices of `cols` columns: a group is whole blocks of 8, or a whole row."""
    return scheme.group % _BLOCK_COLS == 0 or (scheme.method == "int" and scheme.group >= cols)


def fusable(weights: Sequence[QuantizedTensor]) -> bool:
    """Whether matrices can be packed below each other: one K, one scheme, whole panels."""
    first = weights[0]
    return packs(first.scheme, first.shape[1]) and (
        len(weights) == 1
        or all(
            weight.scheme == first.scheme
            and weight.scales.dtype == first.scales.dtype
            and weight.shape[1] == first.shape[1]
            and weight.shape[0] % PANEL_ROWS == 0
            for weight in weights
        )
    )


class Arena:
    """Memory for many packed matrices in huge pages: streaming 4 KiB pages would miss the TLB with each."""

    _CHUNK = 1 << 26  # bytes; what is never written takes no memory

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)

    def take(self, nbytes: int) -> torch.Tensor:
        """Return uint8 (nbytes,) of unset values that begins at a multiple of 64 bytes."""
        if nbytes > self._chunk.numel():
            size = max(self._CHUNK, nbytes) + _HUGE_PAGE
            whole = torch.empty(size, dtype=torch.uint8)
            self._chunk = whole[-whole.data_ptr() % _HUGE_PAGE :]
            require().advise_huge_pages(self._chunk, True)
        taken = self._chunk[:nbytes]
        self._chunk = self._chunk[-(-nbytes // 64) * 64 :]
        return taken

    def read_file(self, file: int, offset: int, nbytes: int) -> torch.Tensor:
        """Return uint8 (nbytes,) from an open file's descriptor; shorter where the file ends."""
        out = self.take(nbytes)
        return out[: require().read_file(file, offset, out, torch.get_num_threads())]


def pack(weights: Sequence[QuantizedTensor], arena: Arena | None = None) -> PackedWeight:
    """Repack one matrix, or several `fusable` ones below each other, with torch's number of threads.

    Args:
        weights: quantized alike.
        arena: where the result lies; None means by itself.

    Raises:
        BackendError: there is no extension, or it cannot take the matrices.
    """
    if not weights or not fusable(weights):
        raise BackendError("the native backend cannot take these matrices: see `fusable`")
    scheme, cols = weights[0].scheme, weights[0].shape[1]
    scale_dtype = weights[0].scales.dtype
    layouts = [layout_of(_layout_name(scheme, weight.shape, scale_dtype)) for weight in weights]
    data = (arena or Arena()).take(sum(layout.nbytes for layout in layouts))
    start = 0
    for weight, layout in zip(weights, layouts, strict=True):
        offset = weight.nested_offset
        layout.pack(
            codes=weight.codes,
            scales=weight.scales,
            zeros=weight.zeros,
            nested_scales=weight.nested_scales,
            nested_offset=0.0 if offset is None else float(offset),
            out=data[start : start + layout.nbytes],
            threads=torch.get_num_threads(),
        )
        start += layout.nbytes
    rows, nbytes = sum(weight.shape[0] for weight in weights), sum(weight.nbytes for weight in weights)
    return PackedWeight(data, (rows, cols), scheme, scale_dtype, nbytes)


def linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x @ W.T + bias for x (..., K), in x's dtype; float16 is computed in float32."""
    if _undispatched(x):
        return _multiply(x, weight.data, bias, weight.kernel_layout)
    return _PACKED_LINEAR(x, weight.data, bias, weight.shape[0], weight.layout)


def takes_plain(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `plain_linear` can run, and reads the matrix faster than torch: one or two rows of bfloat16."""
    return (
        x.dtype == weight.dtype == torch.bfloat16
        and x.device.type == weight.device.type == "cpu"
        and 0 < x.numel() <= 2 * x.shape[-1]
        and weight.is_contiguous()
        and extension() is not None
    )


def plain_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x @ W.T + bias for one or two rows x (..., K) and W (N, K), all bfloat16."""
    run = _plain_linear if _undispatched(x) else _PLAIN_LINEAR
    return run(x, weight, bias)


def takes_heads(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether `attention` runs heads of so many elements: bfloat16, on a CPU."""
    return (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and head_dim % _HEAD_STEP == 0
        and 0 < head_dim <= MOST_HEAD_DIM
        and extension() is not None
    )


def attention(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int | None = None
) -> torch.Tensor:
    """Return softmax(q K^T / sqrt(head_dim)) V, causal, like q; all bfloat16.

    Scores and sums are float32; what softmax gives is rounded to bfloat16 from `avx512bf16` on.

    Args:
        q: (B, T, n_heads, head_dim), the last T of S positions.
        keys: (B, n_kv_heads, S, head_dim); the last dimension is contiguous.
        values: likewise.
        window: keys that a query sees at most, itself among them; None for all before it.
    """
    return torch.ops.quantkit.attention(q, keys, values, keys.shape[2] if window is None else window)


def _layout_name(scheme: QuantScheme, shape: tuple[int, int], scale_dtype: torch.dtype) -> str:
    """Return kind, N, K, group, dtype of scales, and whether there are zero points."""
    kind = scheme.method if scheme.method == "nf4" else f"int{scheme.bits}"
    scale = str(scale_dtype).removeprefix("torch.")
    return f"{kind} {shape[0]} {shape[1]} {scheme.group or shape[1]} {scale} {int(not scheme.symmetric)}"


@cache
def layout_of(name: str) -> Any:
    """Return what `_layout_name` names, as the kernels take it."""
    kind, rows, cols, group, scale, zeros = name.split()
    values = dynamic_map() if scale == "uint8" else None
    return require().Layout(kind, int(rows), int(cols), int(group), scale, zeros == "1", values)


def require() -> ModuleType:
    """Return the compiled module.

    Raises:
        BackendError: there is none.
    """
    native = extension()
    if native is None:
        raise BackendError(
            "the native backend is not built: install quantkit where there is a C++ compiler (pip install -e .)"
        )
    return native


# An operator, so that torch.compile and tracing see one node where the kernel runs.
_LIBRARY = torch.library.Library("quantkit", "FRAGMENT")
_LIBRARY.define(
    "packed_linear(Tensor x, Tensor weight, Tensor? bias, int rows, str layout) -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
_LIBRARY.define("plain_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_PACKED_LINEAR = torch.ops.quantkit.packed_linear.default
_PLAIN_LINEAR = torch.ops.quantkit.plain_linear.default


def _undispatched(x: torch.Tensor) -> bool:
    """Whether nothing but the result of an operator matters: then its kernel is called without torch's dispatcher.

    Between products that read all of a model, instructions come from memory: with the dispatcher's, a product of 4096
    by 4096 would take a tenth longer.
    """
    return (
        not is_dynamo_compiling()
        and is_inference_mode_enabled()
        and type(x) is Tensor
        and _len_torch_dispatch_stack() == 0
    )


@torch.library.impl(_LIBRARY, "packed_linear", "CPU")
def _packed_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, rows: int, layout: str
) -> torch.Tensor:
    return _multiply(x, weight, bias, layout_of(layout))


def _multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, layout: Any) -> torch.Tensor:
    if x.dtype == torch.float16:
        return _multiply(x.float(), weight, bias, layout).half()
    if not x.is_contiguous():
        x = x.contiguous()
    if bias is not None:
        bias = bias.float()
    y: torch.Tensor = layout.multiply(weight, x, bias, get_num_threads())
    return y


@torch.library.register_fake("quantkit::packed_linear", lib=_LIBRARY)
def _packed_linear_fake(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, rows: int, layout: str
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], rows)


@torch.library.impl(_LIBRARY, "plain_linear", "CPU")
def _plain_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if not x.is_contiguous():
        x = x.contiguous()
    if bias is not None:
        bias = bias.float()
    y: torch.Tensor = require().multiply_plain(weight, x, bias, get_num_threads())
    return y


@torch.library.register_fake("quantkit::plain_linear", lib=_LIBRARY)
def _plain_linear_fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


_LIBRARY.define("attention(Tensor q, Tensor keys, Tensor values, int window) -> Tensor")


@torch.library.impl(_LIBRARY, "attention", "CPU")
def _attention(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int) -> torch.Tensor:
    q = q.contiguous()
    out = torch.empty_like(q)
    require().attend(q, keys, values, out, window, torch.get_num_threads())
    return out


@torch.library.register_fake("quantkit::attention", lib=_LIBRARY)
def _attention_fake(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int) -> torch.Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)
