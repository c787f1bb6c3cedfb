"""Weights and caches of real models: published parameter counts, tensors on `meta`, and what vLLM logged."""

from __future__ import annotations

import pytest

from calculators.units import GIB
from quantkit.config import ModelConfig, config_from_dict
from quantkit.estimate import Estimator, Workload, compute_dtype, estimate, kv_layout, weight_bytes
from quantkit.measure.trace import build
from quantkit.models.kv_cache import KVCache
from quantkit.models.loader import TORCH_DTYPES
from quantkit.presets import PRESETS
from quantkit.schemes import SCHEMES, plan_weights

# (architecture, hidden, layers, heads, KV heads, head_dim, FFN, vocabulary, tied) of each config.json on
# the Hub, and the parameters that the Hub counts in its safetensors
REAL = {
    "Llama-3.2-1B": ("Llama", 2048, 16, 32, 8, 64, 8192, 128256, True, 1_235_814_400),
    "Llama-3.2-3B": ("Llama", 3072, 28, 24, 8, 128, 8192, 128256, True, 3_212_749_824),
    "Llama-2-13b-hf": ("Llama", 5120, 40, 40, 40, None, 13824, 32000, False, 13_015_864_320),
    "Llama-3.1-70B": ("Llama", 8192, 80, 64, 8, None, 28672, 128256, False, 70_553_706_496),
    "Mistral-Nemo-Base-2407": ("Mistral", 5120, 40, 32, 8, 128, 14336, 131072, False, 12_247_782_400),
    "Mistral-Small-24B-Base-2501": ("Mistral", 5120, 40, 32, 8, 128, 32768, 131072, False, 23_572_403_200),
    "Qwen2.5-0.5B": ("Qwen2", 896, 24, 14, 2, None, 4864, 151936, True, 494_032_768),
    "Qwen2.5-14B": ("Qwen2", 5120, 48, 40, 8, None, 13824, 152064, False, 14_770_033_664),
    "SmolLM2-1.7B": ("Llama", 2048, 24, 32, 32, None, 8192, 49152, True, 1_711_376_384),
}


def real(name: str) -> ModelConfig:
    family, hidden, layers, heads, kv_heads, head_dim, ffn, vocab, tied, _ = REAL[name]
    raw = {
        "architectures": [f"{family}ForCausalLM"], "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim,
        "intermediate_size": ffn, "vocab_size": vocab, "tie_word_embeddings": tied,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16",
    }  # fmt: skip
    return config_from_dict(raw, name, name)


CONFIGS = {**PRESETS, **{name: real(name) for name in REAL}}


@pytest.mark.parametrize("name", REAL)
def test_parameters_are_the_published_ones(name: str) -> None:
    assert real(name).parameters == REAL[name][-1]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", CONFIGS)
def test_bytes_are_those_of_the_tensors(name: str, scheme: str) -> None:
    config, chosen = CONFIGS[name], SCHEMES[scheme]
    plan = plan_weights(config, chosen)
    decoder = build(config, chosen, plan, "math", "meta")
    assert weight_bytes(config, chosen, plan) == decoder.weights_bytes
    dtype = TORCH_DTYPES[compute_dtype(config, chosen)]
    for bits, group, batch in ((None, 0, 1), (16, 0, 4), (8, 0, 1), (8, 32, 1), (4, 0, 4), (4, 16, 1)):
        cache = KVCache(config, batch, 5000, dtype, bits, "meta", group)
        entry = Estimator(config, chosen, plan).estimate(Workload(5000, batch, bits, group))
        assert entry.kv_cache_bytes == cache.nbytes


@pytest.mark.parametrize(("name", "logged_gib"), [("llama-3.1-8b", 14.99), ("qwen2.5-7b", 14.25)])
def test_what_vllm_logged_is_these_weights_and_its_own_buffers(name: str, logged_gib: float) -> None:
    weights = estimate(PRESETS[name], SCHEMES["bf16"], Workload(1024)).weights_bytes / GIB
    # vLLM's figure also holds its buffers, rotary tables above all: here they are made anew for each chunk
    assert 0.995 * logged_gib < weights < logged_gib


def test_kv_layout_of_a_head_dim_that_is_not_hidden_over_heads() -> None:
    nemo = real("Mistral-Nemo-Base-2407")
    assert nemo.hidden_size // nemo.n_heads == 160
    assert kv_layout(nemo, SCHEMES["bf16"]).token_bytes == 2 * 40 * 8 * 128 * 2
