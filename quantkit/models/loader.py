"""Checkpoint to Decoder: one tensor at a time, mapped where it stays as it is or is repacked, else read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from quantkit.config import TensorSpec
from quantkit.errors import CheckpointError, SchemeError
from quantkit.formats.checkpoint import Checkpoint
from quantkit.kernels import ops
from quantkit.kernels.native import Arena
from quantkit.models.decoder import FUSED, Decoder
from quantkit.models.linear import Weight
from quantkit.quantize import quantize
from quantkit.schemes import QuantScheme
from quantkit.tensor import QuantizedTensor

if TYPE_CHECKING:
    from quantkit.formats.checkpoint import ReadFile

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load(
    checkpoint: Checkpoint,
    dtype: str | None = None,
    plan: Mapping[str, QuantScheme] | None = None,
    device: torch.device | str = "cpu",
    attention: str = "auto",
    progress: Callable[[int], None] | None = None,
    backend: str = "auto",
) -> Decoder:
    """Return a model ready to run.

    Tensors go to the device one by one. The host keeps no more than the parts of one fused matrix. Beside the model,
    a GPU holds what repacking a matrix takes: for gate and up together up to four and a half times their bytes.

    Args:
        checkpoint: where the weights lie.
        dtype: compute dtype (`fp32`, `bf16`, `fp16`); None means the checkpoint's.
        plan: matrices to quantize in memory, as `plan_weights` gives them. The other tensors then
            take the checkpoint's dtype first, so that this model is the one `quantkit quantize` writes.
        device: where the weights go.
        attention: as Decoder has it.
        progress: called with the number of elements after each tensor.
        backend: what runs quantized matrices, which are repacked for it: a name of `ops.BACKENDS` or `auto`.

    Raises:
        BackendError: the backend cannot run on that device.
        CheckpointError: a weight is NaN or infinite, or `plan` meets a model that is quantized already.
        SchemeError: a matrix is too large in value for its scheme in `plan`.
    """
    if plan and checkpoint.schemes:
        name, scheme = next(iter(checkpoint.schemes.items()))
        raise CheckpointError(f"{checkpoint.path} is quantized already ({name} is {scheme.name})")
    compute = TORCH_DTYPES[dtype or checkpoint.config.dtype]
    stored = TORCH_DTYPES[checkpoint.config.dtype]
    chosen = ops.choose_backend(backend, device)
    quantized = plan or checkpoint.schemes
    repacks = bool(quantized) and chosen != "reference"
    weights: dict[str, Weight] = {}
    arena = Arena()
    waiting: dict[str, QuantizedTensor] = {}  # parts of what may be fused
    for spec in checkpoint.config.tensors:
        beside = repacks and chosen == "native" and spec.name not in quantized
        weight = read_finite(checkpoint, spec, arena.read_file if beside else None)
        if plan and spec.name in plan and isinstance(weight, torch.Tensor):
            weight = quantize_finite(weight, plan[spec.name], stored, f"{checkpoint.path}: {spec.name}")
        fused, parts = _fused(spec.name)
        if isinstance(weight, torch.Tensor):
            kept = weight.to(stored) if plan else weight
            weights[spec.name] = kept.to(device, compute)
        elif parts:
            waiting[spec.name] = weight
        else:
            weights[spec.name] = ops.prepare(weight.to(device), chosen, arena)
        if parts and spec.name == parts[-1]:
            weights |= _prepare_parts(fused, parts, waiting, chosen, arena, device)
            waiting = {}
        if repacks and not waiting:
            checkpoint.drop_pages()
        if progress:
            progress(spec.elements)
    return Decoder(checkpoint.config, weights, compute, attention, fused=chosen != "reference")


def _fused(name: str) -> tuple[str, list[str]]:
    """Return the name under which a weight may be fused and those of all parts, or no parts."""
    for fused, parts in FUSED.items():
        for part in parts:
            if name.endswith(f".{part}.weight"):
                prefix = name.removesuffix(f"{part}.weight")
                return f"{prefix}{fused}.weight", [f"{prefix}{each}.weight" for each in parts]
    return name, []


def _prepare_parts(
    name: str,
    parts: Sequence[str],
    weights: Mapping[str, QuantizedTensor],
    backend: str,
    arena: Arena,
    device: torch.device | str,
) -> dict[str, ops.Prepared]:
    """Return the quantized ones of `parts` ready to run on `device`: all as one, or each by itself."""
    if len(weights) == len(parts):
        fused = ops.fuse([weights[part] for part in parts], backend, arena, device)
        if fused is not None:
            return {name: fused}
    return {part: ops.prepare(weight.to(device), backend, arena) for part, weight in weights.items()}


def read_finite(
    checkpoint: Checkpoint, spec: TensorSpec, read_file: ReadFile | None = None
) -> torch.Tensor | QuantizedTensor:
    """Read a tensor, as `Checkpoint.read` does, and refuse NaN and infinity by name.

    Raises:
        CheckpointError: the tensor, or a floating-point part of a quantized one, is not finite.
    """
    weight = checkpoint.read(spec, read_file)
    if not _is_finite(weight):
        raise CheckpointError(f"{checkpoint.path}: {spec.name} holds NaN or infinite values")
    return weight


def quantize_finite(
    weight: torch.Tensor, scheme: QuantScheme, scale_dtype: torch.dtype, where: str
) -> QuantizedTensor:
    """Quantize a matrix, as `quantize` does, and refuse one whose scales overflow.

    Raises:
        SchemeError: the values are too large for the scheme; `where` names the matrix.
    """
    quantized = quantize(weight, scheme, scale_dtype)
    if not _is_finite(quantized):
        largest = max(abs(value.item()) for value in torch.aminmax(weight))
        raise SchemeError(
            f"{where} holds {largest:g}: the scales of {scheme.name} overflow; choose another scheme"
        )
    return quantized


def _is_finite(weight: torch.Tensor | QuantizedTensor) -> bool:
    parts = weight.parts().values() if isinstance(weight, QuantizedTensor) else (weight,)
    return all(
        bool(torch.isfinite(extreme))
        for part in parts
        if part.is_floating_point()
        for extreme in torch.aminmax(part)
    )
