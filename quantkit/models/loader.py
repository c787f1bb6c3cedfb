"""Checkpoint to Decoder: one tensor at a time, mapped where it can stay as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from quantkit.config import TensorSpec
from quantkit.errors import CheckpointError
from quantkit.formats.checkpoint import Checkpoint
from quantkit.models.decoder import Decoder
from quantkit.quantize import quantize
from quantkit.schemes import QuantScheme
from quantkit.tensor import QuantizedTensor

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load(
    checkpoint: Checkpoint,
    dtype: str | None = None,
    plan: Mapping[str, QuantScheme] | None = None,
    device: torch.device | str = "cpu",
    attention: str = "auto",
    progress: Callable[[int], None] | None = None,
) -> Decoder:
    """Return a model ready to run.

    Args:
        checkpoint: where the weights lie.
        dtype: compute dtype (`fp32`, `bf16`, `fp16`); None means the checkpoint's.
        plan: matrices to quantize in memory, as `plan_weights` gives them. The other tensors then
            take the checkpoint's dtype first, so that this model is the one `quantkit quantize` writes.
        device: where the weights go.
        attention: as Decoder has it.
        progress: called with the number of elements after each tensor.

    Raises:
        CheckpointError: a weight is NaN or infinite, or `plan` meets a model that is quantized already.
    """
    if plan and checkpoint.schemes:
        name, scheme = next(iter(checkpoint.schemes.items()))
        raise CheckpointError(f"{checkpoint.path} is quantized already ({name} is {scheme.name})")
    compute = TORCH_DTYPES[dtype or checkpoint.config.dtype]
    stored = TORCH_DTYPES[checkpoint.config.dtype]
    weights: dict[str, torch.Tensor | QuantizedTensor] = {}
    for spec in checkpoint.config.tensors:
        weight = read_finite(checkpoint, spec)
        if isinstance(weight, QuantizedTensor):
            weights[spec.name] = weight.to(device)
        elif plan and spec.name in plan:
            weights[spec.name] = quantize(weight, plan[spec.name], stored).to(device)
        else:
            kept = weight.to(stored) if plan else weight
            weights[spec.name] = kept.to(device, compute)
        if progress:
            progress(spec.elements)
    return Decoder(checkpoint.config, weights, compute, attention)


def read_finite(checkpoint: Checkpoint, spec: TensorSpec) -> torch.Tensor | QuantizedTensor:
    """Read a tensor and refuse NaN and infinity by name.

    Raises:
        CheckpointError: the tensor, or the scales of a quantized one, is not finite.
    """
    weight = checkpoint.read(spec)
    values = weight.scales if isinstance(weight, QuantizedTensor) else weight
    if values.is_floating_point():
        low, high = torch.aminmax(values)
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise CheckpointError(f"{checkpoint.path}: {spec.name} holds NaN or infinite values")
    return weight
