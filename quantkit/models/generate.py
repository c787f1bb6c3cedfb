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
    """Yield new token ids one by one, up to but without the first of `stop_ids`.

    A GPU chooses tokens itself and runs one ahead of those yielded: it never waits for the host, and has run one for
    nothing when a stop id comes.
    """
    sampling = sampling or Sampling()
    generator = torch.Generator(device=decoder.device).manual_seed(sampling.seed)
    cache = decoder.new_cache(1, len(prompt) + max_new_tokens, kv_bits)
    ahead = decoder.device.type == "cuda"

    def following(ids: torch.Tensor) -> torch.Tensor:
        return choose(decoder.prefill(ids, cache, prefill_chunk)[0], sampling, generator)

    token = following(torch.tensor([prompt], device=decoder.device))
    for produced in range(1, max_new_tokens + 1):
        last, chosen = produced == max_new_tokens, _Arriving(token)
        if ahead and not last:
            token = following(token[None])
        found = chosen.read()
        if found in stop_ids:
            return
        yield found
        if not ahead and not last:
            token = following(token[None])


def choose(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> torch.Tensor:
    """Return the next token id, int64 (1,), for float32 logits (vocab,), without waiting for their device."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    probabilities = torch.softmax(logits / sampling.temperature, dim=-1)
    ordered, order = probabilities.sort(descending=True)
    before = ordered.cumsum(dim=-1) - ordered  # mass of the likelier tokens: the first always stays
    ordered.masked_fill_(before >= sampling.top_p, 0.0)
    # what torch.multinomial computes, which would wait to look for negative probabilities
    waits = torch.empty_like(ordered).exponential_(generator=generator)
    return order[(ordered / waits).argmax(dim=-1, keepdim=True)]


class _Arriving:
    """A token id (1,) on its way to the host; what is queued behind it on the device is not waited for."""

    def __init__(self, token: torch.Tensor) -> None:
        self._token, self._copied = token, None
        if token.is_cuda:
            self._token = torch.empty_like(token, device="cpu", pin_memory=True)
            self._token.copy_(token, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(token.device))

    def read(self) -> int:
        if self._copied is not None:
            self._copied.synchronize()
        return int(self._token)
