"""Text from a model: greedy, or sampled with temperature and top-p."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch

from quantkit.models.decoder import Decoder


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 is greedy.
        top_p: sample among the likeliest tokens whose probabilities reach this sum.
        seed: of the random generator.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


def generate(
    decoder: Decoder,
    prompt: list[int],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_ids: Collection[int] = (),
    kv_bits: int | None = None,
    prefill_chunk: int = 2048,
) -> Iterator[int]:
    """Yield new token ids one by one, up to but without the first of `stop_ids`."""
    sampling = sampling or Sampling()
    generator = torch.Generator(device=decoder.device).manual_seed(sampling.seed)
    cache = decoder.new_cache(1, len(prompt) + max_new_tokens, kv_bits)
    ids = torch.tensor([prompt], device=decoder.device)
    logits = decoder.prefill(ids, cache, prefill_chunk)[0]
    for produced in range(1, max_new_tokens + 1):
        token = choose(logits, sampling, generator)
        if token in stop_ids:
            return
        yield token
        if produced < max_new_tokens:
            logits = decoder.prefill(torch.tensor([[token]], device=decoder.device), cache)[0]


def choose(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Return the next token id for float32 logits (vocab,)."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits / sampling.temperature, dim=-1)
    ordered, order = probabilities.sort(descending=True)
    before = ordered.cumsum(dim=-1) - ordered  # mass of the likelier tokens: the first always stays
    ordered[before >= sampling.top_p] = 0.0
    return int(order[torch.multinomial(ordered, 1, generator=generator)])
