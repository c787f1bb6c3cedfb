"""Loading: estimated bytes are real bytes, and bad weights are named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.errors import CheckpointError
from quantkit.estimate import weight_bytes
from quantkit.formats.checkpoint import open_checkpoint
from quantkit.models.loader import TORCH_DTYPES, load
from quantkit.schemes import SCHEMES, QuantScheme, plan_weights
from quantkit.tensor import QuantizedTensor
from tests.checkpoints import tiny_config, write_checkpoint

MODELS = {
    "llama-tied": {"architecture": "llama", "tie_embeddings": True},
    "mistral": {"architecture": "mistral"},
    "qwen2": {"architecture": "qwen2", "qkv_bias": True},
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=list(SCHEMES))
@pytest.mark.parametrize("model", MODELS)
def test_estimated_weight_bytes_equal_the_loaded_ones(
    model: str, scheme: QuantScheme, dtype: str, tmp_path: Path
) -> None:
    config = tiny_config(**MODELS[model], dtype=dtype)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "model", config, dtype=dtype, seed=0))
    plan = plan_weights(checkpoint.config, scheme)
    decoder = load(checkpoint, scheme.dtype, plan, backend="reference")
    assert decoder.weights_bytes == weight_bytes(checkpoint.config, scheme, plan)


def test_ragged_matrices_follow_the_policy_in_memory(tmp_path: Path) -> None:
    config = tiny_config(intermediate_size=172)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "model", config, dtype="bf16", seed=0))
    for policy, found in (("short", "int4-g32"), ("int8", "int8"), ("keep", None)):
        plan = plan_weights(checkpoint.config, SCHEMES["int4-g32"], indivisible=policy)
        decoder = load(checkpoint, plan=plan, backend="reference")
        down = decoder.weights["model.layers.0.mlp.down_proj.weight"]
        assert (down.scheme.name if isinstance(down, QuantizedTensor) else None) == found
        assert decoder.weights_bytes == weight_bytes(checkpoint.config, SCHEMES["int4-g32"], plan)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value: float, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model", tiny_config(), dtype="fp32", seed=0)
    name = "model.layers.1.self_attn.k_proj.weight"
    tensors = load_file(path / "model.safetensors")
    tensors[name][3, 5] = value
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name} holds NaN or infinite"):
        load(open_checkpoint(path))


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_a_compute_dtype_casts_plain_tensors_only(dtype: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "model", tiny_config(), dtype="bf16", seed=0))
    decoder = load(checkpoint, dtype, plan_weights(checkpoint.config, SCHEMES["int8"]), backend="reference")
    assert decoder.embedding.dtype == TORCH_DTYPES[dtype]
    q = decoder.weights["model.layers.0.self_attn.q_proj.weight"]
    assert isinstance(q, QuantizedTensor)
    assert q.scales.dtype == torch.bfloat16
