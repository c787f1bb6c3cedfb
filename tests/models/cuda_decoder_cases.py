"""Whole tokens and prompts by the CUDA kernels against the operators: on a GPU, or in Triton's interpreter.

`tests/kernels/test_step.py` runs this file by `tests/kernels/cases.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quantkit.models.kv_cache import KVCache
from quantkit.models.linear import Linear
from tests.kernels.cases import DEVICE
from tests.models.cuda_decoders import decode, distance, make, random_ids

# Attention keeps float32 where the operators round to bfloat16 (2**-8); where they dequantize keys and values of 8
# and 4 bits to bfloat16 before they multiply, it does not. The residual stream carries that on.
RELATIVE = {16: 2.0**-6, 8: 2.0**-5, 4: 2.0**-5}
# scheme, KV bits, KV group, batch, overrides
CASES: dict[str, tuple[str, int, int, int, dict[str, Any]]] = {
    "bf16": ("bf16", 16, 0, 1, {}),
    "bf16-tied-biases-kv4": (
        "bf16", 4, 0, 2, {"architecture": "qwen2", "qkv_bias": True, "tie_embeddings": True}
    ),
    "int8-kv8-one-row": ("int8", 8, 0, 1, {"n_layers": 1}),
    "int4-window-kv16": ("int4-g32", 16, 0, 2, {"sliding_window": 4}),
    "int4-biases-kv4": ("int4-g64", 4, 0, 2, {"architecture": "llama", "qkv_bias": True, "mlp_bias": True}),
    "nf4-window-kv8-g16": ("nf4", 8, 16, 2, {"sliding_window": 5, "intermediate_size": 128}),
    "nf4-dq-apart": ("nf4-dq", 16, 0, 2, {"head_dim": 32, "intermediate_size": 128}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_every_token_is_the_operators(name: str) -> None:
    scheme, bits, group, batch, overrides = CASES[name]
    ids = random_ids(batch, 6, DEVICE)
    decoders = [make(scheme, torch.bfloat16, DEVICE, fused, **overrides) for fused in (True, False)]
    assert decoders[0]._cuda is not None
    found, expected = (decode(decoder, ids, 3, bits, group) for decoder in decoders)
    assert distance(found, expected) <= RELATIVE[bits]


@pytest.mark.parametrize("name", ["bf16-tied-biases-kv4", "nf4-window-kv8-g16"])
def test_prompts_are_the_operators(name: str) -> None:
    """Two chunks, of which the second sees the first, and what they leave in a cache that has not rolled yet."""
    scheme, bits, group, batch, overrides = CASES[name]
    ids = random_ids(batch, 6, DEVICE)
    states, caches = [], []
    for fused in (True, False):
        window = {"sliding_window": 6} if "sliding_window" in overrides else {}
        decoder = make(scheme, torch.bfloat16, DEVICE, fused, **overrides | window)
        caches.append(decoder.new_cache(batch, 7, bits, group))
        assert (decoder._cuda is not None) == fused
        assert decoder._cuda is None or decoder._cuda.takes(ids, caches[-1])
        chunks = [decoder.forward(piece, caches[-1]) for piece in (ids[:, :4], ids[:, 4:])]
        states.append(torch.cat(chunks, dim=1).float())
    assert states[0].shape == (batch, 6, 64)
    assert distance(*states) <= RELATIVE[bits]
    assert [cache.length for cache in caches] == [6, 6]
    held = [torch.stack(cache.held(0, 6)).float() for cache in caches]
    step = {16: 2.0**-7, 8: 2.0**-6, 4: 2.0**-2}[bits]  # a code on an edge may fall to either side
    assert distance(*held) <= step


def test_float16() -> None:
    ids = random_ids(2, 5, DEVICE)
    found, expected = (
        decode(make("int8", torch.float16, DEVICE, fused), ids, 3, 8) for fused in (True, False)
    )
    assert distance(found, expected) <= 2.0**-8


def test_prefills_in_between_and_states() -> None:
    """The device's count of tokens follows the cache's, whoever advanced it."""
    ids, runs = random_ids(2, 9, DEVICE), []
    for fused in (True, False):
        decoder = make("bf16", torch.bfloat16, DEVICE, fused)
        cache, logits = decoder.new_cache(2, 9), []
        for start, stop in ((0, 1), (1, 2), (2, 5), (5, 6)):
            logits.append(decoder.prefill(ids[:, start:stop], cache))
        states = [decoder.forward(ids[:, at : at + 1], cache) for at in (6, 7)]
        assert states[0].shape == (2, 1, 64)
        logits += [decoder.logits(each)[:, -1] for each in states]
        cache.length = 6  # again
        assert torch.equal(decoder.forward(ids[:, 6:7], cache), states[0])
        runs.append(torch.stack(logits))
    assert distance(*runs) <= RELATIVE[16]


def test_a_token_that_failed_is_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it stands is not what its first run left."""
    decoder, ids = make("bf16", torch.bfloat16, DEVICE), random_ids(1, 5, DEVICE)
    expected = decode(decoder, ids, 2)
    assert decoder._cuda is not None
    head, call = decoder._cuda._layers.head, Linear.__call__

    def refuse(linear: Linear, x: torch.Tensor) -> torch.Tensor:
        if linear is head:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return call(linear, x)

    cache = decoder.new_cache(1, 5)
    decoder.prefill(ids[:, :2], cache)
    found = []
    for token in ids[:, 2:].split(1, dim=1):
        with monkeypatch.context() as patch:
            patch.setattr(Linear, "__call__", refuse)
            with pytest.raises(torch.OutOfMemoryError):
                decoder.prefill(token, cache)
        found.append(decoder.prefill(token, cache))
    assert torch.equal(torch.stack(found), expected[1:])


