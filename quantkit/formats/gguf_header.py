"""The header of a GGUF file: metadata and the table of tensors.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Read without torch, numpy or the
gguf package, so that an estimate opens a file at once: arrays such as the vocabulary are walked over
and decoded only when asked for.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

from quantkit.errors import CheckpointError, ConfigError

# Type number: name, elements a block, bytes a block; what the gguf package can dequantize.
GGML_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2),
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36),
}  # fmt: skip

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LONGEST_STRING = 1 << 24  # a chat template takes some KB; anything beyond this is corruption
_LONGEST_ARRAY = 1 << 24  # the largest vocabularies have some 2**18 tokens and 2**19 merges
_U64 = struct.Struct("<Q")


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies: row-major shape (GGUF's own order reversed), absolute offset, ggml type."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int


class GGUFHeader:
    """A GGUF's metadata and table of tensors; `data` is the whole file, mapped privately.

    Raises:
        CheckpointError: the file is missing, truncated, corrupt, or one part of a split model.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = _map(path)
        cursor = _Cursor(path, self.data)
        self.version = cursor.version()
        n_tensors = cursor.count("tensors", smallest=32)
        n_metadata = cursor.count("metadata entries", smallest=13)
        self.metadata: dict[str, Any] = {}
        for _ in range(n_metadata):
            key = cursor.string()
            self.metadata[key] = cursor.value(key)
        parts = self.metadata.get("split.count", 0)
        if isinstance(parts, int) and parts > 1:
            raise CheckpointError(
                f"{path} is one of {parts} parts of a split model: merge them with llama-gguf-split --merge"
            )
        self.tensors = self._read_tensors(cursor, n_tensors)

    def _read_tensors(self, cursor: _Cursor, count: int) -> dict[str, GGUFTensor]:
        alignment = self.integer("general.alignment", 32)
        if alignment <= 0 or alignment % 8:
            raise CheckpointError(f"{self.path} is corrupt: alignment {alignment} is no multiple of 8")
        table = [cursor.tensor() for _ in range(count)]
        start = cursor.position + -cursor.position % alignment
        tensors = {}
        for name, shape, kind, nbytes, offset in table:
            if name in tensors or offset % alignment:
                raise CheckpointError(f"{self.path} is corrupt: {name} is listed twice or lies misaligned")
            end = start + offset + nbytes
            if end > len(self.data):
                raise CheckpointError(
                    f"{self.path} is truncated: {name} ends at byte {end:,} of a file of {len(self.data):,}; "
                    "download it again"
                )
            tensors[name] = GGUFTensor(name, shape, kind, start + offset, nbytes)
        return tensors

    @overload
    def integer(self, key: str, default: int) -> int: ...
    @overload
    def integer(self, key: str, default: None = None) -> int | None: ...
    def integer(self, key: str, default: int | None = None) -> int | None:
        """Return a whole number of the metadata; of an array, the value all elements share."""
        value = self.metadata.get(key, default)
        if isinstance(value, GGUFArray) and len(set(value)) == 1:
            value = value[0]
        if value is default or (isinstance(value, int) and not isinstance(value, bool)):
            return value
        raise ConfigError(f"{self.path}: {key} is {_shown(value)}; one whole number is supported")

    def number(self, key: str, default: float) -> float:
        """Return a number; a float32 becomes the shortest decimal that names it (1e-05)."""
        value = self.metadata.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{self.path}: {key} is {_shown(value)}, not a number")
        return _short_decimal(value)

    def text(self, key: str) -> str | None:
        value = self.metadata.get(key)
        if value is not None and not isinstance(value, str):
            raise ConfigError(f"{self.path}: {key} is {_shown(value)}, not a string")
        return value

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Every id that ends a generation: of the text, a turn, a message."""
        ids = (self.integer(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
        return tuple(dict.fromkeys(token for token in ids if token is not None))


class GGUFArray(Sequence[Any]):
    """An array of the metadata, decoded when an element is first asked for."""

    def __init__(self, cursor: _Cursor, kind: int, count: int) -> None:
        self._source, self._kind, self._count = (cursor.path, cursor.data, cursor.position), kind, count

    @cached_property
    def _values(self) -> Sequence[Any]:
        path, data, start = self._source
        if self._kind != _STRING:
            return struct.unpack_from(f"<{self._count}{_SCALARS[self._kind]}", data, start)
        cursor = _Cursor(path, data, start)
        return [cursor.string() for _ in range(self._count)]

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        return self._values[index]


class _Cursor:
    """Reads one value after the other; running past the end of the file is an error."""

    def __init__(self, path: Path, data: mmap.mmap, position: int = 0) -> None:
        self.path, self.data, self.position = path, data, position

    def version(self) -> int:
        magic = self.data[:4]
        if magic != b"GGUF":
            raise CheckpointError(f"{self.path} is no GGUF file: it begins with {magic!r}")
        self.position = 4
        raw = self.data[4:8]
        version: int = self.scalar("I")
        if version in (2, 3):
            return version
        if int.from_bytes(raw, "big") in (2, 3):
            raise CheckpointError(f"{self.path} is a big-endian GGUF: convert it to little-endian")
        raise CheckpointError(
            f"{self.path} is GGUF version {version}; known are 2 and 3: convert the model again"
        )

    def scalar(self, code: str) -> Any:
        layout = struct.Struct("<" + code)
        if self.position + layout.size > len(self.data):
            raise self._truncated()
        (value,) = layout.unpack_from(self.data, self.position)
        self.position += layout.size
        return value

    def count(self, what: str, smallest: int) -> int:
        """Read a count, and refuse one that the rest of the file cannot hold at `smallest` bytes each."""
        count: int = self.scalar("Q")
        if count * smallest > len(self.data) - self.position:
            raise CheckpointError(
                f"{self.path} is truncated or corrupt: {count:,} {what} do not fit into "
                f"{len(self.data):,} bytes"
            )
        return count

    def string(self) -> str:
        length: int = self.scalar("Q")
        start, self.position = self.position, self.position + length
        if length > _LONGEST_STRING or self.position > len(self.data):
            raise self._truncated()
        try:
            return self.data[start : self.position].decode()
        except UnicodeDecodeError:
            raise CheckpointError(
                f"{self.path} is corrupt: the string at byte {start:,} is not UTF-8"
            ) from None

    def value(self, key: str) -> Any:
        kind = self.scalar("I")
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array(key)
        if kind not in _SCALARS:
            raise CheckpointError(f"{self.path} is corrupt: {key} has the unknown value type {kind}")
        return self.scalar(_SCALARS[kind])

    def _array(self, key: str) -> GGUFArray:
        kind = self.scalar("I")
        if kind != _STRING and kind not in _SCALARS:
            raise CheckpointError(f"{self.path}: {key} is an array of the unsupported value type {kind}")
        element = 8 if kind == _STRING else struct.calcsize("<" + _SCALARS[kind])
        count = self.count(f"elements of {key}", element)
        if count > _LONGEST_ARRAY:
            raise CheckpointError(f"{self.path} is corrupt: {key} claims {count:,} elements")
        array = GGUFArray(self, kind, count)
        if kind == _STRING:
            self._skip_strings(count)
        else:
            self.position += count * element
        return array

    def _skip_strings(self, count: int) -> None:
        """Walk over strings without decoding; some 10**5 of them, so the loop does nothing else."""
        unpack, data, position = _U64.unpack_from, self.data, self.position
        try:
            for _ in range(count):
                position += 8 + unpack(data, position)[0]
        except (struct.error, OverflowError):
            raise self._truncated() from None
        if position > len(data):
            raise self._truncated()
        self.position = position

    def tensor(self) -> tuple[str, tuple[int, ...], str, int, int]:
        """Read one row of the table of tensors: name, row-major shape, type, bytes, relative offset."""
        name = self.string()
        n_dims = self.scalar("I")
        if not 1 <= n_dims <= 4:
            raise CheckpointError(f"{self.path} is corrupt: {name} has {n_dims} dimensions")
        shape = tuple(self.scalar("Q") for _ in range(n_dims))[::-1]
        number, offset = self.scalar("I"), self.scalar("Q")
        if number not in GGML_TYPES:
            names = ", ".join(name for name, _, _ in GGML_TYPES.values())
            raise CheckpointError(
                f"{self.path}: {name} has the unknown tensor type {number}; known are {names}"
            )
        kind, block, block_bytes = GGML_TYPES[number]
        elements = 1
        for size in shape:
            elements *= size
        if elements == 0 or shape[-1] % block:
            raise CheckpointError(
                f"{self.path} is corrupt: {name} {list(shape)} is no whole blocks of {kind}"
            )
        return name, shape, kind, elements // block * block_bytes, offset

    def _truncated(self) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is truncated or corrupt: its header runs past the end at byte {len(self.data):,}; "
            "download it again"
        )


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise CheckpointError(f"{path} is empty: download it again") from None


def _short_decimal(value: float) -> float:
    """Return the shortest decimal that rounds to the same float32."""
    exact = struct.pack("<f", value)
    for digits in range(1, 9):
        short = float(f"{value:.{digits}g}")
        if struct.pack("<f", short) == exact:
            return short
    return value


def _shown(value: Any) -> str:
    return f"an array of {len(value):,}" if isinstance(value, GGUFArray) else repr(value)
