"""The bytes of a matrix as the CUDA kernels read them. Plain torch on any device; imports no Triton.

The codes are int32 (tiles, N, 16): along K the matrix is cut into tiles of 16 words, and a tile of all rows lies
together. A word has two halves of 16 bits, and half h = 0..31 of a row's tile holds the tile's columns h, 32 + h,
64 + h, ...: a half of int4 and NF4 has 4 codes, one of int8 has 2. A row of a tile of int4, 64 bytes:

    word              0                            1            ...        15
    bits      31..28  ...  15..12  ... 3..0                                31..28 ... 3..0
    column      97    1     96      32   0      99 ... 3  98 ... 2          127   ...  30   of 128

    thread    0: words 0..3    1: words 4..7    2: 8..11    3: 12..15, then the next row

So a thread loads 16 bytes, its neighbour the next 16, a warp 8 rows; what one mask takes out of a word is a pair of
neighbouring columns in the two halves of a register, as the tensor cores take 16-bit values; and what it takes out of
all words of a row's tile are 32 neighbouring columns, which share a scale. The last tile is padded with zeros, which
meet no x.

Integer codes lie in their half from the lowest bits up. NF4's are looked up four at a time, the halves' in turns
(`unpack_ptx.py`): code i of half s is nibble 4 (i // 2) + 2 (i % 2) + s of its word.

Scales and zero points are transposed: what neighbouring rows have of one group lies together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from calculators.units import ceil_div
from quantkit.quantize.packing import unpack_low_first
from quantkit.schemes import QuantScheme
from quantkit.tensor import QuantizedTensor

TILE = 16  # words
SPAN = 32  # neighbouring columns, one of each half of a tile's words
_WORD_BITS, _HALF_BITS = 32, 16
_INDEX_LIMIT = 1 << 31  # kernels count elements in int32


@dataclass(frozen=True)
class Tiles:
    """A quantized (N, K) matrix in the layout above.

    Attributes:
        codes: int32 (tiles, N, 16).
        scales: (G, N), or as the checkpoint has them (blocks,) where blocks of NF4 run across rows.
        zeros: int32 (G, ceil(N / 8)), nibble n % 8 of row n; None where symmetric.
        nested_scales: as in QuantizedTensor.
        nested_offset: float32 (1,); None unless double-quantized.
        rows: N.
        cols: K.
        bits: of a code.
        group: columns that share a scale, 0 where all of a row do.
        nf4: codes index the codebook.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    nested_scales: torch.Tensor | None
    nested_offset: torch.Tensor | None
    rows: int
    cols: int
    bits: int
    group: int
    nf4: bool

    @property
    def kind(self) -> str:
        """`int8`, `int4`, `int4-asym` or `nf4`."""
        return "nf4" if self.nf4 else f"int{self.bits}" + ("" if self.zeros is None else "-asym")

    @property
    def tile_cols(self) -> int:
        return tile_cols(self.bits)

    @property
    def flat(self) -> bool:
        """Whether blocks run across rows."""
        return self.nf4 and self.cols % self.group != 0

    @property
    def spans(self) -> int:
        """Consecutive spans of a tile that share a scale; 1 where blocks run across rows."""
        per = self.tile_cols // SPAN
        if self.flat:
            return 1
        if self.group % self.tile_cols == 0:
            return per
        return self.group // SPAN if self.tile_cols % self.group == 0 else 1


def tile_cols(bits: int) -> int:
    """Return the columns of a tile."""
    return TILE * _WORD_BITS // bits


def takes(scheme: QuantScheme, shape: tuple[int, int]) -> bool:
    """Whether `tiles` takes a matrix: a group is whole spans or a whole row, and int32 counts the elements."""
    rows, cols = shape
    padded = rows * ceil_div(cols, tile_cols(scheme.bits)) * tile_cols(scheme.bits)
    return padded < _INDEX_LIMIT and (
        scheme.group % SPAN == 0 or (scheme.method == "int" and scheme.group >= cols)
    )


def tiles(weight: QuantizedTensor) -> Tiles:
    """Return a matrix that `takes` accepts in this layout, on its device."""
    (rows, cols), scheme = weight.shape, weight.scheme
    nf4 = scheme.method == "nf4"
    scales, zeros, group = weight.scales, weight.zeros, scheme.group
    if not nf4:
        scales = scales.T.contiguous()
        group = 0 if scales.shape[0] == 1 else group
    elif cols % group == 0:
        scales = scales.view(rows, -1).T.contiguous()
    offset = weight.nested_offset
    return Tiles(
        codes=_words(_codes(weight), scheme.bits, nf4),
        scales=scales,
        zeros=None if zeros is None else zeros.T.contiguous(),
        nested_scales=weight.nested_scales,
        nested_offset=None if offset is None else offset.reshape(1),
        rows=rows,
        cols=cols,
        bits=scheme.bits,
        group=group,
        nf4=nf4,
    )


def _codes(weight: QuantizedTensor) -> torch.Tensor:
    """Return the codes one by one: uint8 (N, K)."""
    rows, cols = weight.shape
    if weight.scheme.bits == 8:
        return weight.codes
    if weight.scheme.method == "nf4":
        pairs = torch.stack((weight.codes >> 4, weight.codes & 0xF), dim=-1)
        return pairs.view(-1)[: rows * cols].view(rows, cols)
    return unpack_low_first(weight.codes, cols)


def _words(codes: torch.Tensor, bits: int, nf4: bool) -> torch.Tensor:
    """Pack uint8 codes (N, K) into words (tiles, N, 16)."""
    rows, cols = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -cols % tile_cols(bits)))
    spans = padded.view(rows, -1, _HALF_BITS // bits, TILE, 2).transpose(0, 1)  # (tiles, N, PER, 16, 2)
    words = torch.zeros(spans.shape[0], rows, TILE, dtype=torch.int32, device=codes.device)
    for i in range(spans.shape[2]):
        for side in range(2):
            words |= spans[:, :, i, :, side].int() << (bits * place(bits, nf4, i, side))
    return words


def place(bits: int, nf4: bool, i: int, side: int) -> int:
    """Return which code of a word, counted from the lowest bits, is code `i` of its half `side`."""
    return 4 * (i // 2) + 2 * (i % 2) + side if nf4 else side * (_HALF_BITS // bits) + i


def below_each_other(parts: list[Tiles]) -> Tiles:
    """Return matrices of one K that were quantized alike as one; their scales belong to whole rows."""
    first = parts[0]
    zeros = [part.zeros for part in parts if part.zeros is not None]
    return Tiles(
        codes=torch.cat([part.codes for part in parts], dim=1),
        scales=torch.cat([part.scales for part in parts], dim=1),
        zeros=torch.cat(zeros, dim=1) if zeros else None,
        nested_scales=None,
        nested_offset=None,
        rows=sum(part.rows for part in parts),
        cols=first.cols,
        bits=first.bits,
        group=first.group,
        nf4=first.nf4,
    )
