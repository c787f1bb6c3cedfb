"""Models that can be estimated by name. Each restates the config.json at its URL."""

from __future__ import annotations

from dataclasses import replace

from quantkit.config import ModelConfig, RopeScaling

DEFAULT_PRESET = "mistral-7b-instruct-v0.2"

# https://huggingface.co/mistralai/Mistral-7B-Instruct-v0.2/blob/main/config.json
_MISTRAL_V2 = ModelConfig(
    name="mistral-7b-instruct-v0.2", architecture="mistral", vocab_size=32000, hidden_size=4096,
    intermediate_size=14336, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128, max_context=32768,
    rope_theta=1e6, norm_eps=1e-5, bos_token_id=1, eos_token_ids=(2,),
)  # fmt: skip

_PRESETS = (
    _MISTRAL_V2,
    # https://huggingface.co/mistralai/Mistral-7B-v0.1/blob/main/config.json
    replace(_MISTRAL_V2, name="mistral-7b-v0.1", rope_theta=1e4, sliding_window=4096),
    # https://huggingface.co/mistralai/Mistral-7B-Instruct-v0.1/blob/main/config.json
    replace(_MISTRAL_V2, name="mistral-7b-instruct-v0.1", rope_theta=1e4, sliding_window=4096),
    # https://huggingface.co/mistralai/Mistral-7B-v0.3/blob/main/config.json
    replace(_MISTRAL_V2, name="mistral-7b-v0.3", vocab_size=32768),
    # https://huggingface.co/mistralai/Mistral-7B-Instruct-v0.3/blob/main/config.json
    replace(_MISTRAL_V2, name="mistral-7b-instruct-v0.3", vocab_size=32768),
    # https://huggingface.co/meta-llama/Llama-2-7b-hf/blob/main/config.json
    ModelConfig(
        name="llama-2-7b", architecture="llama", vocab_size=32000, hidden_size=4096,
        intermediate_size=11008, n_layers=32, n_heads=32, n_kv_heads=32, head_dim=128,
        max_context=4096, rope_theta=1e4, norm_eps=1e-5, dtype="fp16", bos_token_id=1, eos_token_ids=(2,),
    ),
    # https://huggingface.co/meta-llama/Llama-3.1-8B/blob/main/config.json
    ModelConfig(
        name="llama-3.1-8b", architecture="llama", vocab_size=128256, hidden_size=4096,
        intermediate_size=14336, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128,
        max_context=131072, rope_theta=5e5, norm_eps=1e-5, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
        bos_token_id=128000, eos_token_ids=(128001,),
    ),
    # https://huggingface.co/TinyLlama/TinyLlama-1.1B-Chat-v1.0/blob/main/config.json
    ModelConfig(
        name="tinyllama-1.1b", architecture="llama", vocab_size=32000, hidden_size=2048,
        intermediate_size=5632, n_layers=22, n_heads=32, n_kv_heads=4, head_dim=64,
        max_context=2048, rope_theta=1e4, norm_eps=1e-5, bos_token_id=1, eos_token_ids=(2,),
    ),
    # https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct/blob/main/config.json
    ModelConfig(
        name="smollm2-135m", architecture="llama", vocab_size=49152, hidden_size=576,
        intermediate_size=1536, n_layers=30, n_heads=9, n_kv_heads=3, head_dim=64, max_context=8192,
        rope_theta=1e5, norm_eps=1e-5, tie_embeddings=True, bos_token_id=1, eos_token_ids=(2,),
    ),
    # https://huggingface.co/Qwen/Qwen2.5-7B-Instruct/blob/main/config.json
    ModelConfig(
        name="qwen2.5-7b", architecture="qwen2", vocab_size=152064, hidden_size=3584,
        intermediate_size=18944, n_layers=28, n_heads=28, n_kv_heads=4, head_dim=128,
        max_context=32768, rope_theta=1e6, norm_eps=1e-6, qkv_bias=True, bos_token_id=151643,
        eos_token_ids=(151645, 151643),
    ),
)  # fmt: skip

PRESETS: dict[str, ModelConfig] = {preset.name: preset for preset in _PRESETS}
