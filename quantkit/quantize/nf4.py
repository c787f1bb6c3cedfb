"""NF4 and its double quantization, bit for bit as bitsandbytes stores them.

Source: `bitsandbytes/backends/default/ops.py` (4-bit) and `csrc/cpu_ops.cpp` (the 8-bit scales);
QLoRA, https://arxiv.org/abs/2305.14314, section 3.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from calculators.units import bits_to_bytes, ceil_div
from quantkit.quantize.packing import pack_high_first
from quantkit.quantize.tables import Table
from quantkit.schemes import NESTED_GROUP, QuantScheme
from quantkit.tensor import QuantizedTensor

# Quantiles of a normal distribution, scaled to [-1, 1], with an exact zero (QLoRA, appendix E).
NF4_CODEBOOK = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

_SMALLEST_DIVISOR = 1e-38  # an all-zero block divides by this and encodes zeros
_CHUNK_BLOCKS = 1 << 14
_LUT_SIZE = 1 << 16


def quantize_nf4(weight: torch.Tensor, scheme: QuantScheme) -> QuantizedTensor:
    """Quantize a (N, K) matrix of any float dtype to NF4; blocks run over the flattened matrix."""
    rows, cols = weight.shape
    flat = weight.reshape(-1)
    step = _CHUNK_BLOCKS * scheme.group
    codes = torch.empty(bits_to_bytes(flat.numel() * scheme.bits), dtype=torch.uint8)
    absmax = torch.empty(ceil_div(flat.numel(), scheme.group), dtype=torch.float32)
    for start in range(0, flat.numel(), step):
        block = start // scheme.group
        chunk, chunk_absmax = _encode(flat[start : start + step].float(), scheme.group)
        codes[start // 2 : (start + step) // 2] = pack_high_first(chunk)
        absmax[block : block + _CHUNK_BLOCKS] = chunk_absmax
    return with_absmax(scheme, (rows, cols), codes, absmax)


def with_absmax(
    scheme: QuantScheme, shape: tuple[int, int], codes: torch.Tensor, absmax: torch.Tensor
) -> QuantizedTensor:
    """Return packed codes with each block's float32 absmax as the scheme stores it: as it is, or quantized in turn."""
    if not scheme.nested:
        return QuantizedTensor(scheme, shape, codes, absmax)
    offset = absmax.mean()
    scales, nested_scales = _quantize_scales(absmax - offset)
    return QuantizedTensor(scheme, shape, codes, scales, nested_scales=nested_scales, nested_offset=offset)


def dequantize_scales(tensor: QuantizedTensor, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """Return the float32 absmax of the blocks `start` to `stop` of an NF4 matrix, undoing double quantization.

    `start` is a multiple of 256, the blocks that share a nested scale.
    """
    if tensor.nested_scales is None or tensor.nested_offset is None:
        return tensor.scales[start:stop]
    codes = tensor.scales[start:stop].int()
    values = torch.index_select(dynamic_map_on(tensor.device), 0, codes)
    nested = tensor.nested_scales[start // NESTED_GROUP :]
    whole = values.numel() // NESTED_GROUP
    values[: whole * NESTED_GROUP].view(whole, NESTED_GROUP).mul_(nested[:whole, None])
    if whole * NESTED_GROUP < values.numel():
        values[whole * NESTED_GROUP :].mul_(nested[whole])
    return values.add_(tensor.nested_offset)


def _encode(flat: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return uint8 codes (n,) and float32 absmax (ceil(n / block),) of flat float32 values.

    A short last block divides by its absmax where whole blocks multiply by the reciprocal, and
    stores the clamped divisor: bitsandbytes does, and a bit of a code may hang on it.
    """
    whole = flat.numel() // block * block
    blocks, tail = flat[:whole].view(-1, block), flat[whole:]
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / absmax.clamp(min=_SMALLEST_DIVISOR))[:, None]).flatten()
    if tail.numel():
        divisor = tail.abs().amax().clamp(min=_SMALLEST_DIVISOR)
        absmax = torch.cat((absmax, divisor[None]))
        scaled = torch.cat((scaled, tail / divisor))
    codes = torch.bucketize(scaled, _midpoints(), out_int32=True)  # counts the midpoints below a value
    return codes.to(torch.uint8), absmax


@lru_cache
def _midpoints() -> torch.Tensor:
    codebook = torch.tensor(NF4_CODEBOOK)
    return (codebook[:-1] + codebook[1:]) / 2


def _quantize_scales(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize centred scales (n,) to uint8 codes of the dynamic map, in blocks of 256.

    Returns the codes (n,) and each block's float32 absmax (ceil(n / 256),). The nearest entry is
    looked up on a grid of 2**16 points, as bitsandbytes does on CPU: within half a step of the
    grid of the midpoint between two entries the neighbour is taken.
    """
    count = values.numel()
    blocks = torch.nn.functional.pad(values, (0, -count % NESTED_GROUP)).view(-1, NESTED_GROUP)
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / absmax)[:, None]).clamp(-1.0, 1.0)
    point = (scaled + 1.0) * 0.5 * (_LUT_SIZE - 1) + 0.5
    codes = _nearest_on_grid()[point.nan_to_num(0.0).long()]  # 0 * (1 / 0): an all-zero block encodes 0
    return codes.flatten()[:count], absmax


@lru_cache
def _nearest_on_grid() -> torch.Tensor:
    """Return the uint8 code of the dynamic map nearest to each of 2**16 points of [-1, 1]."""
    table = dynamic_map()
    grid = -1.0 + torch.arange(_LUT_SIZE, dtype=torch.float32) * 2.0 / (_LUT_SIZE - 1)
    return torch.bucketize(grid, 0.5 * (table[:-1] + table[1:])).to(torch.uint8)


@lru_cache
def dynamic_map() -> torch.Tensor:
    """Return the 256 sorted float32 values of the signed 8-bit dynamic data type.

    Seven decades; decade i splits [0.1, 1] evenly into 2**i steps and keeps their centres, for
    both signs; 0 and 1 complete it (8-bit Optimizers, https://arxiv.org/abs/2110.02861, section 1.3).
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        centres = 10 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2.0)
        values += centres.tolist() + (-centres).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


@Table
def dynamic_map_on(device: torch.device) -> torch.Tensor:
    """Return `dynamic_map` on a device, where it is made once."""
    return dynamic_map().to(device)
