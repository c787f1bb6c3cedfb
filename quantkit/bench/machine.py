"""The machine: what it is, how fast it reads memory, and how fast torch multiplies bfloat16 on it."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch

from calculators.units import MIB
from quantkit import __version__
from quantkit.bench.results import Limits, Machine, Reader
from quantkit.bench.timing import Effort, alternate
from quantkit.kernels import native

LINE = 64
ASSUMED_CACHE = 64 * MIB  # where the system does not say
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_BUFFER_BYTES, _QUICK_BUFFER_BYTES = 512 * MIB, 64 * MIB
_OF_MEMORY = 24  # the share of memory that the copies of one thing take at most
_PRODUCTS = ((256, 8192, 4096), (512, 4096, 4096), (1024, 4096, 2048))  # (M, N, K)
_QUICK_PRODUCTS = ((256, 1024, 1024),)


def describe() -> Machine:
    """Return what this machine is.

    Raises:
        BackendError: the CPU kernels are not built.
    """
    return Machine(
        cpu=_cpu_name(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        isa=native.require().isa(),
        cache_bytes=last_level_cache(),
        memory_bytes=memory_bytes(),
        torch=torch.__version__,
        quantkit=__version__,
    )


def last_level_cache() -> int:
    """Return the bytes of the largest cache that the first core sees."""
    sizes = [re.fullmatch(r"(\d+)([KMG]?)", path.read_text().strip()) for path in _CACHES.glob("index*/size")]
    return max((int(size[1]) * _UNITS.get(size[2], 1) for size in sizes if size), default=ASSUMED_CACHE)


def uncached_bytes() -> int:
    """Return how much to read so that little stays in a cache: four times the last level, if memory has the room.

    A virtual machine may name a cache that many share, of which it has a part only.
    """
    return min(4 * last_level_cache(), memory_bytes() // _OF_MEMORY) // MIB * MIB


def memory_bytes() -> int:
    """Return the bytes of the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", path.read_text(), re.MULTILINE) if path.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


class Memory:
    """Two buffers that no cache holds, one in huge pages and one in pages of 4 KiB, and the ways to read them.

    Attributes:
        fastest: the reader that kernels are held to; `choose` sets it.
    """

    def __init__(self, quick: bool = False) -> None:
        nbytes = _QUICK_BUFFER_BYTES if quick else max(_BUFFER_BYTES, uncached_bytes())
        self._native = native.require()
        self._buffers = {"huge": self._buffer(nbytes, True), "4K": self._buffer(nbytes, False)}
        self.fastest = Reader("plain", "4K", 0.0)

    def _buffer(self, nbytes: int, huge: bool) -> torch.Tensor:
        buffer = torch.empty(nbytes + LINE, dtype=torch.uint8)
        buffer = buffer[-buffer.data_ptr() % LINE :][:nbytes]
        self._native.advise_huge_pages(buffer, huge)  # before it is touched
        return buffer.fill_(1)

    def choose(self, effort: Effort) -> list[Reader]:
        """Time every reader over its whole buffer and return them, the fastest first; its buffer alone is kept."""
        ways = [(name, pages) for pages in self._buffers for name in self._native.readers()]
        nbytes = next(iter(self._buffers.values())).numel()

        def read(name: str, pages: str, turn: int) -> None:
            self._native.read(self._buffers[pages], name, torch.get_num_threads())

        times = alternate({way: partial(read, *way) for way in ways}, effort)
        readers = [Reader(*way, nbytes / median(times[way])) for way in ways]
        readers.sort(key=lambda reader: -reader.bytes_per_s)
        self.fastest = readers[0]
        self._buffers = {self.fastest.pages: self._buffers[self.fastest.pages]}
        return readers

    def read(self, turn: int, nbytes: int) -> None:
        """Read so many bytes by the fastest reader, from another place each turn.

        Args:
            turn: counts up.
            nbytes: at most what `readable` returns for it.
        """
        buffer = self._buffers[self.fastest.pages]
        start = turn * nbytes % (buffer.numel() - nbytes + LINE)
        self._native.read(buffer[start : start + nbytes], self.fastest.name, torch.get_num_threads())

    def readable(self, nbytes: int) -> int:
        """Return how much `read` takes for so many bytes: whole lines, and no more than there are."""
        return min(-(-nbytes // LINE) * LINE, self._buffers[self.fastest.pages].numel())


class Product:
    """A bfloat16 product of torch, x (M, K) by W (N, K).

    Attributes:
        flops: multiplications and additions.
    """

    def __init__(self, m: int, n: int, k: int) -> None:
        self._x, self._weight = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()
        self.flops = 2 * m * n * k

    def run(self, turn: int) -> None:
        """Multiply."""
        torch.nn.functional.linear(self._x, self._weight)


@dataclass(frozen=True)
class Roof:
    """What runs beside everything else, round by round: the fastest reader, and the fastest product."""

    memory: Memory
    product: Product


def measure(quick: bool = False) -> tuple[Limits, Roof]:
    """Return the read bandwidth and the speed of bfloat16 products, and what reached them.

    Raises:
        BackendError: the CPU kernels are not built.
    """
    memory = Memory(quick)
    readers = memory.choose(Effort(2, 0.0) if quick else Effort(9, 0.0))
    products = [Product(*shape) for shape in (_QUICK_PRODUCTS if quick else _PRODUCTS)]
    times = alternate({each: each.run for each in products}, Effort(2, 0.0) if quick else Effort(9, 2.0))
    rates = {each: each.flops / median(times[each]) for each in products}
    fastest = max(products, key=rates.__getitem__)
    return Limits(tuple(readers), rates[fastest]), Roof(memory, fastest)
