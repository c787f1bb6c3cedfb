"""What a precision loses of a matrix: the signal-to-quantization-noise ratio, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from quantkit.kernels.reference import dequantize
from quantkit.quantize import native
from quantkit.quantize.nf4 import dequantize_scales
from quantkit.quantize.packing import ZEROS_PER_WORD
from quantkit.schemes import nf4_scheme
from quantkit.tensor import QuantizedTensor

_CHUNK_ELEMENTS = 1 << 20


def sqnr_db(weight: torch.Tensor, stored: torch.Tensor | QuantizedTensor) -> float:
    """Return 10 * log10(sum w**2 / sum (w - restored)**2) in dB; infinite where nothing is lost.

    Args:
        weight: the original, any float dtype.
        stored: the same shape, cast or quantized.
    """
    if isinstance(stored, QuantizedTensor) and native.handles(weight):
        signal, noise = native.squares(weight, stored)
    else:
        signal, noise = squares(weight, stored)
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def squares(weight: torch.Tensor, stored: torch.Tensor | QuantizedTensor) -> tuple[float, float]:
    """Return sum w**2 and sum (w - restored)**2, in float64."""
    signal = noise = 0.0
    for original, restored in _chunks(weight, stored):
        exact = original.double()
        signal += exact.square().sum().item()
        noise += exact.sub_(restored).square_().sum().item()
    return signal, noise


def _chunks(
    weight: torch.Tensor, stored: torch.Tensor | QuantizedTensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield pieces of the original and what is restored of them, in the same shape."""
    if not isinstance(stored, QuantizedTensor):
        yield from zip(
            weight.reshape(-1).split(_CHUNK_ELEMENTS), stored.reshape(-1).split(_CHUNK_ELEMENTS), strict=True
        )
        return
    if stored.scheme.method == "nf4":
        yield from _nf4_chunks(weight.reshape(-1), stored)
        return
    rows, cols = stored.shape
    step = max(ZEROS_PER_WORD, _CHUNK_ELEMENTS // cols // ZEROS_PER_WORD * ZEROS_PER_WORD)
    for start in range(0, rows, step):
        piece = slice(start, start + step)
        words = slice(start // ZEROS_PER_WORD, (start + step) // ZEROS_PER_WORD)
        zeros = None if stored.zeros is None else stored.zeros[words]
        shape = (min(step, rows - start), cols)
        yield (
            weight[piece],
            dequantize(
                QuantizedTensor(stored.scheme, shape, stored.codes[piece], stored.scales[piece], zeros=zeros)
            ),
        )


def _nf4_chunks(flat: torch.Tensor, stored: QuantizedTensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Cut the flattened matrix between blocks; an even block starts on a whole byte."""
    block = stored.scheme.group
    plain = nf4_scheme(block)
    absmax = dequantize_scales(stored)
    step = max(1, _CHUNK_ELEMENTS // block)
    for start in range(0, absmax.numel(), step):
        original = flat[start * block : (start + step) * block]
        codes = stored.codes[start * block // 2 : (start + step) * block // 2]
        scales = absmax[start : start + step]
        yield original, dequantize(QuantizedTensor(plain, (1, original.numel()), codes, scales)).view(-1)
