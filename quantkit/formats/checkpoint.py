"""What a checkpoint is to the rest of quantkit, and how one is opened.

Opening reads headers only and needs no torch; `read` maps a tensor's bytes and imports it late.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.config import ModelConfig, TensorSpec
from quantkit.errors import CheckpointError
from quantkit.schemes import QuantScheme

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from quantkit.models.tokenizer import Tokenizer
    from quantkit.tensor import QuantizedTensor

    # From an open file's descriptor, an offset and a number of bytes to uint8 memory that holds them, aligned to
    # 64 bytes; shorter where the file ends before.
    ReadFile = Callable[[int, int, int], torch.Tensor]


class Checkpoint(ABC):
    """A model's tensors on disk, under their Hugging Face names.

    Attributes:
        path: the directory or file.
        config: the model; its `dtype` is what kept tensors and scales are stored in.
        schemes: the scheme of every matrix that is stored quantized in a format quantkit computes with.
        stored_bytes: bytes of all weights as the file stores them, codes and scales included and
            constant code tables left out.
    """

    path: Path
    config: ModelConfig
    schemes: dict[str, QuantScheme]
    stored_bytes: int

    @abstractmethod
    def read(self, spec: TensorSpec, read_file: ReadFile | None = None) -> torch.Tensor | QuantizedTensor:
        """Return one tensor, mapped from the file where its layout allows, or read into memory.

        Shape and dtype are checked when the checkpoint is opened. A tensor that the file stores
        in a block format of its own (GGUF) comes dequantized, float32.

        Args:
            spec: the tensor.
            read_file: reads into memory of the caller's; None maps, and so does a format whose layout on disk is
                not the one in memory.
        """

    @abstractmethod
    def drop_pages(self) -> None:
        """Let the kernel reclaim the pages that reading has mapped, so that memory stays bounded."""

    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer that lies with the weights.

        Raises:
            TokenizerError: there is none, or it is of an unknown kind.
        """


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a Hugging Face directory or a GGUF file; only headers are read.

    Raises:
        CheckpointError: it is missing, truncated, of an unknown kind, or contradicts its config.
        ConfigError: its configuration is incomplete or of an unknown architecture.
    """
    if path.is_dir():
        from quantkit.formats.huggingface import HuggingFaceCheckpoint

        return HuggingFaceCheckpoint(path)
    if path.suffix == ".gguf":
        from quantkit.formats.gguf import GGUFCheckpoint

        return GGUFCheckpoint(path)
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist: name a model directory with config.json, or a .gguf file"
        )
    raise CheckpointError(f"{path} is neither a model directory nor a .gguf file")
