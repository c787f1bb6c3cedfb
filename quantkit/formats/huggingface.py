"""Hugging Face directories: config.json, safetensors shards, an index, a tokenizer.

Linears may be plain, bitsandbytes NF4 or compressed-tensors pack-quantized, as quantkit or others
wrote them. Everything is checked against the config when the directory is opened, from headers alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from reprlib import repr as shown
from typing import TYPE_CHECKING, Any

from quantkit.config import ModelConfig, TensorSpec, config_from_dict, json_object, read_json
from quantkit.errors import CheckpointError
from quantkit.formats import bitsandbytes, compressed_tensors
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.safetensors import FLOAT_DTYPES, Entry, SafetensorsFile

if TYPE_CHECKING:
    import torch

    from quantkit.formats.checkpoint import ReadFile
    from quantkit.models.tokenizer import Tokenizer
    from quantkit.tensor import QuantizedTensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


def has_weights(directory: Path) -> bool:
    """Whether any weights, readable or not, lie in the directory."""
    return any(any(directory.glob(pattern)) for pattern in ("*.safetensors", INDEX, *_PICKLES))


class HuggingFaceCheckpoint(Checkpoint):
    """A model directory; see `Checkpoint` for the attributes.

    Raises:
        CheckpointError: weights are missing, truncated, pickled, or contradict config.json.
        ConfigError: config.json is incomplete or of an unknown architecture.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.raw_config = read_json(path / "config.json")
        config = config_from_dict(self.raw_config, path.resolve().name, str(path / "config.json"))
        self._files = _open_shards(path)
        self._where = {name: file for file in self._files for name in file.entries}
        entries = {name: file.entries[name] for name, file in self._where.items()}
        self._groups = quantization_of(self.raw_config, str(path / "config.json"))
        self.config = with_stored_dtype(config, entries)
        self.schemes = {}
        self.stored_bytes = 0
        for spec in self.config.tensors:
            self._check(spec, entries)
        self._refuse_unexpected(entries)

    def _check(self, spec: TensorSpec, entries: Mapping[str, Entry]) -> None:
        if spec.is_block_linear or spec.role == "head":
            if bitsandbytes.is_stored(spec.name, entries):
                scheme = bitsandbytes.stored_scheme(spec.name, spec.shape, entries, self._read_bytes)
                self.stored_bytes += bitsandbytes.stored_bytes(spec.name, entries)
                self.schemes[spec.name] = scheme
                return
            if compressed_tensors.is_stored(spec.name, entries):
                if self._groups is None:
                    raise CheckpointError(
                        f"{self.path}: {spec.name} is packed, but config.json has no config_groups"
                    )
                scheme = compressed_tensors.stored_scheme(spec.name, spec.shape, entries, self._groups)
                self.stored_bytes += compressed_tensors.stored_bytes(spec.name, scheme, spec.shape, entries)
                self.schemes[spec.name] = scheme
                return
        entry = entries.get(spec.name)
        if entry is None:
            raise CheckpointError(f"{self.path}: the tensor {spec.name} is missing from the checkpoint")
        if entry.shape != spec.shape:
            raise CheckpointError(
                f"{self.path}: {spec.name} has shape {list(entry.shape)}, config.json implies {list(spec.shape)}"
            )
        if entry.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{self.path}: {spec.name} has dtype {entry.dtype}; weights must be {', '.join(FLOAT_DTYPES)}"
            )
        self.stored_bytes += entry.nbytes

    def _refuse_unexpected(self, entries: Mapping[str, Entry]) -> None:
        """Refuse tensors the decoder would silently leave out, such as biases the config does not name."""
        expected = {spec.name for spec in self.config.tensors}
        for name in self.schemes:
            expected |= bitsandbytes.own_names(name) | compressed_tensors.own_names(name)
        for name, entry in entries.items():
            tied_head = self.config.tie_embeddings and name == "lm_head.weight"
            if name not in expected and not tied_head and not name.endswith("rotary_emb.inv_freq"):
                raise CheckpointError(
                    f"{self.path}: {name} {list(entry.shape)} has no place in a {self.config.architecture} model; "
                    "config.json does not describe these weights"
                )

    def read(self, spec: TensorSpec, read_file: ReadFile | None = None) -> torch.Tensor | QuantizedTensor:
        def tensor(name: str) -> torch.Tensor:
            return self._where[name].tensor(name, read_file)

        scheme = self.schemes.get(spec.name)
        if scheme is None:
            return tensor(spec.name)
        rows, cols = spec.shape
        codec = bitsandbytes if scheme.format == "bitsandbytes" else compressed_tensors
        return codec.from_parts(spec.name, scheme, (rows, cols), tensor)

    def _read_bytes(self, name: str) -> bytes:
        return self._where[name].read_bytes(name)

    def drop_pages(self) -> None:
        for file in self._files:
            file.drop_pages()

    def tokenizer(self) -> Tokenizer:
        from quantkit.models.tokenizer import Tokenizer

        return Tokenizer.from_directory(self.path)

    def tokenizer_files(self) -> list[Path]:
        """Return the files of tokenizer and generation defaults that belong with the weights."""
        return [self.path / name for name in _TOKENIZER_FILES if (self.path / name).is_file()]


