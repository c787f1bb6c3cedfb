"""Bytes and contents of the KV cache at every precision."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from calculators.kv_cache import KVLayout, kv_cache_bytes
from quantkit.errors import QuantkitError
from quantkit.models.kv_cache import KVCache
from quantkit.presets import PRESETS

CONFIG = replace(PRESETS["smollm2-135m"], n_layers=2)


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
@pytest.mark.parametrize("window", [None, 5, 64])
@pytest.mark.parametrize("batch", [1, 3])
def test_estimated_bytes_equal_the_caches(bits: int, window: int | None, batch: int) -> None:
    config = replace(CONFIG, sliding_window=window)
    cache = KVCache(config, batch, 17, torch.float32 if bits == 32 else torch.bfloat16, bits)
    layout = KVLayout(config.n_layers, config.n_kv_heads, config.head_dim, bits)
    assert cache.nbytes == kv_cache_bytes(layout, 17, batch, window)


# half of the widest step that is tried; int4 may also cut off 1.5 of 9.5 steps
@pytest.mark.parametrize(("bits", "bound"), [(8, 1 / 128), (4, 2.5 / 9.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantized_values_come_back_within_their_bound(bits: int, bound: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    cache = KVCache(CONFIG, 1, 9, dtype, bits)
    k, v = (torch.randn(1, 9, CONFIG.n_kv_heads, CONFIG.head_dim).to(dtype) for _ in range(2))
    for given, loaded in zip((k, v), cache.extend(0, k, v), strict=True):
        stored = given.transpose(1, 2)
        absmax = stored.abs().amax(-1, keepdim=True).float()
        assert loaded.dtype == dtype
        # what rounding the result to 8 bits of mantissa adds
        assert ((loaded.float() - stored.float()).abs() <= absmax * (bound + 2 * 2.0**-8)).all()


def test_zeros_stay_zeros() -> None:
    cache = KVCache(CONFIG, 1, 2, torch.bfloat16, 4)
    zeros = torch.zeros(1, 2, CONFIG.n_kv_heads, CONFIG.head_dim, dtype=torch.bfloat16)
    keys, values = cache.extend(1, zeros, zeros)
    assert not keys.any()
    assert not values.any()


def test_a_full_cache_is_refused_with_the_counts() -> None:
    cache = KVCache(CONFIG, 1, 4, torch.float32)
    cache.advance(3)
    with pytest.raises(QuantkitError, match=r"made for 4 tokens; 3 are in it and 2 more"):
        cache.check_room(2)
