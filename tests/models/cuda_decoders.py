"""Small random decoders in the layout of the CUDA kernels, and the same run by operators."""

from __future__ import annotations

from typing import Any

import torch

from quantkit.kernels import ops
from quantkit.models.decoder import FUSED, Decoder, Weight
from quantkit.quantize import quantize
from quantkit.schemes import SCHEMES, plan_weights
from tests.checkpoints import random_tensors, tiny_config


def make(
    scheme: str, dtype: torch.dtype, device: str, fused: bool = True, packed: bool = True, **overrides: Any
) -> Decoder:
    """Return a Mistral of two layers; without `fused` the kernels multiply, and operators do the rest.

    Without `packed`, too, the reference multiplies.
    """
    sizes = {"hidden_size": 64, "intermediate_size": 96, "max_context": 64} | overrides
    config = tiny_config(dtype="bf16", **sizes)
    chosen = SCHEMES[scheme]
    plan = plan_weights(config, chosen) if chosen.quantized else {}
    tensors = random_tensors(config, "bf16", seed=0)
    weights: dict[str, Weight] = {name: tensor.to(device, dtype) for name, tensor in tensors.items()}
    quantized = {name: quantize(tensors[name], plan[name], torch.bfloat16).to(device) for name in plan}
    for layer in range(config.n_layers):
        for whole, parts in FUSED.items():
            names = [f"model.layers.{layer}.{part}.weight" for part in parts]
            if packed and all(name in quantized for name in names):
                fused_weight = ops.fuse([quantized[name] for name in names], "triton")
                if fused_weight is not None:
                    weights[f"model.layers.{layer}.{whole}.weight"] = fused_weight
                    for name in names:
                        del quantized[name], weights[name]
    backend = "triton" if packed else "reference"
    weights |= {name: ops.prepare(weight, backend) for name, weight in quantized.items()}
    attention = "sdpa" if device == "cpu" else "auto"  # the interpreter's prompts go one way, `fused` or not
    return Decoder(config, weights, dtype, attention=attention, fused=fused)


def decode(
    decoder: Decoder, ids: torch.Tensor, prompt: int, kv_bits: int | None = None, kv_group: int = 0
) -> torch.Tensor:
    """Return the float32 logits (tokens, B, vocab) behind a prompt and each further token."""
    cache = decoder.new_cache(ids.shape[0], ids.shape[1], kv_bits, kv_group)
    logits = [decoder.prefill(ids[:, :prompt], cache)]
    logits += [decoder.prefill(ids[:, at : at + 1], cache) for at in range(prompt, ids.shape[1])]
    assert cache.length == ids.shape[1]
    return torch.stack(logits)


def random_ids(batch: int, tokens: int, device: str, vocab: int = 96) -> torch.Tensor:
    return torch.randint(0, vocab, (batch, tokens), generator=torch.Generator().manual_seed(1)).to(device)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the greatest difference, relative to the greatest value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()