def _open_shards(path: Path) -> list[SafetensorsFile]:
    """Open `model.safetensors`, or the shards that the index names, or the directory's one file; headers only."""
    index_path, single = path / INDEX, path / SINGLE
    if single.exists():  # as transformers does: whatever else lies there belongs to other programs
        return [SafetensorsFile(single)]
    if index_path.exists():
        weight_map = read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index_path} has no weight_map")
        for tensor, name in weight_map.items():
            if not isinstance(name, str):
                raise CheckpointError(
                    f"{index_path} says that {tensor} lies in {shown(name)}, which is no file name"
                )
        files = {name: _open_shard(path / name, index_path) for name in sorted(set(weight_map.values()))}
        for tensor, name in weight_map.items():
            if tensor not in files[name].entries:
                raise CheckpointError(f"{index_path} says that {tensor} lies in {name}, but it is not there")
        return list(files.values())
    found = sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return [SafetensorsFile(found[0])]
    if found:
        raise CheckpointError(f"{path} has {len(found)} safetensors files but neither {SINGLE} nor {INDEX}")
    pickles = sorted(file for pattern in _PICKLES for file in path.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{pickles[0]} is a pickle, which can run code when it is loaded: refused. Convert it to safetensors"
        )
    raise CheckpointError(f"{path} has no *.safetensors file")


def _open_shard(path: Path, index_path: Path) -> SafetensorsFile:
    if path.parent != index_path.parent:
        raise CheckpointError(f"{index_path} names {path.name!r} outside its directory")
    if not path.exists():
        raise CheckpointError(f"{path} is missing, but {index_path.name} names it")
    return SafetensorsFile(path)


def quantization_of(raw_config: Mapping[str, Any], where: str) -> compressed_tensors.Groups | None:
    """Return the config groups of compressed-tensors, None otherwise; refuse other methods by name."""
    config = json_object(raw_config, "quantization_config", where)
    if not config:
        return None
    method = config.get("quant_method")
    if method == "compressed-tensors":
        return compressed_tensors.Groups(config, where)
    if method == "bitsandbytes" and config.get("load_in_4bit"):
        return None
    raise CheckpointError(
        f"{where}: quantization method {shown(method)} is not supported; known are compressed-tensors (pack-quantized) "
        "and bitsandbytes (4 bit)"
    )


def with_stored_dtype(config: ModelConfig, entries: Mapping[str, Entry]) -> ModelConfig:
    """Return the config with the dtype the embedding is stored in, which configs at times misstate."""
    entry = entries.get("model.embed_tokens.weight")
    if entry is None or entry.dtype not in FLOAT_DTYPES:
        return config
    return replace(config, dtype=FLOAT_DTYPES[entry.dtype])
