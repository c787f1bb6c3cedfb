"""What multiplies by the same codes and scales on a GPU: quantkit's kernels, torch's, bitsandbytes'.

W (N, K). Each builder raises where its package cannot take the matrix; who measures records the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch

from quantkit.bench.contenders import Contender, rotating, torch_int8
from quantkit.bench.cuda.results import BITSANDBYTES, DEQUANTIZE
from quantkit.bench.results import BF16, OURS
from quantkit.kernels import ops, reference, triton
from quantkit.kernels.triton import TiledWeight
from quantkit.quantize.nf4 import NF4_CODEBOOK, dynamic_map_on
from quantkit.schemes import NESTED_GROUP
from quantkit.tensor import QuantizedTensor

INT4, INT8 = "torch int4pack", "torch int8pack"
_INT4_GROUPS = (32, 64, 128, 256)
_INNER_TILES = 8  # of `_weight_int4pack_mm`'s packing, as torchao chooses it


def builders(weight: QuantizedTensor, backend: str, away_bytes: int) -> dict[str, Callable[[], Contender]]:
    """Return what makes each contender for a matrix, by name.

    Args:
        weight: the matrix.
        backend: what runs quantkit's.
        away_bytes: what each one's copies take together at least.
    """

    def prepared() -> ops.Prepared:
        return ops.prepare(weight, backend)

    plain = reference.dequantize(weight, torch.bfloat16)
    found: dict[str, Callable[[], Contender]] = {
        OURS: lambda: rotating(prepared, away_bytes, ops.linear),
        BF16: lambda: rotating(plain.clone, away_bytes, torch.nn.functional.linear),
        DEQUANTIZE: lambda: rotating(prepared, away_bytes, _dequantize_and_multiply),
    }
    scheme = weight.scheme
    if scheme.method == "nf4" and find_spec("bitsandbytes"):
        found[BITSANDBYTES] = lambda: _bitsandbytes(weight, away_bytes)
    if scheme.method == "int" and scheme.symmetric and scheme.bits == 8:
        found[INT8] = lambda: torch_int8(weight, away_bytes)
    if scheme.method == "int" and scheme.symmetric and scheme.bits == 4 and scheme.group in _INT4_GROUPS:
        found[INT4] = lambda: _torch_int4(weight, away_bytes)
    return found


def dequantize(weight: ops.Prepared, dtype: torch.dtype) -> torch.Tensor:
    """Return a matrix that was prepared for CUDA or for the reference as plain (N, K)."""
    if isinstance(weight, TiledWeight):
        launch = triton.launcher()
        assert launch is not None  # or nothing would have tiled it
        plain: torch.Tensor = launch.dequantize(weight.tiles, dtype)
        return plain
    assert isinstance(weight, QuantizedTensor)
    return reference.dequantize(weight, dtype)


def _dequantize_and_multiply(x: torch.Tensor, weight: ops.Prepared) -> torch.Tensor:
    return torch.nn.functional.linear(x, dequantize(weight, x.dtype))


def _torch_int4(weight: QuantizedTensor, away_bytes: int) -> Contender:
    """Return torch's tinygemm, which is torchao's int4, too."""
    group = weight.scheme.group
    swapped = (weight.codes << 4) | (weight.codes >> 4)  # it has the even column in the high nibble
    packed = torch.ops.aten._convert_weight_to_int4pack(swapped, _INNER_TILES)
    scales = weight.scales.T.contiguous()  # (K / group, N)
    scales_and_zeros = torch.stack((scales, torch.zeros_like(scales)), dim=-1)

    def multiply(x: torch.Tensor, copy: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten._weight_int4pack_mm(x, copy, group, scales_and_zeros)

    return rotating(packed.clone, away_bytes, multiply)


def _bitsandbytes(weight: QuantizedTensor, away_bytes: int) -> Contender:
    """Return its NF4 as its Linear4bit runs it, scales quantized where they are here."""
    import bitsandbytes
    from bitsandbytes import functional

    nested = None
    if weight.nested_scales is not None:
        nested = functional.QuantState(
            absmax=weight.nested_scales,
            code=dynamic_map_on(weight.device),
            blocksize=NESTED_GROUP,
            dtype=torch.float32,
        )
    state = functional.QuantState(
        absmax=weight.scales,
        shape=torch.Size(weight.shape),
        code=torch.tensor(NF4_CODEBOOK, device=weight.device),
        blocksize=weight.scheme.group,
        quant_type="nf4",
        dtype=torch.bfloat16,
        offset=weight.nested_offset,
        state2=nested,
    )

    def multiply(x: torch.Tensor, copy: torch.Tensor) -> torch.Tensor:
        return bitsandbytes.matmul_4bit(x, copy.t(), state)

    return rotating(weight.codes.view(-1, 1).clone, away_bytes, multiply)
