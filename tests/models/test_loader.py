"""Loading: estimated bytes are real bytes, and bad weights are named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.errors import CheckpointError
from quantkit.estimate import weight_bytes
from quantkit.formats.checkpoint import open_checkpoint
from quantkit.kernels import native
from quantkit.models.loader import TORCH_DTYPES, load
from quantkit.quantize.convert import convert
from quantkit.schemes import SCHEMES, QuantScheme, int_scheme, plan_weights
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


@pytest.mark.skipif(native.extension() is None, reason="the extension is not built")
@pytest.mark.parametrize(
    "scheme", [SCHEMES["int4-g32"], SCHEMES["nf4-dq"], int_scheme(4, 4, True)], ids=lambda scheme: scheme.name
)
def test_memory_that_is_used_again_holds_nothing_of_the_model(scheme: QuantScheme, tmp_path: Path) -> None:
    """Groups of 4 are not repacked: such matrices stay in the memory they were read into."""
    source = write_checkpoint(tmp_path / "model", tiny_config(), dtype="bf16", seed=0)
    convert(open_checkpoint(source), tmp_path / "out", scheme)
    checkpoint = open_checkpoint(tmp_path / "out")
    read, mapped = load(checkpoint, "fp32", backend="native"), load(checkpoint, "fp32", backend="reference")
    assert any(isinstance(weight, QuantizedTensor) for weight in read.weights.values()) == (scheme.group == 4)
    ids = torch.arange(24)[None] % checkpoint.config.vocab_size
    found, expected = (model.prefill(ids, model.new_cache(1, 24)) for model in (read, mapped))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


@pytest.mark.skipif(native.extension() is None, reason="the extension is not built")
def test_a_file_that_shrinks_is_refused(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", tiny_config(), dtype="bf16", seed=0)
    convert(open_checkpoint(source), tmp_path / "out", SCHEMES["nf4"])
    checkpoint, file = open_checkpoint(tmp_path / "out"), tmp_path / "out" / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="has become shorter"):
        load(checkpoint)
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        load(checkpoint)


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_a_compute_dtype_casts_plain_tensors_only(dtype: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "model", tiny_config(), dtype="bf16", seed=0))
    decoder = load(checkpoint, dtype, plan_weights(checkpoint.config, SCHEMES["int8"]), backend="reference")
    assert decoder.embedding.dtype == TORCH_DTYPES[dtype]
    q = decoder.weights["model.layers.0.self_attn.q_proj.weight"]
    assert isinstance(q, QuantizedTensor)
    assert q.scales.dtype == torch.bfloat16
