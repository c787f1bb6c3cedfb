"""How far does each precision move a model's predictions?

    python examples/divergence.py [MODEL] [TOKENS]

Prints the KL divergence from the original's predictions, in nats a token, with its standard error over
windows, on the text that `quantkit eval` scores. Perplexity also holds where a rounding happened to fall in
favour of the text, or against it; the divergence does not, so that it tells precisions apart that perplexity
cannot. Computed in float32.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from quantkit.embedded import EMBEDDED_MODEL, embedded_path
from quantkit.evaluate.run import Evaluation
from quantkit.evaluate.texts import python_reference
from quantkit.formats.checkpoint import open_checkpoint
from quantkit.models.decoder import Decoder
from quantkit.models.loader import load
from quantkit.schemes import SCHEMES, plan_weights

NAMES = ("int8", "int4-g128", "int4-g64", "int4-g32", "nf4", "nf4-dq")


def predictions(decoder: Decoder, window: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities (T, vocab) after each id of a window (T,)."""
    cache = decoder.new_cache(1, len(window))
    return decoder.logits(decoder.forward(window[None], cache))[0].log_softmax(-1)


def main(model: str, tokens: int) -> None:
    evaluation = Evaluation(
        open_checkpoint(embedded_path(model) or Path(model)), python_reference(), limit_tokens=tokens
    )
    windows = evaluation.windows.cut(evaluation.ids)
    original = load(evaluation.checkpoint, "fp32")
    print(f"{windows.numel():,} tokens in {len(windows)} windows")
    for name in NAMES:
        decoder = load(evaluation.checkpoint, "fp32", plan_weights(original.config, SCHEMES[name]))
        found = []
        for window in windows:
            before, after = predictions(original, window), predictions(decoder, window)
            found.append((before.exp() * (before - after)).sum(-1).mean().item())
        divergence = torch.tensor(found, dtype=torch.float64)
        error = divergence.std() / len(found) ** 0.5
        print(f"{name:10} {divergence.mean():.6f} ± {error:.6f}", flush=True)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if len(arguments) > 2:
        sys.exit(str(__doc__))
    main(arguments[0] if arguments else EMBEDDED_MODEL, int(arguments[1]) if len(arguments) > 1 else 16_384)
