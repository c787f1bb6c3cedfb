"""Verdicts and solvers."""

from __future__ import annotations

import pytest

from calculators.fit import (
    ERROR_BAND,
    band_bytes,
    decode_ceiling,
    longest,
    smallest_card,
    verdict,
)
from calculators.hardware import GPUS
from calculators.units import GIB


@pytest.mark.parametrize(
    ("needed", "memory", "reserve", "word"),
    [
        (1000, 1030, 0, "fits"),
        (1000, 1029, 0, "tight"),
        (1000, 1000, 0, "tight"),
        (1000, 999, 0, "no"),
        (1000, 1130, 100, "fits"),
        (1000, 1130, 101, "tight"),
        (1000, 1130, 131, "no"),
        (24 * GIB, 24 * GIB - 1, 0, "no"),
    ],
)
def test_a_verdict_is_tight_inside_the_error_band(needed: int, memory: int, reserve: int, word: str) -> None:
    found = verdict(needed, memory, reserve)
    assert found.word == word
    assert found.fits == (word != "no")
    assert found.margin_bytes == memory - reserve - needed


def test_the_band_is_rounded_up() -> None:
    assert ERROR_BAND == 0.03
    assert [band_bytes(needed) for needed in (0, 1, 100, 101)] == [0, 1, 3, 4]


@pytest.mark.parametrize("start", [1, 7, 1000, 5000])
@pytest.mark.parametrize("limit", [0, 1, 2, 3, 1000])
def test_the_longest_is_found(limit: int, start: int) -> None:
    for most in (0, 1, 2, 3, 6, 7, 8, 500, 998, 999, 1000, 5000):
        asked: list[int] = []

        def fits(n: int, most: int = most, asked: list[int] = asked) -> bool:
            asked.append(n)
            return n <= most

        assert longest(fits, limit, start) == min(most, limit)
        assert len(asked) == len(set(asked))
        assert all(1 <= n <= limit for n in asked)


def test_few_are_tried() -> None:
    asked: list[int] = []

    def at_most(most: int) -> int:
        asked.clear()
        return longest(lambda n: bool(asked.append(n) or n <= most), 2**20)

    assert at_most(0) == 0
    assert len(asked) == 1
    assert at_most(3) == 3
    assert len(asked) <= 4
    assert at_most(100_000) == 100_000
    assert len(asked) <= 2 * 17 + 1
    asked.clear()
    assert longest(lambda n: bool(asked.append(n) or True), 32768, start=32768) == 32768
    assert asked == [32768]


def test_the_smallest_card_counts_a_tight_fit() -> None:
    least = min(GPUS, key=lambda gpu: gpu.usable_bytes)
    found = smallest_card(least.usable_bytes)
    assert found is not None
    assert found.usable_bytes == least.usable_bytes
    beyond = smallest_card(least.usable_bytes + 1)
    assert beyond is not None
    assert beyond.usable_bytes > least.usable_bytes


def test_the_ceiling_is_bandwidth_by_bytes() -> None:
    assert decode_ceiling(4800, 14_220_000_000) == pytest.approx(337.6, abs=0.1)
    assert decode_ceiling(1000, 10**10, batch=4) == 400
