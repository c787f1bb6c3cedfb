"""The CPU's attention of many queries against float64, for every instruction set this machine has."""

from __future__ import annotations

import math

import pytest
import torch

from quantkit.kernels import native

pytestmark = pytest.mark.skipif(native.extension() is None, reason="the extension is not built")

# B, T, S, n_heads, n_kv_heads, head_dim, window
SHAPES = [
    (1, 64, 64, 8, 2, 128, None),
    (2, 37, 300, 9, 3, 64, None),
    (1, 1, 513, 4, 2, 256, None),
    (2, 5, 5, 4, 1, 16, None),
    (1, 100, 700, 4, 4, 48, 64),
    (1, 33, 600, 2, 2, 80, 100),
    (1, 40, 40, 2, 1, 96, 1),
]


def heads(batch: int, count: int, n_heads: int, head_dim: int, seed: int) -> torch.Tensor:
    """Return (B, n_heads, S, head_dim), a view into slots that hold more."""
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randn(batch, n_heads, count + 3, head_dim, generator=generator).bfloat16()
    return slots[:, :, :count]


def exact(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int | None) -> torch.Tensor:
    """Return causal attention (B, T, n_heads, head_dim) in float64."""
    tokens, count, group = q.shape[1], keys.shape[2], q.shape[2] // keys.shape[1]
    k, v = (each.double().repeat_interleave(group, 1) for each in (keys, values))
    scores = q.double().transpose(1, 2) @ k.mT / math.sqrt(q.shape[3])
    places, queries = torch.arange(count), torch.arange(count - tokens, count)[:, None]
    hidden = (places > queries) | (places <= queries - (window or count))
    return (scores.masked_fill(hidden, -math.inf).softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_equals_float64(shape: tuple[int, ...], isa: str) -> None:
    batch, tokens, count, n_heads, n_kv_heads, head_dim, window = shape
    q = heads(batch, tokens, n_heads, head_dim, 0).transpose(1, 2)
    keys, values = (heads(batch, count, n_kv_heads, head_dim, seed) for seed in (1, 2))
    expected = exact(q, keys, values, window)
    # the result is rounded to bfloat16; so are softmax's powers, relative to a sum of them all
    magnitude = exact(q, keys, values.abs(), window)
    allowed = 2.0**-8 * expected.abs() + (2.0**-8 + count * 2.0**-24) * magnitude + 1e-30
    error = (native.attention(q, keys, values, window).double() - expected).abs()
    assert (error <= allowed).all(), (error / allowed).max()


def test_threads_and_runs_give_the_same_bits(isa: str) -> None:
    q = heads(1, 90, 6, 64, 0).transpose(1, 2)  # not contiguous
    keys, values = heads(1, 400, 2, 64, 1), heads(1, 400, 2, 64, 2)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 3, 3):
            torch.set_num_threads(count)
            results.append(native.attention(q, keys, values))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[1], results[2])


def test_what_no_query_may_see_does_not_matter(isa: str) -> None:
    q, keys, values = heads(1, 8, 4, 32, 0).transpose(1, 2), heads(1, 300, 2, 32, 1), heads(1, 300, 2, 32, 2)
    expected = native.attention(q, keys, values, window=20)
    keys[:, :, :200], values[:, :, :200] = 1e30, 1e30
    assert torch.equal(native.attention(q, keys, values, window=20), expected)


def test_positions_may_lie_apart(isa: str) -> None:
    q, keys, values = heads(1, 9, 4, 32, 0).transpose(1, 2), heads(2, 40, 2, 32, 1), heads(2, 40, 2, 32, 2)
    q = q.expand(2, -1, -1, -1)
    apart = [each.transpose(1, 2).contiguous().transpose(1, 2) for each in (keys, values)]
    assert apart[0].stride() != keys.stride()
    assert torch.equal(native.attention(q, *apart), native.attention(q, keys, values))


def test_large_scores_neither_overflow_nor_vanish(isa: str) -> None:
    q = 30 * heads(1, 30, 4, 64, 0).transpose(1, 2)
    keys, values = 30 * heads(1, 300, 2, 64, 1), heads(1, 300, 2, 64, 2)
    error = (native.attention(q, keys, values).double() - exact(q, keys, values, None)).abs()
    largest = (q.float().norm(dim=-1).max() * keys.float().norm(dim=-1).max() / 8).item()  # score
    assert error.max() <= (2.0**-7 + 2 * (64 + 8) * 2.0**-24 * largest) * values.abs().max()


def test_a_nan_stays_with_the_queries_that_see_it(isa: str) -> None:
    q, keys, values = heads(1, 20, 2, 32, 0).transpose(1, 2), heads(1, 20, 2, 32, 1), heads(1, 20, 2, 32, 2)
    keys[:, :, 7, 3] = torch.nan
    found = native.attention(q, keys, values).isnan()
    assert found[:, 7:].all()
    assert not found[:, :7].any()


def test_the_operator_has_a_fake() -> None:
    q, keys, values = (heads(1, 4, 2, 16, seed) for seed in range(3))
    torch.library.opcheck(torch.ops.quantkit.attention.default, (q.transpose(1, 2), keys, values, 4))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("q", torch.zeros(1, 4, 4, 32), "q has the wrong dtype"),
        ("q", torch.zeros(1, 4, 32).bfloat16(), "q must have four dimensions"),
        ("q", torch.zeros(1, 9, 4, 32).bfloat16(), "keys are fewer"),
        ("q", torch.zeros(1, 4, 3, 32).bfloat16(), "must divide"),
        ("keys", torch.zeros(1, 2, 32, 8).bfloat16().mT, "keys has a last dimension that is not contiguous"),
        ("keys", torch.zeros(1, 2, 8, 16).bfloat16(), "values must have the shape of keys"),
        ("values", torch.zeros(1, 2, 8, 32).half(), "values has the wrong dtype"),
        ("out", torch.zeros(3).bfloat16(), "out has 3 elements"),
        ("window", 0, "window must be"),
        ("threads", 0, "threads must be"),
    ],
)
def test_bad_input_is_named(name: str, value: object, words: str) -> None:
    q, keys = torch.zeros(1, 4, 4, 32).bfloat16(), torch.zeros(1, 2, 8, 32).bfloat16()
    given = {
        "q": q,
        "keys": keys,
        "values": keys.clone(),
        "out": torch.empty_like(q),
        "window": 8,
        "threads": 1,
    }
    given |= {name: value}
    if name == "q" and isinstance(value, torch.Tensor):
        given["out"] = torch.empty_like(value).bfloat16()
    with pytest.raises(ValueError, match=words):
        native.require().attend(**given)
