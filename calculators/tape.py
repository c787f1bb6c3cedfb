"""A decoder's sizes, and the tape on which its requests to the allocator are played.

B batch, T tokens of a chunk, S keys attended to, H hidden, F FFN, A query heads, N key/value heads,
D head_dim, V vocabulary. A shape is written as its letters: "B T H".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from calculators.allocator import Block, CachingAllocator
from calculators.weights import Packing

FP32 = 4  # bytes
INT32 = 4
INT64 = 8  # of token ids and positions
BOOL = 1
HALF = 2


@dataclass(frozen=True)
class Matrix:
    """A linear layer's matrix (rows, cols) and how it is packed; `scale_bits` 0 is a plain one."""

    rows: int
    cols: int
    packing: Packing

    @property
    def quantized(self) -> bool:
        return self.packing.scale_bits > 0


@dataclass(frozen=True)
class Layer:
    """The matrices of one decoder layer."""

    q: Matrix
    k: Matrix
    v: Matrix
    o: Matrix
    gate: Matrix
    up: Matrix
    down: Matrix


@dataclass(frozen=True)
class Model:
    """One decoder as it is run.

    Attributes:
        hidden, ffn, n_heads, n_kv_heads, head_dim, vocab: widths, in elements.
        element_bytes: of the compute dtype, 2 or 4.
        layers: each layer's matrices; equal layers are one object.
        head: the output head.
        attention: `flash` or `math`.
        sm_count: the device's streaming multiprocessors.
        window: tokens of a sliding window; None attends to the whole context.
    """

    hidden: int
    ffn: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab: int
    element_bytes: int
    layers: tuple[Layer, ...]
    head: Matrix
    attention: str
    sm_count: int
    window: int | None = None


@dataclass(frozen=True)
class Cache:
    """A KV cache as it is run.

    Attributes:
        bits: of an element.
        group: elements of a head that share a scale; 0 is the whole head.
        max_tokens: tokens that each sequence will reach.
    """

    bits: int
    group: int
    max_tokens: int


class Tape:
    """Plays the requests of one model on an allocator.

    Args:
        allocator: where the requests go.
        model: whose forward pass it is.
        cache: the KV cache it runs with.
        batch: sequences.
        workspace_bytes: of cuBLAS, taken with the first matrix product and kept.
    """

    def __init__(
        self, allocator: CachingAllocator, model: Model, cache: Cache, batch: int, workspace_bytes: int
    ) -> None:
        self.allocator, self.model, self.cache = allocator, model, cache
        self.element_bytes = model.element_bytes
        self._workspace_bytes = workspace_bytes
        self._kept: set[str] = set()
        self._letters: dict[str, int] = {
            "B": batch, "H": model.hidden, "F": model.ffn, "A": model.n_heads, "N": model.n_kv_heads,
            "D": model.head_dim, "V": model.vocab,
        }  # fmt: skip
        self._products: dict[str, int] = {}

    def size(self, tokens: int, keys: int) -> None:
        """Set T and S."""
        self._letters |= {"T": tokens, "S": keys}
        self._products.clear()

    @property
    def converts(self) -> bool:
        """Whether the cache holds another dtype than attention computes in."""
        return self.cache.bits != 8 * self.element_bytes

    @property
    def rolls(self) -> bool:
        """Whether a window makes the cache roll."""
        return self.model.window is not None and self.model.window < self.cache.max_tokens

    @property
    def slots(self) -> int:
        """Tokens that the cache holds."""
        window, most = self.model.window, self.cache.max_tokens
        return most if window is None else min(window, most)

    @property
    def letters(self) -> Mapping[str, int]:
        """What the letters of a shape stand for now."""
        return self._letters

    def new(self, name: str, shape: str, itemsize: int) -> Block | None:
        """Take a tensor of a shape written in letters."""
        count = self._products.get(shape)
        if count is None:
            count = 1
            for letter in shape.split():
                count *= self._letters[letter]
            self._products[shape] = count
        return self.request(name, count * itemsize, (shape, itemsize))

    def take(self, name: str, *factors: int) -> Block | None:
        """Take so many bytes, the product of `factors`."""
        nbytes = 1
        for factor in factors:
            nbytes *= factor
        return self.request(name, nbytes, factors)

    def request(self, name: str, nbytes: int, origin: tuple[int | str, ...]) -> Block | None:
        """Pass a request on; `name` and `origin`, shape and factors, are for those who explain."""
        return self.allocator.malloc(nbytes)

    def drop(self, *blocks: Block | None) -> None:
        """Release tensors; None stands for one that was not needed."""
        for block in blocks:
            if block is not None:
                self.allocator.free(block)

    def keep(self, name: str, nbytes: int) -> None:
        """Take what is made once and kept."""
        if name not in self._kept:
            self._kept.add(name)
            self.take(name, nbytes)

    def workspace(self) -> None:
        """Take cuBLAS's workspace with the first matrix product."""
        self.keep("cuBLAS workspace", self._workspace_bytes)

    def in_pieces(self, total: int, step: int, play: Callable[[int], None]) -> None:
        """Play `total` in steps, with a shorter last one; whole steps only until one needs nothing new."""
        for _ in range(total // step):
            before = self.allocator.reserved
            play(step)
            if self.allocator.reserved == before:
                break
        if total % step:
            play(total % step)


class Term(NamedTuple):
    """A tensor, or what else takes memory, how its bytes come about, and how many they are."""

    name: str
    formula: str
    nbytes: int


class NotedTape(Tape):
    """A tape that notes what is alive when the most is.

    Attributes:
        at_peak: the terms then, in the order in which they were taken.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.at_peak: tuple[Term, ...] = ()
        self._alive: dict[Block, Term] = {}

    def request(self, name: str, nbytes: int, origin: tuple[int | str, ...]) -> Block | None:
        grows = self.allocator.requested + nbytes > self.allocator.peak_requested
        block = super().request(name, nbytes, origin)
        if block is not None:
            self._alive[block] = Term(name, self._formula(origin), nbytes)
        if grows:
            self.at_peak = tuple(self._alive.values())
        return block

    def _formula(self, origin: tuple[int | str, ...]) -> str:
        factors = [f"{part:,}" for part in origin if isinstance(part, int)]
        letters = [letter for part in origin if isinstance(part, str) for letter in part.split()]
        return " x ".join([*(f"{letter} {self.letters[letter]:,}" for letter in letters), *factors]) + " B"

    def drop(self, *blocks: Block | None) -> None:
        for block in blocks:
            if block is not None:
                del self._alive[block]
        super().drop(*blocks)
