"""Sizes and tokens as people write them; GiB is not GB."""

from __future__ import annotations

import pytest

from calculators.units import (
    GB,
    GIB,
    bits_to_bytes,
    ceil_div,
    format_bytes,
    format_gib,
    format_tokens,
    is_decimal_unit,
    parse_size,
    parse_tokens,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * 2**30),
        ("24GB", 24 * 10**9),
        ("24 gib", 24 * 2**30),
        ("0.5GiB", 2**29),
        ("512MiB", 2**29),
        ("1KB", 1000),
    ],
)
def test_a_size_names_its_unit(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("24", "24GiB"),
        ("", "not a size"),
        ("-1GiB", "not a size"),
        ("0GiB", "above zero"),
        ("3GX", "unknown unit"),
    ],
)
def test_a_size_without_sense_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_size(text)


def test_gib_and_gb_differ_by_seven_percent() -> None:
    assert pytest.approx(1.074, abs=5e-4) == GIB / GB
    assert is_decimal_unit("24GB")
    assert not is_decimal_unit("24GiB")


@pytest.mark.parametrize(("text", "tokens"), [("32k", 32768), ("32K", 32768), ("1000", 1000), (" 4k ", 4096)])
def test_k_is_1024_tokens(text: str, tokens: int) -> None:
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["0", "-1", "1.5k", "32kk", "k", ""])
def test_what_is_no_count_of_tokens_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no count of tokens"):
        parse_tokens(text)


def test_bits_round_up_once() -> None:
    assert [bits_to_bytes(bits) for bits in (0, 1, 8, 9)] == [0, 1, 1, 2]
    assert ceil_div(7, 2) == 4


def test_printing() -> None:
    assert format_tokens(32768) == "32k"
    assert format_tokens(1000) == "1000"
    assert format_bytes(14_483_464_192) == "13.49 GiB"
    assert format_bytes(2**20) == "1.00 MiB"
    assert format_bytes(512) == "512 B"
    assert format_gib(2**30) == "1.00"
