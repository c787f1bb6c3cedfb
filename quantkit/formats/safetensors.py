"""The safetensors container: a header read without torch, tensors mapped, shards written as a stream.

Format: an 8-byte little-endian length, that many bytes of JSON, then the tensors' bytes without
holes (https://github.com/huggingface/safetensors#format). The package of that name maps a whole
file and keeps what it touched resident; quantizing a checkpoint that is larger than memory needs
pages given back and tensors written one at a time, hence this reader and writer.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shown
from typing import TYPE_CHECKING, Any, TypeGuard

from quantkit.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from quantkit.formats.checkpoint import ReadFile

DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
FLOAT_DTYPES = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}
_TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64",
    "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
_MAX_HEADER = 100_000_000  # the format's own limit
_LFS_POINTER = b"version https://git-lfs"
_ALIGNMENT = 8
_WAITING_BYTES = 128 << 20  # that may wait to be written
_SYNCED_BYTES = 256 << 20  # that are written before they are sent to the disk: the end need not wait for all


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: dtype by its safetensors name, shape, byte range in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


def checked_entry(name: str, value: Any, where: str, data_start: int = 0) -> Entry:
    """Return what a header says of a tensor.

    Args:
        name: of the tensor.
        value: its `dtype`, `shape` and `data_offsets`.
        where: named in error messages.
        data_start: the byte from which offsets count.

    Raises:
        CheckpointError: one of them is missing or of the wrong kind, or they contradict each other.
    """
    fields = value if isinstance(value, dict) else {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise CheckpointError(f"{where}: {name} has the unknown dtype {shown(dtype)}")
    if not _are_sizes(shape):
        raise CheckpointError(f"{where}: {name} has the shape {shown(shape)}, not a list of whole numbers")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where}: {name} has the data_offsets {shown(offsets)}, not two whole numbers")
    begin, end = offsets
    if end - begin != DTYPE_BYTES[dtype] * math.prod(shape):
        raise CheckpointError(
            f"{where}: {name} takes {end - begin:,} bytes, which {dtype} {shown(shape)} does not"
        )
    return Entry(dtype, tuple(shape), data_start + begin, data_start + end)


def _are_sizes(value: object) -> TypeGuard[Sequence[int]]:
    return isinstance(value, (list, tuple)) and all(type(size) is int and 0 <= size < 2**63 for size in value)


class SafetensorsFile:
    """One file: `entries` by name, and tensors mapped from it.

    Raises:
        CheckpointError: the file is missing, truncated, or its header is broken.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                head = file.read(len(_LFS_POINTER))
                if head == _LFS_POINTER:
                    raise CheckpointError(
                        f"{path} is a Git LFS pointer, not the file itself: run git lfs pull"
                    )
                length = int.from_bytes(head[:8], "little")
                if size < 8 or length > min(size - 8, _MAX_HEADER):
                    raise CheckpointError(
                        f"{path} is truncated or no safetensors file: its header does not fit"
                    )
                file.seek(8)
                raw = file.read(length)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
        self._data_start = 8 + length
        self.entries = self._parse(raw, size)
        self._map: mmap.mmap | None = None

    def _parse(self, raw: bytes, size: int) -> dict[str, Entry]:
        try:
            header = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.path} has a broken header: {error}") from None
        if not isinstance(header, dict):
            raise CheckpointError(f"{self.path} has a broken header: it is no JSON object")
        header.pop("__metadata__", None)
        where, start = str(self.path), self._data_start
        entries = {name: checked_entry(name, value, where, start) for name, value in header.items()}
        self._check_places(entries, size)
        return entries

    def _check_places(self, entries: Mapping[str, Entry], size: int) -> None:
        """Check that the tensors fill the file, each behind the other, as the format demands."""
        position = self._data_start
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
            if entry.end > size:
                raise CheckpointError(
                    f"{self.path} is truncated: {name} ends at byte {entry.end:,} of a file of {size:,}"
                )
            if entry.start != position:
                found = "overlaps the tensor before it" if entry.start < position else "has a hole before it"
                raise CheckpointError(
                    f"{self.path} is corrupt: {name} {found}; it begins at byte {entry.start:,}, not {position:,}"
                )
            position = entry.end
        if position != size:
            raise CheckpointError(
                f"{self.path} is corrupt: {size - position:,} bytes behind the last tensor belong to none"
            )

    def read_bytes(self, name: str) -> bytes:
        """Return a small tensor's raw bytes, without torch."""
        entry = self.entries[name]
        with self.path.open("rb") as file:
            file.seek(entry.start)
            return file.read(entry.nbytes)

    def tensor(self, name: str, read_file: ReadFile | None = None) -> torch.Tensor:
        """Return a tensor mapped privately from the file, or read into memory; see `Checkpoint.read`.

        Writing to it never reaches the disk.
        """
        import torch

        entry = self.entries[name]
        dtype = getattr(torch, _TORCH_NAMES[entry.dtype])
        if entry.nbytes == 0:
            return torch.empty(entry.shape, dtype=dtype)
        try:
            data = self._mapped(entry) if read_file is None else self._read(entry, read_file)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror}") from None
        if data.numel() < entry.nbytes:
            raise CheckpointError(f"{self.path} has become shorter since it was opened")
        if entry.start % dtype.itemsize and read_file is None:
            data = data.clone()  # an odd neighbour before it: views need alignment
        return data.view(dtype).view(entry.shape)

    def _mapped(self, entry: Entry) -> torch.Tensor:
        import torch

        there = min(entry.nbytes, self.path.stat().st_size - entry.start)
        if there <= 0:
            return torch.empty(0, dtype=torch.uint8)
        if self._map is None:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return torch.frombuffer(self._map, dtype=torch.uint8, count=there, offset=entry.start)

    def _read(self, entry: Entry, read_file: ReadFile) -> torch.Tensor:
        with self.path.open("rb", buffering=0) as file:
            return read_file(file.fileno(), entry.start, entry.nbytes)

    def drop_pages(self) -> None:
        """Give the mapped pages back; the next access reads them again."""
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)


