"""A trained model against what transformers and bitsandbytes give for it (its REFERENCE.json)."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from calculators.weights import matrix_bytes, plain_bytes
from quantkit.evaluate.perplexity import Windows, perplexity
from quantkit.evaluate.run import Evaluation
from quantkit.evaluate.texts import text_file
from quantkit.formats.checkpoint import Checkpoint, open_checkpoint
from quantkit.models.generate import generate
from quantkit.models.loader import load
from quantkit.schemes import SCHEMES, get_scheme, plan_weights
from tests.paths import shared_data

PROTOCOLS = {"N=20480 W=512": (20480, 512), "N=20480 W=256": (20480, 256), "N=200704 W=512": (200704, 512)}
EXACT = {
    "fp32": "fp32",
    "int8": "int8 (absmax/127 a row)",
    "nf4": "nf4 (bitsandbytes, block 64 over the flattened matrix)",
    "nf4-dq": "nf4-dq (bitsandbytes, compress_statistics)",
}
AT_LEAST_AS_GOOD = {
    "int4-g32": "int4-g32 round-to-nearest, absmax/7.5",
    "int4-g64": "int4-g64 round-to-nearest, absmax/7.5",
}


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    return json.loads(shared_data("stories260K", "REFERENCE.json").read_text())


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint(shared_data("stories260K"))


@pytest.fixture(scope="module")
def ids(checkpoint: Checkpoint) -> list[int]:
    return Evaluation(checkpoint, text_file(shared_data("text", "tinystories_val_1000.txt"))).ids


def nll(checkpoint: Checkpoint, ids: list[int], scheme: str, protocol: str) -> float:
    tokens, window = PROTOCOLS[protocol]
    decoder = load(checkpoint, plan=plan_weights(checkpoint.config, get_scheme(scheme)))
    return perplexity(decoder, ids[:tokens], Windows(window, window)).nll


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("scheme", EXACT)
def test_nll_equals_the_reference(
    scheme: str, protocol: str, checkpoint: Checkpoint, ids: list[int], reference: dict[str, Any]
) -> None:
    expected = reference["perplexity"][EXACT[scheme]][protocol]["nll"]
    assert nll(checkpoint, ids, scheme, protocol) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("scheme", AT_LEAST_AS_GOOD)
def test_int4_is_at_least_as_good_as_round_to_nearest(
    scheme: str, protocol: str, checkpoint: Checkpoint, ids: list[int], reference: dict[str, Any]
) -> None:
    given = reference["perplexity"][AT_LEAST_AS_GOOD[scheme]][protocol]["nll"]
    assert nll(checkpoint, ids, scheme, protocol) <= given


def test_ids_and_tokens_scored_are_the_references(ids: list[int], reference: dict[str, Any]) -> None:
    assert len(ids) == reference["ids_total"]
    assert ids[:16] == reference["first_ids"]


def test_greedy_ids_and_logits_are_the_references(checkpoint: Checkpoint, reference: dict[str, Any]) -> None:
    decoder = load(checkpoint)
    prompt = reference["greedy_prompt_ids"]
    logits = decoder.prefill(torch.tensor([prompt]), decoder.new_cache(1, len(prompt)))[0]
    for token, value in reference["top5_after_Once_upon_a_time"]:
        assert logits[token].item() == pytest.approx(value, abs=1e-4 * logits.max().item())
    assert logits.topk(5).indices.tolist() == [token for token, _ in reference["top5_after_Once_upon_a_time"]]
    new_ids = reference["greedy_new_ids"]
    assert list(generate(decoder, prompt, len(new_ids))) == new_ids
    assert checkpoint.tokenizer().decode(prompt + new_ids).strip() == reference["greedy_text"]


@pytest.mark.parametrize("scheme", [name for name, scheme in SCHEMES.items() if scheme.quantized])
def test_every_linear_has_its_stated_bits(scheme: str, checkpoint: Checkpoint) -> None:
    wanted = get_scheme(scheme)
    config = checkpoint.config
    decoder = load(checkpoint, plan=plan_weights(config, wanted), backend="reference")
    total = 0
    for spec in config.tensors:
        if spec.is_block_linear:
            rows, cols = spec.shape
            expected = matrix_bytes(rows, cols, wanted.packing(config.dtype)).total
            assert decoder.weights[spec.name].nbytes == expected, spec.name
        else:
            expected = plain_bytes(spec.elements, config.dtype_bits)
        total += expected
    assert decoder.weights_bytes == total
