"""What fits a memory: the longest context and the largest batch of a model, and its ceiling in tokens/s."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from calculators.fit import decode_ceiling, longest, spare_bytes, verdict
from calculators.kv_cache import kv_cache_bytes
from calculators.units import bits_to_bytes
from quantkit.config import DTYPE_BITS
from quantkit.estimate import Estimator, Workload, compute_dtype, kv_layout

MOST_SEQUENCES = 1 << 16  # that a batch is tried with


@dataclass(frozen=True)
class Fit:
    """What of one precision fits a memory.

    Attributes:
        scheme: its name.
        kv_bits: bits of a cached element.
        weights_bytes: of all weights.
        longest_context: tokens, with the batch of the workload; 0 where none fits.
        limited_by: of that context: `memory`, or `model` where it is the model's own.
        context, batch: of the workload.
        verdict: on the workload: `fits`, `tight` or `no`.
        margin_bytes: what the workload leaves free; negative is what is missing.
        largest_batch: sequences of `context` tokens; 0 where none fits.
        ceiling_tokens_per_s: see `ceiling`; None where no bandwidth is known, the workload does not fit, or
            of the weights only their sum is known.

    The allocator's bytes can fall by some MiB as a context grows: the longest context fits and one token more
    does not, while one a little shorter may be tight.
    """

    scheme: str
    kv_bits: int
    weights_bytes: int
    longest_context: int
    limited_by: str
    context: int
    batch: int
    verdict: str
    margin_bytes: int
    largest_batch: int
    ceiling_tokens_per_s: float | None


def fit(estimator: Estimator, workload: Workload, memory: int, bandwidth_gb_s: float | None) -> Fit:
    """Return what fits `memory` bytes, and the ceiling that a bandwidth in GB/s sets."""
    entry = estimator.estimate(workload)
    found = verdict(entry.total_bytes, memory)
    context = longest_context(estimator, workload, memory)
    known = bandwidth_gb_s if found.fits and len(estimator.weights) > 1 else None
    return Fit(
        scheme=entry.scheme,
        kv_bits=entry.kv_bits,
        weights_bytes=entry.weights_bytes,
        longest_context=context,
        limited_by="model" if context == estimator.config.max_context else "memory",
        context=workload.context,
        batch=workload.batch,
        verdict=found.word,
        margin_bytes=found.margin_bytes,
        largest_batch=largest_batch(estimator, workload, memory),
        ceiling_tokens_per_s=known and round(ceiling(estimator, workload, known), 1),
    )


def longest_context(estimator: Estimator, workload: Workload, memory: int) -> int:
    """Return the longest context with the verdict `fits` in `memory` bytes, at most the model's own; or 0."""

    def spare(context: int) -> int:
        return _spare(estimator, replace(workload, context=context), memory)

    return longest(spare, estimator.config.max_context)


def largest_batch(estimator: Estimator, workload: Workload, memory: int) -> int:
    """Return the most sequences with the verdict `fits` in `memory` bytes; or 0."""

    def spare(batch: int) -> int:
        return _spare(estimator, replace(workload, batch=batch), memory)

    return longest(spare, MOST_SEQUENCES)


def _spare(estimator: Estimator, workload: Workload, memory: int) -> int:
    return spare_bytes(_needed(estimator, workload), memory)


@lru_cache(maxsize=4096)
def _needed(estimator: Estimator, workload: Workload) -> int:
    """Return the bytes of a workload; GPUs of one kind ask for the same ones."""
    return estimator.estimate(workload).total_bytes


def cache_bytes(estimator: Estimator, workload: Workload) -> int:
    """Return the bytes of the cache."""
    layout = kv_layout(estimator.config, estimator.scheme, workload.kv_bits, workload.kv_group)
    return kv_cache_bytes(layout, workload.context, workload.batch, estimator.config.sliding_window)


def step_bytes(estimator: Estimator, workload: Workload) -> int:
    """Return the bytes that decoding a token of every sequence must read at the end of its context.

    All weights, of an untied embedding only the rows of these tokens, and the cache.
    """
    config = estimator.config
    rows = 0 if config.tie_embeddings else config.vocab_size - min(workload.batch, config.vocab_size)
    unread = bits_to_bytes(rows * config.hidden_size * DTYPE_BITS[compute_dtype(config, estimator.scheme)])
    return estimator.weights_bytes - unread + cache_bytes(estimator, workload)


def ceiling(estimator: Estimator, workload: Workload, bandwidth_gb_s: float) -> float:
    """Return the tokens per second, of all sequences together, that a bandwidth in GB/s allows at most."""
    return decode_ceiling(bandwidth_gb_s, step_bytes(estimator, workload), workload.batch)
