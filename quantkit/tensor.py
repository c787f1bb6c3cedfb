"""QuantizedTensor: one weight matrix as codes and scales."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from calculators.units import ceil_div
from quantkit.schemes import NESTED_GROUP, QuantScheme


@dataclass(frozen=True)
class QuantizedTensor:
    """A quantized (N, K) matrix in canonical layout; `quantize/packing.py` draws the bytes.

    Attributes:
        scheme: the precision.
        shape: (N, K).
        codes: uint8. Integer schemes: (N, ceil(K * bits / 8)), offset binary, the low nibble first.
            NF4: (ceil(N * K / 2),), the flattened matrix, the high nibble first.
        scales: integer schemes (N, G) in the checkpoint's dtype; NF4 float32 (blocks,);
            NF4 double-quantized uint8 (blocks,).
        zeros: int32 (ceil(N * bits / 32), G), zero points packed down the rows; None where symmetric.
        nested_scales: float32 (ceil(blocks / 256),); None unless double-quantized.
        nested_offset: float32 scalar, the mean taken off the scales; None unless double-quantized.
    """

    scheme: QuantScheme
    shape: tuple[int, int]
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None
    nested_scales: torch.Tensor | None = None
    nested_offset: torch.Tensor | None = None

    def parts(self) -> dict[str, torch.Tensor]:
        """Return the tensors this matrix is made of, by field name."""
        found = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in found if isinstance(value, torch.Tensor)}

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales; constant code tables exist once and are not counted."""
        return sum(part.nbytes for part in self.parts().values())

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """Return this matrix with every part on `device`."""
        moved = {name: part.to(device) for name, part in self.parts().items()}
        return QuantizedTensor(self.scheme, self.shape, **moved)


def empty_quantized(
    shape: tuple[int, ...], scheme: QuantScheme, scale_dtype: torch.dtype, device: torch.device | str
) -> QuantizedTensor:
    """Return a quantized (N, K) matrix whose parts have their shapes and no values yet.

    Args:
        shape: (N, K).
        scheme: the precision.
        scale_dtype: dtype of integer scales; NF4 has its own.
        device: where it lies, `meta` included.
    """

    def empty(part: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(part, dtype=dtype, device=device)

    rows, cols = shape
    if scheme.method == "nf4":
        blocks = ceil_div(rows * cols, scheme.group)
        return QuantizedTensor(
            scheme,
            (rows, cols),
            codes=empty((ceil_div(rows * cols, 2),), torch.uint8),
            scales=empty((blocks,), torch.uint8 if scheme.nested else torch.float32),
            nested_scales=empty((ceil_div(blocks, NESTED_GROUP),), torch.float32) if scheme.nested else None,
            nested_offset=empty((), torch.float32) if scheme.nested else None,
        )
    groups = ceil_div(cols, scheme.group or cols)
    return QuantizedTensor(
        scheme,
        (rows, cols),
        codes=empty((rows, ceil_div(cols * scheme.bits, 8)), torch.uint8),
        scales=empty((rows, groups), scale_dtype),
        zeros=None if scheme.symmetric else empty((ceil_div(rows * scheme.bits, 32), groups), torch.int32),
    )