class ShardWriter:
    """Writes one safetensors file tensor by tensor; `close` fills the header in.

    The header's room is reserved from the number of tensors expected. Tensors whose size would
    leave the next one misaligned wait in memory until the end; they are tiny. A thread writes while
    the caller makes the next tensor ready: what was handed over must stay as it is.
    """

    def __init__(self, path: Path, expected_names: list[str]) -> None:
        self.path = path
        longest_entry = 120  # dtype, shape and offsets in JSON, with room to spare
        room = sum(len(json.dumps(name)) + longest_entry for name in expected_names) + 64
        self._header_bytes = room + -(room + 8) % _ALIGNMENT
        self._file = path.open("wb")
        self._file.seek(8 + self._header_bytes)
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._late: list[tuple[str, torch.Tensor]] = []
        self._thread = ThreadPoolExecutor(1)
        self._under_way: deque[tuple[int, Future[None]]] = deque()
        self._unsynced = 0
        self.data_bytes = 0

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append a CPU tensor of any dtype."""
        if tensor.nbytes % _ALIGNMENT:
            self._late.append((name, tensor.clone()))
            return
        self._append(name, tensor)

    def _append(self, name: str, tensor: torch.Tensor) -> None:
        import torch

        torch_name = str(tensor.dtype).removeprefix("torch.")
        dtype = next(key for key, value in _TORCH_NAMES.items() if value == torch_name)
        begin = self.data_bytes
        self.data_bytes += tensor.nbytes
        self._header[name] = {
            "dtype": dtype,
            "shape": list(tensor.shape),
            "data_offsets": [begin, self.data_bytes],
        }
        if tensor.nbytes:
            data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
            self._under_way.append((tensor.nbytes, self._thread.submit(self._put, data)))
            self._wait(_WAITING_BYTES)

    def _put(self, data: memoryview) -> None:
        self._file.write(data)
        self._unsynced += data.nbytes
        if self._unsynced >= _SYNCED_BYTES:
            self._sync()

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._unsynced = 0

    def _wait(self, left: int) -> None:
        """Wait until at most `left` bytes are under way; raise what writing them raised."""
        while sum(nbytes for nbytes, _ in self._under_way) > left:
            self._under_way.popleft()[1].result()

    def close(self) -> None:
        """Write what waited and the header, and flush to the disk."""
        for name, tensor in sorted(self._late, key=lambda item: -item[1].dtype.itemsize):
            self._append(name, tensor)
        self._wait(0)
        raw = json.dumps(self._header, separators=(",", ":")).encode()
        if len(raw) > self._header_bytes:
            raise AssertionError("more tensors were written than the header has room for")
        self._file.seek(0)
        self._file.write(self._header_bytes.to_bytes(8, "little") + raw.ljust(self._header_bytes))
        self._sync()
        self._file.close()

    def abandon(self) -> None:
        """Close the file without completing it."""
        self._thread.shutdown(cancel_futures=True)
        self._file.close()
