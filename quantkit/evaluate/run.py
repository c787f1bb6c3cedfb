"""One evaluation: a checkpoint and a text, the original first, then each scheme made from it."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from quantkit.errors import QuantkitError, SchemeError
from quantkit.estimate import Workload
from quantkit.evaluate.perplexity import MOST_NLL, Score, Windows, batch_of, perplexity
from quantkit.evaluate.texts import Text
from quantkit.formats.checkpoint import Checkpoint
from quantkit.kernels.ops import choose_backend, device_name
from quantkit.models.loader import load
from quantkit.room import in_memory
from quantkit.schemes import Indivisible, QuantScheme, plan_weights

DEFAULT_WINDOW = 2048


@dataclass(frozen=True)
class Result:
    """The score of one precision with one KV cache."""

    scheme: str
    kv_bits: int
    kv_group: int
    weights_bytes: int
    score: Score


class Evaluation:
    """The protocol, fixed before any model is loaded.

    Args:
        checkpoint: the original.
        text: what is scored.
        window: ids a window holds; None means 2048 or the model's context, whichever is less.
        stride: None means the window.
        limit_tokens: use only the first ids; None means all.
        kv_bits: bits of the KV caches that each precision is run with, widest first whatever the order here; None
            means the compute dtype's.
        kv_group: elements of a head that share a scale of the cache; 0 is the whole head.
        dtype: compute dtype; None means the checkpoint's.
        device: `cpu` or `cuda`.

    Raises:
        QuantkitError: the text does not fill a window, or windows in which a quantized cache would go unused.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        text: Text,
        window: int | None = None,
        stride: int | None = None,
        limit_tokens: int | None = None,
        kv_bits: Sequence[int | None] = (None,),
        kv_group: int = 0,
        dtype: str | None = None,
        device: str = "cpu",
    ) -> None:
        self.device, self.backend = device, choose_backend("auto", device)
        self.checkpoint, self.text, self.kv_group = checkpoint, text, kv_group
        self.kv_bits = sorted(set(kv_bits), key=lambda bits: -(bits or 32))  # differences are to the first
        self.dtype = dtype or checkpoint.config.dtype
        window = window or min(DEFAULT_WINDOW, checkpoint.config.max_context)
        self.windows = Windows(window, stride or window)
        own = checkpoint.config.sliding_window
        if own is not None and own < window and any(bits is not None and bits < 16 for bits in kv_bits):
            raise QuantkitError(
                f"windows of {window:,} tokens roll through the {own:,} of {checkpoint.config.name}, and the first "
                f"pass attends to keys that no cache has held: evaluate its KV bits with --window {own} or less"
            )
        tokenizer = checkpoint.tokenizer()
        self.bos_id = tokenizer.bos_id
        ids = tokenizer.encode(text.content, add_bos=self.bos_id is not None)
        self.tokens_in_text = len(ids)
        self.ids = ids[:limit_tokens]
        self.n_windows = len(self.windows.cut(self.ids))

    def run(
        self,
        schemes: Sequence[QuantScheme],
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        indivisible: Indivisible = "short",
        progress: Callable[[int], None] | None = None,
        failed: Callable[[str], None] | None = None,
    ) -> list[Result]:
        """Score the original, then each of `schemes`.

        `failed` is told of what has no perplexity; the original, to which all are compared, must have one.

        Raises:
            SchemeError: a pattern matches nothing, or the original is quantized already.
            QuantkitError: there is no perplexity, and `failed` is not told of it.
        """
        config = self.checkpoint.config
        if schemes and self.checkpoint.schemes:
            raise SchemeError(f"{config.name} is quantized already; evaluate it without --scheme")
        plans = [(scheme, plan_weights(config, scheme, include, exclude, indivisible)) for scheme in schemes]
        stored = dict.fromkeys(scheme.name for scheme in self.checkpoint.schemes.values())
        runs: list[tuple[str, str, dict[str, QuantScheme]]]
        runs = [("+".join(stored) or self.dtype, self.dtype, {})]
        runs += [(scheme.name, scheme.dtype or self.dtype, plan) for scheme, plan in plans]
        results: list[Result] = []
        for name, dtype, plan in runs:
            for result in self._scores(name, dtype, plan, progress):
                if result.score.has_perplexity:
                    results.append(result)
                    continue
                line = (
                    f"{name} with a {result.kv_bits}-bit KV cache has no perplexity: the mean NLL of a token is "
                    f"{result.score.nll:.6g}, not a number up to {MOST_NLL:g}; look at its weights, or try another "
                    "--dtype"
                )
                if failed is None or not results:
                    raise QuantkitError(line)
                failed(line)
        return results

    def _scores(
        self, name: str, dtype: str, plan: dict[str, QuantScheme], progress: Callable[[int], None] | None
    ) -> Iterator[Result]:
        window = self.windows.window
        runs = Workload(window, batch_of(window), self.kv_bits[0], self.kv_group, window)
        with in_memory(self.checkpoint.config, dtype, plan or self.checkpoint.schemes, runs):
            decoder = load(self.checkpoint, dtype, plan, self.device)
            for kv_bits in self.kv_bits:
                bits = decoder.new_cache(1, 1, kv_bits, self.kv_group).bits
                score = perplexity(decoder, self.ids, self.windows, kv_bits, progress, self.kv_group)
                group = self.kv_group if bits < 16 else 0
                yield Result(name, bits, group, decoder.weights_bytes, score)

    def body(self, results: Sequence[Result]) -> dict[str, Any]:
        """Return the record's body: model, protocol and results."""
        original = results[0].score
        return {
            "model": self.checkpoint.config.name,
            "parameters": self.checkpoint.config.parameters,
            "protocol": {
                "text": self.text.name,
                "sha256": self.text.sha256,
                "python": platform.python_version(),
                "tokens_in_text": self.tokens_in_text,
                "bos_id": self.bos_id,
                "window": self.windows.window,
                "stride": self.windows.stride,
                "windows": self.n_windows,
                "tokens_scored": original.tokens_scored,
                "rule": "one leading BOS where the tokenizer has one; windows run alone, the first id of each "
                "not scored; a short tail dropped; perplexity = exp(total NLL / tokens scored)",
            },
            "dtype": self.dtype,
            "device": device_name(self.device),
            "backend": self.backend,
            "results": [
                {
                    "scheme": result.scheme,
                    "kv_bits": result.kv_bits,
                    "kv_group": result.kv_group,
                    "perplexity": result.score.perplexity,
                    "nll": result.score.nll,
                    "standard_error": result.score.standard_error,
                    "nll_standard_error": result.score.nll_standard_error,
                    "difference": result.score.perplexity - original.perplexity,
                    "difference_standard_error": result.score.difference_standard_error(original),
                    "tokens_scored": result.score.tokens_scored,
                    "weights_bytes": result.weights_bytes,
                    "tokens_per_second": result.score.tokens_per_second,
                }
                for result in results
            ],
        }
