"""Models on the Hugging Face Hub, by id: config.json and the headers of the safetensors files, no weights.

Asked through huggingface_hub, which heeds HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE and keeps config.json
in its cache. The shapes are checked against the config as those of a local checkpoint are.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from calculators.units import ceil_div
from quantkit.config import ModelConfig, TensorSpec, config_from_dict, json_object, read_json
from quantkit.errors import CheckpointError
from quantkit.formats import bitsandbytes
from quantkit.formats.huggingface import HuggingFaceCheckpoint, quantization_of, with_stored_dtype
from quantkit.formats.safetensors import Entry, checked_entry
from quantkit.schemes import NESTED_GROUP

if TYPE_CHECKING:
    import torch
    from huggingface_hub import HfApi, SafetensorsRepoMetadata

    from quantkit.formats.checkpoint import ReadFile
    from quantkit.models.tokenizer import Tokenizer
    from quantkit.tensor import QuantizedTensor

# bitsandbytes' block sizes; a small matrix fits several, and 64 is the usual one
_BLOCKS = (64, 32, 128, 256, 512, 1024, 2048, 4096)


def open_hub(repo_id: str) -> tuple[ModelConfig, HubCheckpoint | None]:
    """Return what the Hub says of the model `owner/name`; without safetensors, its config alone.

    Raises:
        CheckpointError: it is missing, gated or out of reach, or its tensors contradict its config.
        ConfigError: its configuration is incomplete or of an unknown architecture.
    """
    try:
        from huggingface_hub import HfApi, errors, hf_hub_url
    except ImportError:
        raise CheckpointError(
            f"there is no path {repo_id}, and reading it from the Hub needs the package huggingface_hub: "
            "install it, or name a local model"
        ) from None
    api = HfApi()
    with _plain_errors(repo_id):
        api.get_hf_file_metadata(url=hf_hub_url(repo_id, "config.json", endpoint=api.endpoint))  # no retries
        raw_config = read_json(Path(api.hf_hub_download(repo_id, "config.json")))
    where = f"{repo_id}/config.json"
    config = config_from_dict(raw_config, repo_id.partition("/")[2], where)
    with _plain_errors(repo_id):
        try:
            entries = _entries(repo_id, _metadata(api, repo_id))
        except errors.NotASafetensorsRepoError:
            return config, None
    checkpoint = HubCheckpoint(repo_id, config, raw_config, entries)
    return checkpoint.config, checkpoint


@contextmanager
def _plain_errors(repo_id: str) -> Iterator[None]:
    """Turn what asking the Hub may raise into one line."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{repo_id} is gated: accept its terms at https://huggingface.co/{repo_id} and set HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"{repo_id} is neither a path here nor a model on the Hub that can be seen; "
            "a private one needs HF_TOKEN"
        ) from None
    except errors.RemoteEntryNotFoundError:
        raise CheckpointError(
            f"{repo_id} on the Hub has no config.json; download a .gguf file and name that"
        ) from None
    except errors.SafetensorsParsingError as error:
        raise CheckpointError(f"{repo_id} on the Hub has a broken safetensors header: {error}") from None
    except (errors.HTTPError, OSError) as error:
        raise CheckpointError(
            f"{repo_id} is no path here, and the Hub cannot be asked ({_reason(error)}): "
            "name a local model or a preset, or try again online"
        ) from None


def _reason(error: BaseException) -> str:
    """Return the first line of the error that started it all."""
    from huggingface_hub import errors

    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _metadata(api: HfApi, repo_id: str) -> SafetensorsRepoMetadata:
    """Return the headers of all shards; the bar that counts these shows on a terminal alone."""
    from huggingface_hub import utils

    if not sys.stderr.isatty():
        utils.disable_progress_bars()
    return api.get_safetensors_metadata(repo_id)


def _entries(repo_id: str, metadata: SafetensorsRepoMetadata) -> dict[str, Entry]:
    """Return every tensor of every shard.

    Raises:
        CheckpointError: the index names a tensor that is not there, or a header contradicts itself.
    """
    for name, file in metadata.weight_map.items():
        if name not in metadata.files_metadata[file].tensors:
            raise CheckpointError(
                f"{repo_id}: the index says that {name} lies in {file}, but it is not there"
            )
    found = {}
    for file, header in metadata.files_metadata.items():
        for name, info in header.tensors.items():
            found[name] = checked_entry(name, vars(info), f"{repo_id}/{file}")
    return found


class HubCheckpoint(HuggingFaceCheckpoint):
    """A model on the Hub, of which headers are known and nothing else can be read.

    Args:
        repo_id: `owner/name`.
        config: as config.json has it.
        raw_config: config.json itself.
        entries: every tensor's dtype and shape.

    Raises:
        CheckpointError: the tensors contradict the config.
    """

    def __init__(
        self, repo_id: str, config: ModelConfig, raw_config: dict[str, Any], entries: Mapping[str, Entry]
    ) -> None:
        self.path = Path(repo_id)
        self.raw_config = raw_config
        self._files, self._where = [], {}
        self._entries = entries
        self._groups = quantization_of(raw_config, f"{repo_id}/config.json")
        self.config = with_stored_dtype(config, entries)
        self.schemes = {}
        self.stored_bytes = 0
        for spec in self.config.tensors:
            self._check(spec, entries)
        self._refuse_unexpected(entries)

    def _read_bytes(self, name: str) -> bytes:
        """Return the quant_state of a bitsandbytes matrix as its headers and config.json imply it."""
        weight = name.removesuffix(bitsandbytes.STATE)
        spec = next(spec for spec in self.config.tensors if spec.name == weight)
        blocks = math.prod(self._entries[f"{weight}.absmax"].shape)
        block = next((size for size in _BLOCKS if ceil_div(spec.elements, size) == blocks), None)
        if block is None:
            raise CheckpointError(
                f"{self.path}: {weight}.absmax has {blocks:,} elements; no block size of bitsandbytes "
                f"cuts {spec.elements:,} weights into as many blocks"
            )
        config = json_object(self.raw_config, "quantization_config", f"{self.path}/config.json")
        state = {
            "quant_type": config.get("bnb_4bit_quant_type"),
            "blocksize": block,
            "shape": list(spec.shape),
            "nested_blocksize": NESTED_GROUP,
            "nested_offset": 0.0,  # stands in the file, out of reach
        }
        return json.dumps(state).encode()

    def read(self, spec: TensorSpec, read_file: ReadFile | None = None) -> torch.Tensor | QuantizedTensor:
        self._refuse()

    def tokenizer(self) -> Tokenizer:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise CheckpointError(f"{self.path} is on the Hub: download it and name its directory")
