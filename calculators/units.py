"""Bytes, tokens and how people write them.

GiB is 2**30 bytes, GB is 10**9: they differ by 7.4%, so a size must name its unit.
"""

from __future__ import annotations

import re

KIB, MIB, GIB = 2**10, 2**20, 2**30
KB, MB, GB = 10**3, 10**6, 10**9

_UNITS = {"KiB": KIB, "MiB": MIB, "GiB": GIB, "KB": KB, "MB": MB, "GB": GB}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")
_TOKENS = re.compile(r"\s*([0-9]+)\s*([kK]?)\s*")


def ceil_div(numerator: int, denominator: int) -> int:
    """Return `numerator / denominator` rounded up."""
    return -(-numerator // denominator)


def bits_to_bytes(bits: int) -> int:
    """Return the whole bytes that `bits` take."""
    return ceil_div(bits, 8)


def parse_size(text: str) -> int:
    """Return the bytes that `text` names, such as `24GiB`, `24GB` or `512 MiB`.

    Raises:
        ValueError: no number, no unit, an unknown unit, or a size of zero.
    """
    match = _SIZE.fullmatch(text)
    if not match:
        raise ValueError(f"{text!r} is not a size: write a number and a unit, such as 24GiB")
    number, unit = match.groups()
    if not unit:
        raise ValueError(f"{text!r} has no unit: write {number}GiB (2**30) or {number}GB (10**9)")
    scale = {name.lower(): size for name, size in _UNITS.items()}.get(unit.lower())
    if scale is None:
        raise ValueError(f"{text!r} has an unknown unit {unit!r}: use one of {', '.join(_UNITS)}")
    size = int(float(number) * scale)
    if size <= 0:
        raise ValueError(f"{text!r} is no size: it must be above zero")
    return size


def is_decimal_unit(text: str) -> bool:
    """Tell whether `text` is a size in powers of ten (`24GB`) rather than of two (`24GiB`)."""
    return re.search(r"[kmg]b\s*$", text, re.IGNORECASE) is not None


def parse_tokens(text: str) -> int:
    """Return the tokens that `text` names: `4096`, or `32k` for 32 * 1024.

    Raises:
        ValueError: not a positive whole number.
    """
    match = _TOKENS.fullmatch(text)
    if not match or int(match.group(1)) == 0:
        raise ValueError(f"{text!r} is no count of tokens: write 4096, or 4k for 4 x 1024")
    number, suffix = match.groups()
    return int(number) * (1024 if suffix else 1)


def format_tokens(tokens: int) -> str:
    """Return `32k` for 32768, and the plain number where 1024 does not divide it."""
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def format_bytes(size: int) -> str:
    """Return `size` in bytes with the binary unit that suits it, such as `13.49 GiB`."""
    for name, unit in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(size) >= unit:
            return f"{size / unit:,.2f} {name}"
    return f"{size} B"


def format_gib(size: int) -> str:
    """Return `size` in GiB with two digits and no unit, for the cells of a table."""
    return f"{size / GIB:.2f}"
