"""Decoding in one call of the extension against the same decoder run operator by operator."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit.formats.checkpoint import open_checkpoint
from quantkit.kernels import native
from quantkit.models.decoder import Decoder
from quantkit.models.loader import load
from quantkit.schemes import SCHEMES, plan_weights
from tests.checkpoints import tiny_config, write_checkpoint

pytestmark = pytest.mark.skipif(native.extension() is None, reason="the extension is not built")

# Attention is rounded to bfloat16 (2**-8) at other places; the residual stream carries that on through the layers.
RELATIVE = 2**-6
MODELS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "window": {"sliding_window": 150},
    "tied": {"architecture": "llama", "tie_embeddings": True},
    "biases": {"architecture": "qwen2", "qkv_bias": True},
    "one-kv-head": {"n_heads": 7, "n_kv_heads": 1, "head_dim": 16},
    "wide-heads": {"n_heads": 3, "n_kv_heads": 3, "head_dim": 80},
}


def make(directory: Path, scheme: str = "int4-g32", **overrides: Any) -> Decoder:
    config = tiny_config(dtype="bf16", max_context=400, **overrides)
    write_checkpoint(directory, config, "bf16", seed=0)
    return load(open_checkpoint(directory), plan=plan_weights(config, SCHEMES[scheme]))


def decode(decoder: Decoder, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """Return the final states of all tokens behind a prompt, decoded one by one (tokens, hidden)."""
    cache = decoder.new_cache(1, ids.shape[1])
    decoder.forward(ids[:, :prompt], cache)
    return torch.cat([decoder.forward(ids[:, at : at + 1], cache)[0] for at in range(prompt, ids.shape[1])])


def by_operators(decoder: Decoder, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    kept, decoder._native = decoder._native, None
    try:
        return decode(decoder, ids, prompt)
    finally:
        decoder._native = kept


def close(got: torch.Tensor, expected: torch.Tensor) -> bool:
    scale = expected.float().abs().amax()
    return ((got.float() - expected.float()).abs().amax() / scale).item() <= RELATIVE


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 96, (1, 280), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("scheme", ["int8", "int4-g32", "nf4", "nf4-dq"])
def test_every_scheme_and_instruction_set(isa: str, scheme: str, tmp_path: Path, ids: torch.Tensor) -> None:
    decoder = make(tmp_path, scheme)
    assert decoder._native is not None
    assert close(decode(decoder, ids, 260), by_operators(decoder, ids, 260))


@pytest.mark.parametrize("name", MODELS)
def test_every_shape_of_model(name: str, tmp_path: Path, ids: torch.Tensor) -> None:
    """From an empty cache through more than two chunks of keys, and round a rolling buffer."""
    decoder = make(tmp_path, **MODELS[name])
    assert decoder._native is not None
    assert close(decode(decoder, ids, 1), by_operators(decoder, ids, 1))


@pytest.mark.parametrize("name", MODELS)
def test_prompts_in_chunks_by_both_attentions(name: str, tmp_path: Path, ids: torch.Tensor) -> None:
    decoder, results = make(tmp_path, **MODELS[name]), []
    for path in ("native", "sdpa"):
        decoder.attention, cache = path, decoder.new_cache(1, 280)
        results.append(
            torch.cat([decoder.forward(piece, cache) for piece in ids.split([90, 7, 183], dim=1)], 1)
        )
    assert close(*results)


def test_threads_give_the_same_bits(tmp_path: Path, ids: torch.Tensor) -> None:
    decoder, before = make(tmp_path), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(decode(decoder, ids, 200))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_the_cache_is_the_same_for_both(tmp_path: Path, ids: torch.Tensor) -> None:
    decoder = make(tmp_path)
    caches = [decoder.new_cache(1, 8) for _ in range(2)]
    for token in range(5):
        decoder.forward(ids[:, token : token + 1], caches[0])
    kept, decoder._native = decoder._native, None
    for token in range(5):
        decoder.forward(ids[:, token : token + 1], caches[1])
    decoder._native = kept
    slabs = [cache.plain for cache in caches]
    assert caches[0].length == caches[1].length == 5
    assert slabs[0] is not None
    assert slabs[1] is not None
    assert torch.equal(slabs[0][0], slabs[1][0])  # of the first layer, before attention rounds
    assert close(slabs[0], slabs[1])


def test_what_it_does_not_take_runs_by_operators(tmp_path: Path, ids: torch.Tensor) -> None:
    decoder = make(tmp_path)
    native_decoder = decoder._native
    assert native_decoder is not None
    x = torch.zeros(1, 1, 128, dtype=torch.bfloat16)
    assert native_decoder.takes(x, decoder.new_cache(1, 4))
    assert not native_decoder.takes(x, decoder.new_cache(1, 4, kv_bits=8))
    assert not native_decoder.takes(x.expand(2, 1, 128), decoder.new_cache(2, 4))
    assert not native_decoder.takes(x.expand(1, 2, 128), decoder.new_cache(1, 4))
    config = replace(tiny_config(dtype="bf16"), head_dim=24)
    write_checkpoint(tmp_path / "odd", config, "bf16", seed=0)
    odd = load(open_checkpoint(tmp_path / "odd"), plan=plan_weights(config, SCHEMES["int8"]))
    assert odd._native is None
    assert load(open_checkpoint(tmp_path / "odd"))._native is None


def test_nan_reaches_the_states(tmp_path: Path, ids: torch.Tensor) -> None:
    decoder = make(tmp_path)
    decoder.embedding[5] = float("nan")
    assert decode(decoder, torch.tensor([[1, 5]]), 1).isnan().all()


def test_bad_arguments_name_themselves(tmp_path: Path) -> None:
    module = native.require()
    shape: dict[str, Any] = {
        "hidden": 128, "ffn": 256, "n_heads": 4, "n_kv_heads": 2, "head_dim": 32, "eps": 1e-5,
        "norm": torch.ones(128, dtype=torch.bfloat16),
    }  # fmt: skip
    for wrong, message in (
        ({"hidden": 120}, "hidden, ffn and head_dim must be multiples of 16"),
        ({"n_kv_heads": 3}, "n_kv_heads must divide n_heads"),
        ({"norm": torch.ones(127, dtype=torch.bfloat16)}, "norm has 127 elements, not 128"),
        ({"norm": torch.ones(128)}, "norm has the wrong dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            module.Model(**{**shape, **wrong})
    decoder = make(tmp_path)
    assert decoder._native is not None
    model = decoder._native._model
    cache = decoder.new_cache(1, 8).plain
    assert cache is not None
    row, angle = torch.zeros(128, dtype=torch.bfloat16), torch.zeros(32, dtype=torch.bfloat16)
    good: dict[str, Any] = {
        "x": row, "cos": angle, "sin": angle, "cache": cache, "slot": 0, "keys": 1,
        "states": row.clone(), "threads": 1,
    }  # fmt: skip
    model.run(**good)
    for wrong, message in (
        ({"x": row[:-1]}, "x has 127 elements"),
        ({"x": row.float()}, "x has the wrong dtype"),
        ({"cos": angle[::2]}, "cos is not contiguous"),
        ({"cache": cache[:1]}, r"cache must be \(2, 2, 1, 2, slots, 32\)"),
        ({"keys": 9}, "slot and keys must lie within the cache's slots"),
        ({"slot": 1}, "slot and keys must lie within the cache's slots"),
        ({"slot": -1}, "slot and keys must lie within the cache's slots"),
        ({"threads": 0}, "threads must be 1 to 1024"),
    ):
        with pytest.raises(ValueError, match=message):
            model.run(**{**good, **wrong})
