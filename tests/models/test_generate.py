"""Sampling: what is chosen, and when it is asked for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from quantkit.formats.checkpoint import open_checkpoint
from quantkit.models.decoder import Decoder
from quantkit.models.generate import Sampling, choose, generate
from quantkit.models.loader import load
from tests.checkpoints import tiny_config, write_checkpoint


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def by_multinomial(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    probabilities = torch.softmax(logits / sampling.temperature, dim=-1)
    ordered, order = probabilities.sort(descending=True)
    ordered[ordered.cumsum(dim=-1) - ordered >= sampling.top_p] = 0.0
    return int(order[torch.multinomial(ordered, 1, generator=generator)])


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_a_seed_gives_what_multinomial_gives(top_p: float) -> None:
    sampling, found, expected = Sampling(0.8, top_p), seeded(3), seeded(3)
    for seed in range(50):
        logits = 3 * torch.randn(500, generator=seeded(seed))
        assert int(choose(logits, sampling, found)) == by_multinomial(logits, sampling, expected)


def test_tokens_come_as_often_as_they_are_likely() -> None:
    logits, generator = torch.tensor([0.5, 0.3, 0.15, 0.05]).log(), seeded(0)
    counts = Counter(int(choose(logits, Sampling(1.0, 0.9), generator)) for _ in range(4000))
    assert set(counts) == {0, 1, 2}
    for token, likely in enumerate((0.5, 0.3, 0.15)):
        assert counts[token] / 4000 == pytest.approx(likely / 0.95, abs=0.03)


def test_greedy_takes_the_greatest() -> None:
    assert choose(torch.tensor([0.0, 2.0, 1.0]), Sampling(), seeded(0)).tolist() == [1]


class Counting:
    """A decoder whose next token is the last one plus 1, and which counts its calls."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.calls = 0

    def new_cache(self, batch: int, tokens: int, kv_bits: int | None) -> Any:
        return SimpleNamespace()

    def prefill(self, ids: torch.Tensor, cache: Any, chunk: int) -> torch.Tensor:
        self.calls += 1
        return torch.nn.functional.one_hot(ids[:, -1] + 1, 10).float()


def test_a_cpu_runs_nothing_ahead() -> None:
    decoder = Counting()
    tokens = generate(cast(Decoder, decoder), [1], 5, stop_ids=[4])
    assert [(token, decoder.calls) for token in tokens] == [(2, 1), (3, 2)]
    assert decoder.calls == 3
    assert list(generate(cast(Decoder, Counting()), [1], 3)) == [2, 3, 4]


def test_sampling_repeats_itself(tmp_path: Path) -> None:
    config = tiny_config(dtype="bf16")
    decoder = load(open_checkpoint(write_checkpoint(tmp_path, config, "bf16", seed=0)))
    first, again, other = (
        list(generate(decoder, [1, 5], 12, Sampling(1.0, 0.95, seed))) for seed in (1, 1, 2)
    )
    assert first == again != other
