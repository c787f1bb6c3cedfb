"""transformers loads what quantkit writes, and holds the values that quantkit computes with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit.formats.checkpoint import open_checkpoint
from quantkit.kernels.reference import dequantize
from quantkit.models.loader import load
from quantkit.quantize.convert import convert
from quantkit.schemes import SCHEMES
from quantkit.tensor import QuantizedTensor
from tests.checkpoints import NAMED_MODELS, tiny_config, write_checkpoint

transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # those of the packages that load

SYMMETRIC = ["int8", "int4-g128", "int4-g64", "int4-g32"]
NF4 = ["nf4", "nf4-dq"]
ASYMMETRIC = ["int4-g128-asym", "int4-g64-asym", "int4-g32-asym"]
RELATIVE = 1e-4  # of the largest logit, fp32


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    threads, verbosity = torch.get_num_threads(), transformers.logging.get_verbosity()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(verbosity)
    torch.set_num_threads(threads)


def write(
    tmp_path: Path, scheme: str, model: str, overrides: dict[str, Any] | None = None, **options: Any
) -> Path:
    config = tiny_config(**NAMED_MODELS[model], **(overrides or {}))
    source = write_checkpoint(tmp_path / "model", config, "fp32", seed=0)
    convert(open_checkpoint(source), tmp_path / "out", SCHEMES[scheme], **options)
    return tmp_path / "out"


def check(out: Path) -> None:
    """Hold every weight of transformers' model to ours exactly, and its logits within `RELATIVE`."""
    checkpoint = open_checkpoint(out)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    if any(scheme.method == "nf4" for scheme in checkpoint.schemes.values()):
        theirs = theirs.dequantize()  # its CPU kernel computes in bf16
    ids = torch.arange(3, 35)[None]
    with torch.no_grad():
        expected = theirs(ids).logits  # compressed-tensors decompresses at the first pass
    weights = theirs.state_dict()
    for spec in checkpoint.config.tensors:
        stored = checkpoint.read(spec)
        ours = dequantize(stored) if isinstance(stored, QuantizedTensor) else stored
        assert torch.equal(weights[spec.name], ours), spec.name
    decoder = load(checkpoint)
    logits = decoder.logits(decoder.forward(ids, decoder.new_cache(1, ids.shape[1])))
    assert (logits - expected).abs().max() <= RELATIVE * expected.abs().max()


@pytest.mark.parametrize("scheme", [*SYMMETRIC, *NF4, *ASYMMETRIC])
@pytest.mark.parametrize("model", NAMED_MODELS)
def test_transformers_loads_the_output(model: str, scheme: str, tmp_path: Path) -> None:
    check(write(tmp_path, scheme, model))


@pytest.mark.parametrize("scheme", ["int8", "int4-g64", "int4-g32-asym", *NF4])
def test_it_loads_with_a_quantized_head_and_blocks_left_out(scheme: str, tmp_path: Path) -> None:
    check(
        write(tmp_path, scheme, "mistral-gqa", include=["lm_head"], exclude=["*.v_proj", "*.layers.1.mlp.*"])
    )


@pytest.mark.parametrize("indivisible", ["int8", "keep"])
def test_it_loads_with_matrices_that_the_group_does_not_divide(indivisible: str, tmp_path: Path) -> None:
    check(write(tmp_path, "int4-g32", "llama-tied", {"intermediate_size": 172}, indivisible=indivisible))


@pytest.mark.parametrize("scheme", ["int8", "nf4-dq"])
def test_it_loads_shards(scheme: str, tmp_path: Path) -> None:
    out = write(tmp_path, scheme, "qwen2-biases", shard_bytes=100_000)
    assert len(list(out.glob("*.safetensors"))) > 1
    check(out)


@pytest.mark.parametrize("scheme", ["bf16", "fp16"])
def test_it_loads_what_is_not_quantized(scheme: str, tmp_path: Path) -> None:
    out = write(tmp_path, scheme, "mistral-gqa")
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    checkpoint = open_checkpoint(out)
    for spec in checkpoint.config.tensors:
        stored = checkpoint.read(spec)
        assert isinstance(stored, torch.Tensor)
        assert torch.equal(model.state_dict()[spec.name], stored)
