"""Weights of a model's shapes without a model: random codes and scales, made as fast as memory is written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from quantkit.config import ModelConfig, TensorSpec
from quantkit.errors import TokenizerError
from quantkit.formats.checkpoint import Checkpoint
from quantkit.models.tokenizer import Tokenizer
from quantkit.schemes import QuantScheme, plan_weights
from quantkit.tensor import QuantizedTensor, empty_quantized

if TYPE_CHECKING:
    from quantkit.formats.checkpoint import ReadFile

STD = 0.02  # of weights, so that activations stay finite


class RandomCheckpoint(Checkpoint):
    """A checkpoint that makes each tensor when it is read: what `load` turns into a Decoder.

    Args:
        config: the model whose shapes it has.
        scheme: of the blocks' matrices; all else is in bfloat16.
        device: where they are made.
        include: other matrices to quantize, as `plan_weights` takes them.
    """

    def __init__(
        self,
        config: ModelConfig,
        scheme: QuantScheme,
        device: torch.device | str = "cpu",
        include: Sequence[str] = (),
    ) -> None:
        self.path, self.config, self._device = Path(config.name), config, device
        self.schemes = plan_weights(config, scheme, include)
        self.stored_bytes = 0

    def read(self, spec: TensorSpec, read_file: ReadFile | None = None) -> torch.Tensor | QuantizedTensor:
        """Return one tensor: norms are 1, the rest is random."""
        if spec.name in self.schemes:
            rows, cols = spec.shape
            return random_quantized((rows, cols), self.schemes[spec.name], self._device)
        plain = torch.empty(spec.shape, dtype=torch.bfloat16, device=self._device)
        return plain.fill_(1.0) if spec.role == "norm" else plain.normal_(std=STD)

    def drop_pages(self) -> None:
        """Do nothing: there is no file."""

    def tokenizer(self) -> Tokenizer:
        """Refuse.

        Raises:
            TokenizerError: always.
        """
        raise TokenizerError(f"random weights of {self.config.name} have no tokenizer")


def random_quantized(
    shape: tuple[int, int], scheme: QuantScheme, device: torch.device | str = "cpu"
) -> QuantizedTensor:
    """Return a matrix of random codes with bfloat16 scales (NF4 has its own); weights have about `STD`."""
    weight = empty_quantized(shape, scheme, torch.bfloat16, device)
    largest = 1.0 if scheme.method == "nf4" else 2.0 ** (scheme.bits - 1)
    scale = STD * math.sqrt(3.0) / largest
    for part in weight.parts().values():
        if part.is_floating_point():
            part.uniform_(0.8 * scale, 1.2 * scale)
        else:
            random_bytes(part)
    if weight.nested_scales is not None:
        weight.nested_scales.div_(2)  # the codes of scales are -1 to 1 of it, around the offset
    return weight


def random_bytes(part: torch.Tensor) -> None:
    """Fill a contiguous tensor of integers with random bytes, eight at a time."""
    flat = part.view(-1).view(torch.uint8)
    whole = flat.numel() // 8
    words = torch.empty(whole, dtype=torch.int64, device=part.device).random_(-(2**63), None)
    flat[: 8 * whole].copy_(words.view(torch.uint8))
    flat[8 * whole :].random_(0, 256)
