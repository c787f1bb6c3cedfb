"""Bytes of a cache: the published figures of Mistral-7B, the window, and how it grows."""

from __future__ import annotations

from dataclasses import replace

import pytest

from calculators.kv_cache import KVLayout, kv_cache_bytes

MISTRAL = KVLayout(layers=32, n_kv_heads=8, head_dim=128, bits=16)


@pytest.mark.parametrize(
    ("bits", "token", "at_32k"),
    [
        (32, 262_144, 8_589_934_592),
        (16, 131_072, 4_294_967_296),
        (8, 66_560, 2_181_038_080),
        (4, 33_792, 1_107_296_256),
    ],
)
def test_mistral_to_the_byte(bits: int, token: int, at_32k: int) -> None:
    layout = replace(MISTRAL, bits=bits)
    assert layout.token_bytes == token
    assert kv_cache_bytes(layout, 32768) == at_32k
    assert str(bits) in layout.describe()


def test_grouped_queries_are_not_ignored() -> None:
    assert kv_cache_bytes(replace(MISTRAL, n_kv_heads=32), 32768) == 17_179_869_184


def test_a_window_bounds_the_cache() -> None:
    assert kv_cache_bytes(MISTRAL, 32768, window=4096) == kv_cache_bytes(MISTRAL, 4096)
    assert kv_cache_bytes(MISTRAL, 100, window=4096) == 100 * MISTRAL.token_bytes


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_batch_multiplies_and_context_adds(bits: int) -> None:
    layout = replace(MISTRAL, bits=bits)
    for context in (1, 17, 4096):
        assert kv_cache_bytes(layout, context, batch=3) == 3 * kv_cache_bytes(layout, context)
        assert kv_cache_bytes(layout, context + 1) - kv_cache_bytes(layout, context) == layout.token_bytes


def test_fewer_bits_take_fewer_bytes() -> None:
    sizes = [replace(MISTRAL, bits=bits).token_bytes for bits in (4, 8, 16, 32)]
    assert sizes == sorted(set(sizes))
