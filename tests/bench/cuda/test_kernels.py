"""What is timed side by side on a GPU computes the same; what fails is said, and stops nothing else."""

from __future__ import annotations

import math

import pytest
import torch

from quantkit.bench.contenders import Contender
from quantkit.bench.cuda import kernels
from quantkit.bench.cuda.contenders import builders
from quantkit.bench.cuda.results import Failure, Repeat
from quantkit.bench.random_weights import random_quantized
from quantkit.bench.results import Cell
from quantkit.bench.shapes import SCHEMES
from quantkit.kernels import reference
from quantkit.schemes import get_scheme
from tests.bench.cuda.stand_in import LIMITS, METHOD, TINY, Run, StandIn, place

GPU = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU is visible"),
    ],
)
ELSEWHERE = ("torch int4pack",)  # has no kernel for a CPU


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("name", SCHEMES)
def test_contenders_multiply_by_the_same_weights(name: str, device: str) -> None:
    torch.manual_seed(0)
    weight = random_quantized((256, 512), get_scheme(name), device)
    made = builders(weight, "triton" if device == "cuda" else "reference", away_bytes=0)
    assert {"quantkit", "torch bf16", "dequantize + cuBLAS"} < set(made)
    for m in (1, 5, 64):
        x = torch.randn(m, 512, device=device).bfloat16()
        exact = reference.linear(x.float(), weight)
        for who, build in made.items():
            if device == "cpu" and who in ELSEWHERE:
                continue
            # matrices, x and results in bfloat16, whose unit is 2**-8: sums of 512 stay well within 4 of them
            found = build().run(x, turn=1).float()
            assert (found - exact).abs().max() <= 2**-6 * exact.abs().max(), (who, m)


def test_cells_failures_and_repeats() -> None:
    device = StandIn()
    schemes = [get_scheme("int4-g128"), get_scheme("nf4")]
    found = list(kernels.measure(TINY, schemes, (1, 6), place(device)))
    cells = [one for one in found if isinstance(one, Cell)]
    assert [(cell.scheme, cell.m) for cell in cells] == [
        (scheme.name, m) for scheme in schemes for _ in range(4) for m in (1, 6)
    ]
    assert device.graphs == sum(len(cell.seconds) for cell in cells)
    for cell in cells:
        assert cell.rounds == METHOD.rounds
        assert set(cell.speedups) == set(cell.seconds) - {"quantkit"}
        values = [*cell.seconds.values(), *cell.speedups.values(), *cell.roof_shares.values()]
        assert all(math.isfinite(value) and value > 0 for value in values)
        floor = max(cell.weight_bytes / LIMITS.bytes_per_s, cell.flops / LIMITS.flops_per_s)
        assert cell.roof_shares["quantkit"] == pytest.approx(floor / cell.seconds["quantkit"])
    failures = [one for one in found if isinstance(one, Failure)]
    assert [failure.what for failure in failures] == [
        f"int4-g128, {matrix}, torch int4pack" for matrix in ("qkv", "o", "gate_up", "down")
    ]
    assert failures[0].reason.startswith("NotImplementedError: ")
    assert len(failures[0].reason) <= 120
    assert [one for one in found if isinstance(one, Repeat)] == [
        Repeat("int4-g128, kernels", 8, 8),
        Repeat("nf4, kernels", 8, 8),
    ]


class Broken(StandIn):
    """A device whose every graph fails from the ninth on."""

    def graph(self, run: Run) -> Run:
        if self.graphs >= 8:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        return super().graph(run)


def test_a_cell_without_quantkit_is_none() -> None:
    found = list(kernels.measure(TINY, [get_scheme("int8")], (1,), place(Broken())))
    assert [one.matrix for one in found if isinstance(one, Cell)] == ["qkv", "o"]
    failures = {one.what: one.reason for one in found if isinstance(one, Failure)}
    reason = "RuntimeError: operation not permitted when stream is capturing"
    assert failures["int8, down, M = 1, quantkit"] == failures["int8, down, M = 1, torch bf16"] == reason
    assert found[-1] == Repeat("int8, kernels", 2, 2)


def test_a_graph_passes_over_all_copies_with_inputs_of_their_own() -> None:
    seen: list[tuple[int, str]] = []
    contender = Contender(["a", "b"], lambda x, copy: seen.append((int(x), copy)) or x)
    kernels.pass_over(contender, [torch.tensor(7), torch.tensor(8), torch.tensor(9)], passes=2)
    assert seen == [(7, "a"), (8, "b"), (9, "a"), (7, "b")]


def test_bits_that_change_are_noticed() -> None:
    weight = random_quantized((8, 64), get_scheme("nf4"))
    drifting = Contender([weight], lambda x, copy: torch.rand(len(x), 8))
    assert not kernels._repeats(drifting, 2, weight)
