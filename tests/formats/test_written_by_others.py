"""Directories that transformers with bitsandbytes, and compressed-tensors, wrote: loaded as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)

from quantkit.formats.checkpoint import open_checkpoint
from quantkit.models.loader import load

pytestmark = pytest.mark.filterwarnings("ignore")


def tiny_llama() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def relative_difference(directory: Path, theirs: transformers.PreTrainedModel) -> float:
    """Return the largest difference between our logits and theirs, relative to the largest logit."""
    ids = torch.arange(24)[None] % 96
    decoder = load(open_checkpoint(directory), "fp32")
    with torch.no_grad():
        expected = theirs(ids).logits
    ours = decoder.logits(decoder.forward(ids, decoder.new_cache(1, 24)))
    return ((ours - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("nested", [False, True], ids=["nf4", "nf4-dq"])
def test_bitsandbytes_by_transformers(nested: bool, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "plain")
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=settings, dtype=torch.float32, device_map="cpu"
    )
    theirs.save_pretrained(tmp_path / "quantized")
    schemes = open_checkpoint(tmp_path / "quantized").schemes
    assert {scheme.name for scheme in schemes.values()} == {"nf4-dq" if nested else "nf4"}
    assert len(schemes) == 14
    assert relative_difference(tmp_path / "quantized", theirs.dequantize(torch.float32)) <= 1e-4


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, None), (8, None)], ids=["int4-g32", "int4", "int8"])
def test_compressed_tensors_by_its_own_compressor(bits: int, group: int | None, tmp_path: Path) -> None:
    theirs = tiny_llama()
    strategy = "group" if group else "channel"
    weights = QuantizationArgs(num_bits=bits, symmetric=True, strategy=strategy, group_size=group)
    config = QuantizationConfig(
        config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights)},
        ignore=["lm_head"],
        format="pack-quantized",
        quantization_status="frozen",
    )
    apply_quantization_config(theirs, config)
    for module in theirs.modules():
        if hasattr(module, "weight_scale"):
            grouped = module.weight.view(module.weight.shape[0], -1, group or module.weight.shape[1])
            module.weight_scale.data = grouped.abs().amax(-1) / (2 ** (bits - 1) - 0.5)
    compressor = ModelCompressor.from_pretrained_model(theirs, quantization_format="pack-quantized")
    compressor.compress_model(theirs)
    theirs.save_pretrained(tmp_path)
    compressor.update_config(tmp_path)
    schemes = open_checkpoint(tmp_path).schemes
    assert len(schemes) == 14
    assert {scheme.bits for scheme in schemes.values()} == {bits}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert relative_difference(tmp_path, loaded) <= 1e-4
