"""Small random checkpoints of any described model, on disk as Hugging Face lays them out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from quantkit.config import ARCHITECTURES, DTYPE_NAMES, ModelConfig

LONG_NAMES = {short: long for long, short in DTYPE_NAMES.items()}
NAMED_MODELS: dict[str, dict[str, Any]] = {
    "llama-tied": {"architecture": "llama", "tie_embeddings": True},
    "mistral-gqa": {"architecture": "mistral"},
    "qwen2-biases": {"architecture": "qwen2", "qkv_bias": True},
}


def tiny_config(**overrides: Any) -> ModelConfig:
    """Return a Mistral of two layers whose rows every offered group divides, with fields overridden."""
    fields: dict[str, Any] = {
        "name": "tiny",
        "architecture": "mistral",
        "vocab_size": 96,
        "hidden_size": 128,
        "intermediate_size": 256,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "head_dim": 32,
        "max_context": 128,
        "rope_theta": 10000.0,
        "norm_eps": 1e-5,
        "dtype": "fp32",
        "bos_token_id": 1,
        "eos_token_ids": (2,),
    }
    return ModelConfig(**{**fields, **overrides})


def hf_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """Return the config.json of a model."""
    raw: dict[str, Any] = {
        "architectures": [name for name, kind in ARCHITECTURES.items() if kind == config.architecture],
        "model_type": config.architecture,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": config.activation,
        "max_position_embeddings": config.max_context,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": LONG_NAMES[dtype],
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
    }
    if config.architecture == "mistral":
        raw["sliding_window"] = config.sliding_window
    if config.architecture == "llama":
        raw |= {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    return raw


def random_tensors(config: ModelConfig, dtype: str, seed: int) -> dict[str, torch.Tensor]:
    """Return random weights for every tensor of a model; norms lie around 1."""
    generator = torch.Generator().manual_seed(seed)
    torch_dtype = getattr(torch, LONG_NAMES[dtype])
    tensors = {}
    for spec in config.tensors:
        scale, centre = (0.1, 1.0) if spec.role == "norm" else (0.05, 0.0)
        values = torch.randn(spec.shape, generator=generator) * scale + centre
        tensors[spec.name] = values.to(torch_dtype)
    return tensors


def write_checkpoint(directory: Path, config: ModelConfig, dtype: str, seed: int, shards: int = 1) -> Path:
    """Write config.json and random weights, in `shards` files with an index where there are several."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(hf_config(config, dtype), indent=2))
    tensors = random_tensors(config, dtype, seed)
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    names = list(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory
