"""A checkpoint at one precision to a directory at another, one tensor in memory at a time.

The output is what the ecosystem reads: safetensors shards with an index, config.json with its
`quantization_config`, the tokenizer. It appears whole or not at all.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from calculators.units import GB
from calculators.weights import matrix_bytes, plain_bytes
from quantkit.config import DTYPE_BITS, DTYPE_NAMES, ModelConfig, TensorSpec
from quantkit.errors import CheckpointError, SchemeError
from quantkit.formats import bitsandbytes, compressed_tensors
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.huggingface import INDEX, HuggingFaceCheckpoint
from quantkit.formats.safetensors import ShardWriter
from quantkit.models.loader import TORCH_DTYPES, quantize_finite, read_finite
from quantkit.quantize.error import sqnr_db
from quantkit.quantize.staging import check_space, staged_directory, sync
from quantkit.schemes import Indivisible, QuantScheme, plan_weights
from quantkit.tensor import QuantizedTensor

SHARD_BYTES = 5 * GB
_LONG_NAMES = {short: long for long, short in DTYPE_NAMES.items()}
_TABLE_BYTES = 4096  # room for the code tables and JSON that a format adds to a matrix
_HEADER_BYTES = 256  # room for a tensor's entry in a header or an index


@dataclass(frozen=True)
class MatrixError:
    """What conversion did to one matrix.

    Attributes:
        name: of the tensor.
        scheme: what it is stored as.
        sqnr_db: signal-to-quantization-noise ratio; infinite where nothing was lost.
        bytes_before: in the source, at the checkpoint's dtype.
        bytes_after: codes and scales; constant code tables are not counted.
    """

    name: str
    scheme: str
    sqnr_db: float
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class Conversion:
    """What was written: `rows` of the converted matrices in model order, and bytes of all weights."""

    out: Path
    scheme: str
    rows: tuple[MatrixError, ...]
    bytes_before: int
    bytes_after: int

    @property
    def worst_first(self) -> list[MatrixError]:
        return sorted(self.rows, key=lambda row: row.sqnr_db)


def convert(
    checkpoint: Checkpoint,
    out: Path,
    scheme: QuantScheme,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    indivisible: Indivisible = "refuse",
    force: bool = False,
    progress: Callable[[int], None] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Conversion:
    """Write `checkpoint` at `scheme` to the directory `out`, whole or not at all.

    Args:
        checkpoint: the original; what is not quantized keeps its config's dtype.
        out: the directory to make; its parent must exist.
        scheme: quantized, or plain, which casts every tensor.
        include: see `plan_weights`.
        exclude: see `plan_weights`.
        indivisible: `refuse`, `int8` or `keep` matrices whose K the group does not divide.
        force: replace `out` where it is a model directory or empty.
        progress: called with the number of elements after each tensor.
        shard_bytes: the most that one file holds, unless a single tensor takes more.

    Raises:
        CheckpointError: the source is quantized, or holds NaN, infinity or what the new dtype cannot hold.
        SchemeError: the precision cannot be stored for this model, or its scales overflow.
        OutputError: `out` exists, or cannot be written.
    """
    plan = plan_conversion(checkpoint, scheme, include, exclude, indivisible)
    job = _Job(checkpoint, scheme, plan)
    with staged_directory(out, checkpoint.path, force) as directory:
        check_space(directory, sum(map(job.room, checkpoint.config.tensors)))
        job.write_companions(directory)
        rows, bytes_after = job.write_weights(directory, shard_bytes, progress or (lambda elements: None))
    return Conversion(out, scheme.name, rows, checkpoint.stored_bytes, bytes_after)


def plan_conversion(
    checkpoint: Checkpoint,
    scheme: QuantScheme,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    indivisible: Indivisible = "refuse",
) -> dict[str, QuantScheme]:
    """Return the scheme of each matrix to quantize, refusing what no format can hold.

    Raises:
        CheckpointError: the source is quantized already.
        SchemeError: as `plan_weights`, or nothing would be quantized, or transformers could not load it.
    """
    if checkpoint.schemes:
        name, stored = next(iter(checkpoint.schemes.items()))
        raise CheckpointError(
            f"{checkpoint.path} is quantized already ({name} is {stored.name}): start from the original"
        )
    if not scheme.quantized:
        if include or exclude:
            raise SchemeError(f"{scheme.name} casts every tensor: --include and --exclude do not apply to it")
        return {}
    plan = plan_weights(checkpoint.config, scheme, include, exclude, indivisible)
    if not plan:
        raise SchemeError(
            f"nothing of {checkpoint.config.name} would be {scheme.name}: choose what to quantize"
        )
    if not scheme.symmetric and set(plan.values()) != {scheme}:
        raise SchemeError(
            f"{scheme.name} beside int8 cannot be loaded: transformers reads zero points with one "
            "config group only. Choose a symmetric scheme, or --indivisible keep"
        )
    return plan


class _Job:
    """One conversion: what is written under which names, and the writing itself."""

    def __init__(self, checkpoint: Checkpoint, scheme: QuantScheme, plan: Mapping[str, QuantScheme]) -> None:
        self.checkpoint, self.scheme, self.plan = checkpoint, scheme, plan
        self.config: ModelConfig = checkpoint.config
        self.dtype = scheme.dtype or self.config.dtype

    def room(self, spec: TensorSpec) -> int:
        """Return an upper bound on the bytes that a tensor and all that belongs to it take."""
        scheme = self.plan.get(spec.name)
        if scheme is None:
            return plain_bytes(spec.elements, DTYPE_BITS[self.dtype]) + _HEADER_BYTES
        rows, cols = spec.shape
        word_padding = 4 * rows
        stored = matrix_bytes(rows, cols, scheme.packing(self.dtype)).total
        return stored + word_padding + _TABLE_BYTES + len(self.names(spec)) * _HEADER_BYTES

    def names(self, spec: TensorSpec) -> list[str]:
        """Return the names under which a tensor is stored."""
        scheme = self.plan.get(spec.name)
        if scheme is None:
            return [spec.name]
        codec = bitsandbytes if scheme.format == "bitsandbytes" else compressed_tensors
        return codec.part_names(spec.name, scheme)

    def write_companions(self, directory: Path) -> None:
        """Write config.json and the tokenizer: what fails here fails before the long part."""
        _write_json(directory / "config.json", self._config_json())
        if isinstance(self.checkpoint, HuggingFaceCheckpoint):
            for file in self.checkpoint.tokenizer_files():
                shutil.copyfile(file, directory / file.name)
        else:
            self.checkpoint.tokenizer().save(directory)
        for path in directory.iterdir():
            sync(path)

    def _config_json(self) -> dict[str, Any]:
        raw = dict(_raw_config(self.checkpoint))
        raw.pop("quantization_config", None)
        raw["dtype"] = _LONG_NAMES[self.dtype]
        if "torch_dtype" in raw:
            raw["torch_dtype"] = raw["dtype"]
        if not self.plan:
            return raw
        kept = [
            spec.name.removesuffix(".weight")
            for spec in self.config.tensors
            if spec.is_block_linear and spec.name not in self.plan
        ]
        if "lm_head.weight" not in self.plan:
            kept.append("lm_head")  # a linear module also where it is tied
        if self.scheme.format == "bitsandbytes":
            raw["quantization_config"] = bitsandbytes.quantization_config(self.scheme, self.dtype, kept)
        else:
            raw["quantization_config"] = compressed_tensors.quantization_config(self.plan, kept)
        return raw

    def write_weights(
        self, directory: Path, shard_bytes: int, progress: Callable[[int], None]
    ) -> tuple[tuple[MatrixError, ...], int]:
        """Write shards and index; return a row for each converted matrix, and bytes of all weights."""
        shards = _shards(self.config.tensors, self.room, shard_bytes)
        rows: list[MatrixError] = []
        weight_map: dict[str, str] = {}
        total_size = bytes_after = 0
        for number, specs in enumerate(shards, 1):
            several = f"model-{number:05}-of-{len(shards):05}.safetensors"
            file = "model.safetensors" if len(shards) == 1 else several
            names = [name for spec in specs for name in self.names(spec)]
            weight_map.update(dict.fromkeys(names, file))
            writer = ShardWriter(directory / file, names)
            try:
                for spec in specs:
                    nbytes, row = self._write_tensor(writer, spec)
                    bytes_after += nbytes
                    rows += [row] if row else []
                    self.checkpoint.drop_pages()
                    progress(spec.elements)
                writer.close()
            finally:
                writer.abandon()
            total_size += writer.data_bytes
        if len(shards) > 1:
            index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
            _write_json(directory / INDEX, index)
            sync(directory / INDEX)
        return tuple(rows), bytes_after

    def _write_tensor(self, writer: ShardWriter, spec: TensorSpec) -> tuple[int, MatrixError | None]:
        """Convert and write one tensor; return its bytes and, where it is a converted matrix, its row."""
        weight = read_finite(self.checkpoint, spec)
        assert isinstance(weight, torch.Tensor)
        scheme, where = self.plan.get(spec.name), f"{self.checkpoint.path}: {spec.name}"
        stored: torch.Tensor | QuantizedTensor
        if scheme is not None:
            stored = quantize_finite(weight, scheme, TORCH_DTYPES[self.dtype], where)
            for name, part in self._parts(spec.name, stored).items():
                writer.write(name, part)
        else:
            stored = _cast(weight, self.dtype, where)
            writer.write(spec.name, stored)
        recast = (
            isinstance(stored, torch.Tensor) and not self.scheme.quantized and stored.dtype != weight.dtype
        )
        if len(spec.shape) != 2 or not (scheme or recast):
            return stored.nbytes, None
        row = MatrixError(
            name=spec.name,
            scheme=scheme.name if scheme else self.scheme.name,
            sqnr_db=sqnr_db(weight, stored),
            bytes_before=plain_bytes(spec.elements, self.config.dtype_bits),
            bytes_after=stored.nbytes,
        )
        return stored.nbytes, row

    def _parts(self, name: str, tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
        if tensor.scheme.format == "bitsandbytes":
            return bitsandbytes.to_parts(name, tensor, self.dtype)
        return compressed_tensors.to_parts(name, tensor)


def _raw_config(checkpoint: Checkpoint) -> dict[str, Any]:
    if isinstance(checkpoint, HuggingFaceCheckpoint):
        return checkpoint.raw_config
    from quantkit.formats.gguf import GGUFCheckpoint

    assert isinstance(checkpoint, GGUFCheckpoint)
    return checkpoint.hf_config_dict()


def _shards(
    specs: Iterable[TensorSpec], room: Callable[[TensorSpec], int], shard_bytes: int
) -> list[list[TensorSpec]]:
    """Fill one file after the other, in model order."""
    shards: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        if shards[-1] and filled + room(spec) > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += room(spec)
    return shards


def _cast(weight: torch.Tensor, dtype: str, where: str) -> torch.Tensor:
    """Return the tensor in `dtype`.

    Raises:
        CheckpointError: a value is beyond what `dtype` holds.
    """
    cast = weight.to(TORCH_DTYPES[dtype])
    if cast.dtype != weight.dtype and not all(map(torch.isfinite, torch.aminmax(cast))):
        largest = max(abs(value.item()) for value in torch.aminmax(weight))
        raise CheckpointError(
            f"{where} holds {largest:g}, beyond the {torch.finfo(cast.dtype).max:g} of {dtype}: use another"
        )
    return cast


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
