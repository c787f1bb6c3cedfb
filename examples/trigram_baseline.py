"""What a trigram model makes of tiny-mistral's held-out text, on the same tokens: the bar to be well below.

    python examples/trigram_baseline.py CORPUS

CORPUS is what train_tiny_mistral.py was given; all of it is counted, of which the model saw a part. The
trigram is modified Kneser-Ney with interpolation (Chen and Goodman 1998,
https://dash.harvard.edu/handle/1/25104739), and keeps its context where the model's windows begin anew.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from train_tiny_mistral import VOCAB, documents, encode

from quantkit.embedded import EMBEDDED_MODEL, embedded_path
from quantkit.evaluate.texts import python_reference

BITS = 12  # of a token's id: VOCAB is 2**12
WINDOW = 2048  # of the evaluation: the first token of each is not scored

Array = np.ndarray


@dataclass(frozen=True)
class Level:
    """Counts of one order: n-grams as integers, ascending, and how often each came."""

    keys: Array
    counts: Array

    def probability(self, grams: Array, lower: Array) -> Array:
        """Return P(last token | those before it) of each n-gram, interpolated with the order below's."""
        contexts, first = np.unique(self.keys >> BITS, return_index=True)
        total = np.add.reduceat(self.counts, first)
        discounts = self._discounts()
        kept = self.counts - discounts[np.minimum(self.counts, 3)]
        freed = np.add.reduceat(self.counts - kept, first)
        at = np.searchsorted(contexts, grams >> BITS)
        at_known = np.minimum(at, len(contexts) - 1)
        known = contexts[at_known] == grams >> BITS
        found = np.minimum(np.searchsorted(self.keys, grams), len(self.keys) - 1)
        seen = self.keys[found] == grams
        higher = np.where(seen, kept[found], 0) / total[at_known]
        return np.where(known, higher + freed[at_known] / total[at_known] * lower, lower)

    def _discounts(self) -> Array:
        once, twice, thrice, four = (float(np.count_nonzero(self.counts == n)) for n in (1, 2, 3, 4))
        if not once * twice * thrice:  # too few kinds, as of single tokens, to estimate from
            return np.array([0, 0.75, 0.75, 0.75])
        share = once / (once + 2 * twice)
        return np.array(
            [0, 1 - 2 * share * twice / once, 2 - 3 * share * thrice / twice, 3 - 4 * share * four / thrice]
        )


def perplexity(training: Array, held_out: Array, scored: Array) -> float:
    """Return the trigram's perplexity of the ids at the positions `scored`."""
    grams = _grams(training)
    three = Level(*np.unique(grams, return_counts=True))
    two = Level(*np.unique(three.keys & (1 << 2 * BITS) - 1, return_counts=True))
    one = Level(*np.unique(two.keys & VOCAB - 1, return_counts=True))
    asked = _grams(held_out)[scored - 2]
    chances = np.full(len(asked), 1 / VOCAB)
    for level, bits in ((one, BITS), (two, 2 * BITS), (three, 3 * BITS)):
        chances = level.probability(asked & (1 << bits) - 1, chances)
    return math.exp(-np.log(chances).mean())


def _grams(ids: Array) -> Array:
    wide = ids.astype(np.int64)
    return wide[:-2] << 2 * BITS | wide[1:-1] << BITS | wide[2:]


def main(corpus: Path) -> None:
    folder = embedded_path(EMBEDDED_MODEL)
    assert folder is not None
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = python_reference().content
    held_out = np.array(tokenizer.encode(text).ids)
    whole = len(held_out) // WINDOW * WINDOW
    positions = np.arange(2, whole)
    scored = positions[positions % WINDOW != 0]
    training = encode(tokenizer, documents(corpus, text))
    found = perplexity(training, held_out, scored)
    print(f"trigram: perplexity {found:.3f} on {len(scored):,} tokens, counted on {len(training):,}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(str(__doc__))
    main(Path(sys.argv[1]))
