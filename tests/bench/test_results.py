"""Sums over a layer and pairs by hand: what charts and tables are drawn from."""

from __future__ import annotations

import pytest

from quantkit.bench.results import Cell, Limits, Reader, bf16_layers, layers, roof
from quantkit.bench.timing import Effort, alternate, paired


def cell(matrix: str, ours: float, torch: float, m: int = 1, scheme: str = "int8") -> Cell:
    seconds = {"quantkit": ours, "torch bf16": torch}
    shares = {"quantkit": 0.25 * ours, "torch bf16": 0.5}
    return Cell(scheme, matrix, 10, 20, m, 210, 3, seconds, {"torch bf16": torch / ours}, shares)


def test_a_layer_is_the_sum_of_its_matrices() -> None:
    cells = [
        cell("o", 1.0, 2.0),
        cell("down", 3.0, 3.0),
        cell("o", 4.0, 4.0, m=2),
        cell("down", 1.0, 4.0, m=2),
    ]
    one, two = layers(cells)
    assert (one.name, one.m, two.m) == ("int8", 1, 2)
    assert (one.seconds, one.flops, one.weight_bytes) == (4.0, 2 * 400, 420)
    assert one.flops_per_s == 200
    assert one.intensity == pytest.approx(800 / 420)
    assert one.roof_share == (0.25 * 1.0 + 0.75 * 3.0) / 4.0
    assert one.speedups == {"torch bf16": pytest.approx((2.0 + 3.0) / 4.0)}  # of the whole layer's time


def test_torch_is_taken_from_beside_the_first_scheme() -> None:
    cells = [cell("o", 1.0, 2.0), cell("o", 1.0, 9.0, scheme="nf4")]
    (found,) = bf16_layers(cells)
    assert (found.name, found.seconds, found.weight_bytes) == ("torch bf16", 2.0, 2 * 10 * 20)
    assert (found.roof_share, found.speedups) == (0.5, {})


def test_a_layer_that_lacks_a_matrix_is_no_layer() -> None:
    cells = [cell("o", 1.0, 2.0), cell("down", 3.0, 3.0), cell("o", 4.0, 4.0, m=2)]
    assert [layer.m for layer in layers(cells)] == [layer.m for layer in bf16_layers(cells)] == [1]
    assert bf16_layers([]) == []


def test_the_roof_is_the_lower_of_two_lines() -> None:
    limits = Limits((Reader("plain", "4K", 10.0), Reader("plain", "huge", 9.0)), 80.0)
    assert [roof(limits, intensity) for intensity in (1.0, 8.0, 9.0)] == [10.0, 80.0, 80.0]


def test_a_pair_is_one_round() -> None:
    assert paired([2.0, 40.0, 3.0], [1.0, 10.0, 1.0]) == 3.0  # the medians' ratio would be 3.0 / 1.0, too
    assert paired([10.0, 2.0, 9.0], [1.0, 2.0, 3.0]) == 3.0  # and here 9 / 2


def test_runs_alternate_after_one_round_that_is_not_timed() -> None:
    called: list[tuple[str, int]] = []
    runs = {name: lambda turn, name=name: called.append((name, turn)) for name in ("a", "b")}
    times = alternate(runs, Effort(rounds=2, seconds=0.0))
    assert called == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert [len(taken) for taken in times.values()] == [2, 2]
