"""Cards, the assumed overhead, and verdicts."""

from __future__ import annotations

from calculators.fit import smallest_card, verdict
from calculators.hardware import ASSUMED_OVERHEAD, GPUS
from calculators.units import GIB


def test_a_card_has_about_as_many_gib_as_it_is_sold_with_gb() -> None:
    for gpu in GPUS:
        assert abs(gpu.usable_bytes / GIB - gpu.sold_gb) < 3.1, gpu.name
        assert gpu.source
    assert len({gpu.name for gpu in GPUS}) == len(GPUS)


def test_the_overhead_says_where_it_comes_from() -> None:
    assert ASSUMED_OVERHEAD.nbytes == 536_870_912 + 33_554_432
    assert ASSUMED_OVERHEAD.status == "assumed"
    assert "H100" in ASSUMED_OVERHEAD.source
    assert "cuBLAS" in ASSUMED_OVERHEAD.source


def test_the_smallest_card_holds_the_need_and_none_smaller_does() -> None:
    for gpu in GPUS:
        found = smallest_card(gpu.usable_bytes)
        assert found is not None
        assert found.usable_bytes == gpu.usable_bytes
        beyond = smallest_card(gpu.usable_bytes + 1)
        assert beyond is None or beyond.usable_bytes > gpu.usable_bytes
    assert smallest_card(max(gpu.usable_bytes for gpu in GPUS) + 1) is None


def test_a_reserve_is_kept_free() -> None:
    assert verdict(10 * GIB, 12 * GIB).fits
    assert verdict(12 * GIB, 12 * GIB).fits
    assert verdict(10 * GIB, 12 * GIB, reserve=2 * GIB).margin_bytes == 0
    assert not verdict(10 * GIB, 12 * GIB, reserve=2 * GIB + 1).fits
    least = smallest_card(8000 * 2**20, reserve=GIB)
    assert least is not None
    assert least.sold_gb == 12
