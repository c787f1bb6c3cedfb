"""Perplexity over windows of a text.

exp(total NLL / tokens scored), never a mean of perplexities. The ids, one leading BOS and all, are
cut into windows; each is run alone, and its first id has nothing to be predicted from. Where the
stride is shorter than the window, a later window scores only the ids that no earlier one has.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from quantkit.errors import QuantkitError
from quantkit.models.decoder import Decoder

_TOKENS_PER_BATCH = 4096
_LOGITS_PER_CHUNK = 1 << 24
MOST_NLL = 300.0  # nats: a perplexity that float64 still squares, as standard errors do


@dataclass(frozen=True)
class Windows:
    """How the ids are cut.

    Attributes:
        window: ids a window holds.
        stride: ids from one window's start to the next; equal to `window`, they do not overlap.
    """

    window: int
    stride: int

    def __post_init__(self) -> None:
        if self.window < 2 or not 1 <= self.stride <= self.window:
            raise QuantkitError(
                f"window {self.window} with stride {self.stride}: a window needs at least 2 ids and a stride "
                "between 1 and the window"
            )

    def cut(self, ids: Sequence[int]) -> torch.Tensor:
        """Return int64 (n, window); a shorter rest is dropped.

        Raises:
            QuantkitError: not one window is filled.
        """
        if len(ids) < self.window:
            raise QuantkitError(
                f"the text has {len(ids):,} tokens, fewer than one window of {self.window:,}: use a shorter --window, "
                "a longer text or more --limit-tokens"
            )
        return torch.tensor(ids).unfold(0, self.window, self.stride)


@dataclass(frozen=True)
class Score:
    """What one model scores on the windows.

    Attributes:
        nll: mean negative log-likelihood of a token, in nats.
        nll_standard_error: of that mean, over windows; None with a single window.
        tokens_scored: tokens the mean is over.
        seconds: wall time of the forward passes.
        window_nll: each window's sum of NLL: float64 (n,).
        window_tokens: the tokens scored in each: float64 (n,).
    """

    nll: float
    nll_standard_error: float | None
    tokens_scored: int
    seconds: float
    window_nll: torch.Tensor = field(repr=False)
    window_tokens: torch.Tensor = field(repr=False)

    @property
    def has_perplexity(self) -> bool:
        """Whether there is one to compare: logits that are not finite give none, nor does a mean NLL beyond 300."""
        return self.nll <= MOST_NLL

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll)

    @property
    def standard_error(self) -> float | None:
        """Standard error of the perplexity, to first order; None with a single window."""
        return None if self.nll_standard_error is None else self.perplexity * self.nll_standard_error

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_scored / self.seconds

    def difference_standard_error(self, other: Score) -> float | None:
        """Return the standard error of this perplexity minus another's on the same windows, to first order.

        The windows are paired: what is hard for both models alike cancels.
        """
        residuals = self.perplexity * self._residuals() - other.perplexity * other._residuals()
        return _standard_error(residuals, self.window_tokens)

    def _residuals(self) -> torch.Tensor:
        return self.window_nll - self.nll * self.window_tokens


def perplexity(
    decoder: Decoder,
    ids: Sequence[int],
    windows: Windows,
    kv_bits: int | None = None,
    progress: Callable[[int], None] | None = None,
    kv_group: int = 0,
) -> Score:
    """Score a text's ids; `progress` is told how many windows each step finished."""
    cut = windows.cut(ids).to(decoder.device)
    per_batch = batch_of(windows.window)
    sums: list[torch.Tensor] = []
    counts: list[int] = []
    started = time.perf_counter()
    first = windows.window - 1  # the first window scores all it can, the others what is new
    for start in range(0, len(cut), per_batch):
        batch = cut[start : start + per_batch]
        nll = token_nll(decoder, batch, kv_bits, kv_group)  # (B, window - 1)
        for row in range(len(batch)):
            scored = first if start + row == 0 else min(windows.stride, first)
            sums.append(nll[row, -scored:].double().sum())
            counts.append(scored)
        if progress:
            progress(len(batch))
    totals = torch.stack(sums).cpu()
    seconds = time.perf_counter() - started
    mean = totals.sum().item() / sum(counts)
    sizes = torch.tensor(counts, dtype=torch.float64)
    error = _standard_error(totals - mean * sizes, sizes)
    return Score(mean, error, sum(counts), seconds, totals, sizes)


def batch_of(window: int) -> int:
    """Return the windows that run through the model together."""
    return max(1, _TOKENS_PER_BATCH // window)


def token_nll(
    decoder: Decoder, ids: torch.Tensor, kv_bits: int | None = None, kv_group: int = 0
) -> torch.Tensor:
    """Return the float32 NLL (B, T - 1) of each id given those before it, for ids (B, T)."""
    cache = decoder.new_cache(ids.shape[0], ids.shape[1], kv_bits, kv_group)
    states = decoder.forward(ids, cache)[:, :-1]
    step = max(1, _LOGITS_PER_CHUNK // (decoder.config.vocab_size * ids.shape[0]))
    pieces = []
    for start in range(0, states.shape[1], step):
        logits = decoder.logits(states[:, start : start + step])
        targets = ids[:, 1 + start : 1 + start + logits.shape[1]]
        pieces.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none"))
    return torch.cat(pieces, dim=1)


def _standard_error(residuals: torch.Tensor, sizes: torch.Tensor) -> float | None:
    """Standard error of a ratio of sums over windows, which are taken as independent; None for a single one."""
    windows = len(residuals)
    if windows < 2:
        return None
    variance = residuals.square().sum() / (windows - 1) / windows
    return float(variance.sqrt() / sizes.mean())
