"""Peaks of a whole run: weights are loaded, a cache is made, a prompt runs in chunks, a token is decoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

from calculators.activations import decode, fixtures, frequency_bytes, prefill
from calculators.allocator import CachingAllocator
from calculators.kv_cache import KVLayout, kv_cache_parts
from calculators.tape import Cache, Model, NotedTape, Tape, Term

Kind = TypeVar("Kind", bound=Tape)

DECODED = 1  # tokens of the context that are decoded; the others are the prompt


@dataclass(frozen=True)
class Run:
    """What is run on which settings.

    Attributes:
        context: tokens of a sequence, prompt and answer together.
        batch: sequences.
        chunk: tokens of the prompt that run through the model at once.
        workspace_bytes: of cuBLAS.
        expandable_segments: how the allocator reserves.
        sampled: of the chunks only the first two and the last are run.
    """

    context: int
    batch: int
    chunk: int
    workspace_bytes: int
    expandable_segments: bool = False
    sampled: bool = False


@dataclass(frozen=True)
class Peaks:
    """Bytes at their largest.

    Attributes:
        requested: as asked for: weights, cache, workspace and all else that lives at once.
        allocated: `torch.cuda.max_memory_allocated`.
        reserved: `torch.cuda.max_memory_reserved`.
        loaded: reserved once the weights are loaded.
    """

    requested: int
    allocated: int
    reserved: int
    loaded: int


def prompt_tokens(context: int) -> int:
    """Return how much of the context is the prompt."""
    return max(1, context - DECODED)


def chunks(prompt: int, chunk: int, sampled: bool = False) -> list[tuple[int, int]]:
    """Return (tokens, tokens before) of each chunk of a prompt; sampled: the first two and the last."""
    calls = [(min(chunk, prompt - start), start) for start in range(0, prompt, chunk)]
    return [*calls[:2], calls[-1]] if sampled and len(calls) > 3 else calls


def play(weights: Sequence[int], model: Model, layout: KVLayout, run: Run) -> Peaks:
    """Return the peaks of a run.

    Args:
        weights: bytes of each tensor, in the order in which they are loaded.
        model: what is run.
        layout: of its cache.
        run: how.
    """
    tape = _tape(Tape, weights, model, layout, run)
    loaded = tape.allocator.reserved
    follow(tape, layout, run)
    peaks = tape.allocator
    return Peaks(peaks.peak_requested, peaks.peak_allocated, peaks.peak_reserved, loaded)


def loaded_bytes(weights: Sequence[int], head_dim: int, expandable_segments: bool = False) -> int:
    """Return what is allocated once a decoder is made, and at most until then: weights, rotary frequencies."""
    allocator = _loaded(tuple(weights), expandable_segments).fork()
    allocator.malloc(frequency_bytes(head_dim))
    return allocator.allocated


def at_peak(weights: Sequence[int], model: Model, layout: KVLayout, run: Run) -> tuple[Term, ...]:
    """Return what is alive beside the weights when the most is; the arguments are those of `play`."""
    tape = _tape(NotedTape, weights, model, layout, run)
    follow(tape, layout, run)
    return tape.at_peak


def _tape(kind: type[Kind], weights: Sequence[int], model: Model, layout: KVLayout, run: Run) -> Kind:
    allocator = _loaded(tuple(weights), run.expandable_segments).fork()
    cache = Cache(layout.bits, layout.group, run.context)
    return kind(allocator, model, cache, run.batch, run.workspace_bytes)


def follow(tape: Tape, layout: KVLayout, run: Run) -> None:
    """Play all that comes after the weights."""
    fixtures(tape, kv_cache_parts(layout, run.context, run.batch, tape.model.window))
    prompt = prompt_tokens(run.context)
    prefill(tape, chunks(prompt, run.chunk, run.sampled))
    if prompt < run.context:
        decode(tape, prompt)


@lru_cache(maxsize=64)
def _loaded(weights: tuple[int, ...], expandable_segments: bool) -> CachingAllocator:
    allocator = CachingAllocator(expandable_segments)
    for nbytes in weights:
        allocator.malloc(nbytes)
    return allocator