def test_what_it_does_not_take_runs_by_operators() -> None:
    decoder = make("bf16", torch.bfloat16, DEVICE)
    taken = decoder._cuda
    assert taken is not None
    one = random_ids(2, 1, DEVICE)

    def cache(batch: int = 2, bits: int | None = None, group: int = 0) -> KVCache:
        return decoder.new_cache(batch, 4, bits, group)

    assert all(taken.takes(one, cache(bits=bits)) for bits in (None, 16, 8, 4))
    assert taken.takes(one, cache(bits=8, group=8))
    assert not taken.takes(one, cache(bits=8, group=4))
    assert not taken.takes(one, cache(bits=32))
    assert not taken.takes(one, cache(batch=3))
    assert not taken.takes(random_ids(65, 1, DEVICE), cache(batch=65))
    assert taken.takes(random_ids(65, 2, DEVICE), cache(batch=65))
    assert taken.takes(random_ids(2, 2, DEVICE), cache())
    rolling = make("bf16", torch.bfloat16, DEVICE, sliding_window=3)
    assert rolling._cuda is not None
    assert rolling._cuda.takes(one, rolling.new_cache(2, 4))
    assert rolling._cuda.takes(random_ids(2, 3, DEVICE), rolling.new_cache(2, 4))
    assert not rolling._cuda.takes(random_ids(2, 4, DEVICE), rolling.new_cache(2, 4))
    assert not rolling._cuda.takes(random_ids(2, 0, DEVICE), rolling.new_cache(2, 4))
    assert make("bf16", torch.float32, DEVICE)._cuda is None
    assert make("bf16", torch.bfloat16, DEVICE, fused=False)._cuda is None
    assert make("nf4", torch.bfloat16, DEVICE, hidden_size=96)._cuda is None  # blocks run across rows


def test_a_full_cache_is_refused() -> None:
    decoder = make("bf16", torch.bfloat16, DEVICE)
    cache = decoder.new_cache(1, 1)
    decoder.prefill(random_ids(1, 1, DEVICE), cache)
    with pytest.raises(Exception, match="the cache was made for 1 tokens"):
        decoder.prefill(random_ids(1, 1, DEVICE), cache)


def test_what_belongs_to_a_cache_goes_with_it() -> None:
    decoder = make("bf16", torch.bfloat16, DEVICE)
    assert decoder._cuda is not None
    caches = [decoder.new_cache(1, 4) for _ in range(2)]
    for cache in caches:
        decoder.prefill(random_ids(1, 1, DEVICE), cache)
    del cache
    assert len(decoder._cuda._runs) == 2
    caches.pop()
    assert len(decoder._cuda._runs) == 1
