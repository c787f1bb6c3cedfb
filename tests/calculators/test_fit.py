"""Verdicts and solvers."""

from __future__ import annotations

import pytest

from calculators.fit import (
    ERROR_BAND,
    band_bytes,
    decode_ceiling,
    longest,
    smallest_card,
    spare_bytes,
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


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 1000])
@pytest.mark.parametrize("step", [1, 16, 1000])
def test_the_longest_is_found(limit: int, step: int) -> None:
    for most in (0, 1, 2, 3, 6, 7, 8, 500, 998, 999, 1000, 5000):
        asked: list[int] = []

        def spare(n: int, most: int = most, asked: list[int] = asked) -> int:
            asked.append(n)
            return (most // step - -(-n // step)) * step if n > most else (most - n) // step

        assert longest(spare, limit) == min(most, limit)
        assert len(asked) == len(set(asked)) or limit == 1
        assert all(1 <= n <= limit for n in asked)


@pytest.mark.parametrize("size", [1, 10**6, 2**40])
def test_few_are_tried(size: int) -> None:
    """A staircase with a kink, as reserved bytes are; and worse, where steps say nothing of the distance."""
    asked: list[int] = []

    def need(n: int) -> int:
        asked.append(n)
        return size * (min(n, 2048) // 2 + n // 16 * 16)

    for most in (3, 100, 5000, 32000):
        memory = need(most)
        asked.clear()
        found = longest(lambda n, memory=memory: memory - need(n), 32768)
        assert need(found) <= memory < need(found + 1)
        assert len(asked) <= 15 + 5  # bisection would need 17
    for most in (1, 2, 30000, 32767):
        asked.clear()
        assert longest(lambda n, most=most: asked.append(n) or (0 if n <= most else -size), 32768) == most
        assert len(asked) <= 15 + 5  # bisection would need 17
    asked.clear()
    assert longest(lambda n: asked.append(n) or size * (20_000 - n), 2**20) == 20_000
    assert len(asked) <= 10
    asked.clear()
    assert longest(lambda n: asked.append(n) or 1, 32768) == 32768
    assert longest(lambda n: asked.append(n) or -1, 32768) == 0
    assert asked == [1, 32768, 1]


def test_spare_is_what_the_verdict_says() -> None:
    for memory in range(990, 1050):
        assert (spare_bytes(1000, memory) >= 0) == (verdict(1000, memory).word == "fits")


def test_the_smallest_card_counts_a_tight_fit() -> None:
    least = min(GPUS, key=lambda gpu: gpu.usable_bytes)
    found = smallest_card(lambda gpu: least.usable_bytes)
    assert found is not None
    assert found[0].usable_bytes == least.usable_bytes
    assert found[1].word == "tight"
    beyond = smallest_card(lambda gpu: least.usable_bytes + 1)
    assert beyond is not None
    assert beyond[0].usable_bytes > least.usable_bytes


def test_each_card_has_a_need_of_its_own() -> None:
    least, *others = sorted(GPUS, key=lambda gpu: gpu.usable_bytes)
    found = smallest_card(lambda gpu: least.usable_bytes + (1 if gpu == least else 0))
    assert found is not None
    assert found[0] == others[0]
    assert smallest_card(lambda gpu: 1, cards=others[3:]) == (others[3], verdict(1, others[3].usable_bytes))


def test_the_ceiling_is_bandwidth_by_bytes() -> None:
    assert decode_ceiling(4800, 14_220_000_000) == pytest.approx(337.6, abs=0.1)
    assert decode_ceiling(1000, 10**10, batch=4) == 400
