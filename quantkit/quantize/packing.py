"""All bit layouts, each with its bytes drawn.

int4, compressed-tensors `pack-quantized`, least significant first (a row of K elements):

    byte     0         1              int32 word 0 (little endian)
    bits  7..4 3..0  7..4 3..0    31..28  ...  7..4  3..0
    elem    1    0     3    2        7    ...    1     0

    A nibble holds q + 8, so codes are 0..15. Seen as bytes the words are the same memory:
    canonical codes are (N, ceil(K / 2)) uint8, and a file's (N, ceil(K / 8)) int32 pads with zeros.

int8: one byte an element holding q + 128, four to a word.

Zero points (asymmetric): the same nibbles, but packed down the rows: word (n // 8, g), nibble n % 8.

NF4, bitsandbytes: the flattened matrix, two elements a byte, **the high nibble is the even element**:

    byte     0         1
    bits  7..4 3..0  7..4 3..0
    elem    0    1     2    3

    An odd tail is padded with nibble 7, the code of 0.
"""

from __future__ import annotations

import torch

NF4_ZERO_CODE = 7
ZEROS_PER_WORD = 8
_WORD_BYTES = 4


def pack_low_first(codes: torch.Tensor) -> torch.Tensor:
    """Pack uint8 codes 0..15 of shape (..., K) into (..., ceil(K / 2)), the even element low."""
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def unpack_low_first(packed: torch.Tensor, cols: int) -> torch.Tensor:
    """Undo `pack_low_first`: (..., ceil(cols / 2)) bytes to (..., cols) uint8 codes."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)[..., :cols]


def pack_high_first(codes: torch.Tensor) -> torch.Tensor:
    """Pack flat uint8 codes (n,) into (ceil(n / 2),), the even element in the high nibble."""
    if codes.numel() % 2:
        codes = torch.nn.functional.pad(codes, (0, 1), value=NF4_ZERO_CODE)
    return (codes[::2] << 4) | codes[1::2]


def to_words(rows: torch.Tensor) -> torch.Tensor:
    """View uint8 rows (N, b) as int32 words (N, ceil(b / 4)); a ragged end is padded with zero bytes."""
    short = -rows.shape[1] % _WORD_BYTES
    if short:
        rows = torch.nn.functional.pad(rows, (0, short))
    return rows.reshape(-1).view(torch.int32).view(rows.shape[0], -1)  # a single row's stride may be any


def from_words(words: torch.Tensor, row_bytes: int) -> torch.Tensor:
    """View int32 words (N, w) as uint8 rows (N, row_bytes); no copy unless the end is ragged."""
    return words.view(torch.uint8)[:, :row_bytes].contiguous()


def pack_zeros(zeros: torch.Tensor) -> torch.Tensor:
    """Pack uint8 zero points (N, G) of 4 bits down the rows into int32 (ceil(N / 8), G)."""
    packed = to_words(pack_low_first(zeros.T.contiguous()))  # (G, ceil(N / 8))
    return packed.T.contiguous()


def unpack_zeros(words: torch.Tensor, rows: int) -> torch.Tensor:
    """Undo `pack_zeros`: int32 (ceil(N / 8), G) to uint8 (N, G)."""
    columns = words.T.reshape(-1).view(torch.uint8).view(words.shape[1], -1)  # (G, 4 * ceil(N / 8))
    return unpack_low_first(columns, rows).T.contiguous()
