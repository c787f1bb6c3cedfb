"""What int8 and int4 KV caches cost in perplexity, through the real decoder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from quantkit.embedded import EMBEDDED_MODEL, embedded_path
from quantkit.errors import QuantkitError
from quantkit.evaluate.perplexity import Windows, perplexity
from quantkit.evaluate.run import Evaluation
from quantkit.evaluate.texts import Text, text_file
from quantkit.formats.checkpoint import open_checkpoint
from quantkit.models.decoder import Decoder
from quantkit.models.loader import load
from tests.paths import shared_data, smollm2_gguf

INT8_BAR = 1e-3  # of the 16-bit cache's perplexity

Model = tuple[Decoder, list[int]]


def opened(checkpoint: Path, text: Path) -> Model:
    """Return the model in float32, so that only the cache differs, and the text's ids."""
    evaluation = Evaluation(open_checkpoint(checkpoint), text_file(text), dtype="fp32")
    return load(evaluation.checkpoint, "fp32"), evaluation.ids


@pytest.fixture(scope="module")
def stories() -> Model:
    return opened(shared_data("stories260K"), shared_data("text", "tinystories_val_1000.txt"))


def perplexities(model: Model, tokens: int, window: int, caches: list[tuple[int, int]]) -> list[float]:
    """Return the perplexity with each cache, given as (bits, group)."""
    decoder, ids = model
    windows = Windows(window, window)
    return [
        perplexity(decoder, ids[:tokens], windows, bits, kv_group=group).perplexity for bits, group in caches
    ]


def test_int8_is_within_a_thousandth_of_16_bits(stories: Model) -> None:
    half, int8 = perplexities(stories, 40960, 512, [(16, 0), (8, 0)])
    assert abs(int8 / half - 1) <= INT8_BAR


def test_16_bits_cost_nothing_that_shows(stories: Model) -> None:
    exact, half = perplexities(stories, 10240, 512, [(32, 0), (16, 0)])
    assert abs(half / exact - 1) <= INT8_BAR / 2


def test_int4_is_worse_than_int8_and_gains_by_groups(stories: Model) -> None:
    int8, int4, grouped = perplexities(stories, 10240, 512, [(8, 0), (4, 0), (4, 4)])
    assert int8 < grouped < int4


@pytest.mark.slow
def test_int8_is_within_a_thousandth_of_16_bits_on_200704_tokens(stories: Model) -> None:
    half, int8 = perplexities(stories, 200704, 512, [(16, 0), (8, 0)])
    assert abs(int8 / half - 1) <= INT8_BAR


@pytest.mark.slow
def test_int8_is_within_a_thousandth_of_16_bits_on_smollm2() -> None:
    model = opened(smollm2_gguf(), shared_data("text", "wiki.test.raw"))
    half, int8 = perplexities(model, 24576, 1024, [(16, 0), (8, 0)])
    assert abs(int8 / half - 1) <= INT8_BAR


def test_windows_that_no_cache_would_serve_are_refused() -> None:
    folder = embedded_path(EMBEDDED_MODEL)
    assert folder is not None
    checkpoint = open_checkpoint(folder)
    checkpoint.config = replace(checkpoint.config, sliding_window=512)
    text = Text("words", "one two three four five six seven " * 200)
    Evaluation(checkpoint, text, window=512, kv_bits=(8,))
    Evaluation(checkpoint, text, window=1024)
    with pytest.raises(QuantkitError, match="--window 512 or less"):
        Evaluation(checkpoint, text, window=1024, kv_bits=(16, 8))
