"""One GPU's share under tensor parallelism."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from calculators.kv_cache import kv_cache_bytes
from quantkit.config import ModelConfig
from quantkit.errors import ConfigError
from quantkit.estimate import kv_layout, weight_bytes
from quantkit.presets import PRESETS
from quantkit.schemes import SCHEMES, plan_weights
from quantkit.shard import shard
from tests.checkpoints import tiny_config

MISTRAL, QWEN = PRESETS["mistral-7b-instruct-v0.2"], PRESETS["qwen2.5-7b"]
SHARES = [
    pytest.param(config, n, id=f"{config.name}-{n}")
    for config in PRESETS.values()
    for n in range(1, 33)
    if config.n_heads % n == 0
]


def elements_by_role(config: ModelConfig) -> Counter[str]:
    counts: Counter[str] = Counter()
    for spec in config.tensors:
        counts[spec.role] += spec.elements
    return counts


@pytest.mark.parametrize("config", PRESETS.values(), ids=lambda config: config.name)
def test_one_gpu_holds_the_model_itself(config: ModelConfig) -> None:
    assert shard(config, 1) is config


@pytest.mark.parametrize(("config", "n"), SHARES)
def test_shares_add_up_to_the_whole_or_more(config: ModelConfig, n: int) -> None:
    share = shard(config, n)
    whole, part = elements_by_role(config), elements_by_role(share)
    for role, elements in whole.items():
        assert n * part[role] >= elements
    assert part["norm"] == whole["norm"]
    for scheme in (SCHEMES["bf16"], SCHEMES["int4-g128"], SCHEMES["nf4-dq"]):
        bytes_of = [weight_bytes(one, scheme, plan_weights(one, scheme)) for one in (config, share)]
        assert n * bytes_of[1] >= bytes_of[0]
        caches = [kv_cache_bytes(kv_layout(one, scheme, 8), 4096) for one in (config, share)]
        assert n * caches[1] >= caches[0]


def test_a_share_of_mistral_to_the_byte() -> None:
    half = shard(MISTRAL, 2)
    assert (half.n_heads, half.n_kv_heads, half.intermediate_size, half.vocab_size) == (16, 4, 7168, 16000)
    assert (half.hidden_size, half.head_dim) == (4096, 128)
    assert half.parameters == (MISTRAL.parameters - 266_240) // 2 + 266_240


@pytest.mark.parametrize(("config", "n"), SHARES)
def test_kv_heads_are_split_or_replicated_as_vllm_does(config: ModelConfig, n: int) -> None:
    if config.n_kv_heads % n == 0 or n % config.n_kv_heads == 0:
        assert shard(config, n).n_kv_heads == max(1, config.n_kv_heads // n)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "n", "held"),
    [
        (24, 8, 3, 4),  # queries 8-15 read heads 2-5
        (12, 4, 3, 2),  # queries 4-7 read heads 1 and 2
        (12, 4, 6, 2),  # queries 2 and 3 read heads 0 and 1
        (40, 8, 5, 4),  # queries 8-15 read heads 1-3; 3 do not divide 8 queries
    ],
)
def test_kv_heads_that_do_not_divide_lie_on_two_gpus(heads: int, kv_heads: int, n: int, held: int) -> None:
    config = replace(MISTRAL, n_heads=heads, n_kv_heads=kv_heads)
    assert shard(config, n).n_kv_heads == held


def test_vocabulary_and_ffn_are_padded() -> None:
    share = shard(replace(MISTRAL, vocab_size=32001, intermediate_size=14337), 2)
    assert share.vocab_size == 32064 // 2
    assert share.intermediate_size == 7169


def test_biases_follow_their_rows() -> None:
    config = tiny_config(qkv_bias=True, o_bias=True, mlp_bias=True)
    shapes = {spec.name.removeprefix("model.layers.0."): spec.shape for spec in shard(config, 2).tensors}
    assert shapes["self_attn.q_proj.bias"] == (config.n_heads // 2 * config.head_dim,)
    assert shapes["mlp.up_proj.bias"] == (config.intermediate_size // 2,)
    assert shapes["self_attn.o_proj.bias"] == shapes["mlp.down_proj.bias"] == (config.hidden_size,)


def test_what_does_not_divide_is_refused_with_what_does() -> None:
    with pytest.raises(
        ConfigError, match="28 query heads cannot be split over 8 GPUs; possible are 1, 2, 4, 7, 14, 28"
    ):
        shard(QWEN, 8)
    with pytest.raises(ConfigError, match="over 0 GPUs"):
        shard(QWEN, 0)
