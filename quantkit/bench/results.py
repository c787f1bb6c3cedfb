"""What a benchmark finds, as values: `asdict` of a `Bench` is the body of a record of kind `bench`.

M rows of x, N and K of a matrix (N, K). Bytes of weights are those of codes and scales as a checkpoint stores them,
whatever a kernel makes of them. Every ratio is a median of ratios of runs that came one after the other, so that a
machine whose speed drifts changes both sides alike.

No torch here: reports read records with these classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

OURS, BF16 = "quantkit", "torch bf16"


@dataclass(frozen=True)
class Words:
    """How the figures of one kind of machine are said.

    Attributes:
        kernels: what ran.
        moves: what the machine does to memory where that is measured.
        bandwidth: what the speed of that is called.
        time: the unit of a layer's time.
        times: how many of it make a second.
        rate: the unit of operations a second.
        rates: how many operations a second make one.
    """

    kernels: str
    moves: str
    bandwidth: str
    time: str
    times: float
    rate: str
    rates: float


class Limited(Protocol):
    """What a machine can do at most: bytes and operations a second, the two lines of a roofline."""

    @property
    def bytes_per_s(self) -> float: ...

    @property
    def flops_per_s(self) -> float: ...


def roof(limits: Limited, intensity: float) -> float:
    """Return the most operations a second for so many of them on each byte that is read."""
    return min(limits.flops_per_s, limits.bytes_per_s * intensity)


@dataclass(frozen=True)
class Machine:
    """Where it ran.

    Attributes:
        cpu: the model's name.
        cores: that this process may use.
        threads: that torch, and with it quantkit, uses.
        isa: the instruction set of quantkit's kernels.
        cache_bytes: of the last-level cache.
        memory_bytes: of the machine.
        torch: its version.
        quantkit: its version.
    """

    cpu: str
    cores: int
    threads: int
    isa: str
    cache_bytes: int
    memory_bytes: int
    torch: str
    quantkit: str

    @property
    def line(self) -> str:
        """All that matters, in a line."""
        ran = f"torch {self.torch}, quantkit {self.quantkit}"
        return f"{self.cpu}, {self.threads} threads, {self.isa}, {ran}"


@dataclass(frozen=True)
class Reader:
    """One way of reading memory and how fast it was, the median of several passes.

    Attributes:
        name: of the loop in `memory.cpp`.
        pages: `huge`, or `4K`.
        bytes_per_s: over a buffer that no cache holds.
    """

    name: str
    pages: str
    bytes_per_s: float


@dataclass(frozen=True)
class Limits:
    """What the machine can do at most: the two lines of a roofline.

    Attributes:
        readers: all that were tried, the fastest first.
        flops_per_s: of the fastest bfloat16 matrix product in torch; a multiplication and an addition are two.
    """

    readers: tuple[Reader, ...]
    flops_per_s: float

    @property
    def bytes_per_s(self) -> float:
        """The read bandwidth: that of the fastest reader."""
        return self.readers[0].bytes_per_s


@dataclass(frozen=True)
class Cell:
    """One matrix in one scheme, multiplied with M rows of bfloat16.

    Attributes:
        scheme: the precision's name.
        matrix: what the matrix is in a model, such as `gate_up`.
        n: N.
        k: K.
        m: M.
        weight_bytes: of codes and scales.
        rounds: how often each contender ran.
        seconds: median of each contender, `quantkit` among them.
        speedups: of quantkit over each other contender: the median ratio of its seconds to quantkit's.
        roof_shares: of quantkit and of torch in bfloat16: the time that the machine would need at least, beside the
            time that was taken. The machine needs the longer of reading the weights and of a bfloat16 product's
            operations, both at the speeds of the same round; at one row it is the share of the read bandwidth.
    """

    scheme: str
    matrix: str
    n: int
    k: int
    m: int
    weight_bytes: int
    rounds: int
    seconds: dict[str, float]
    speedups: dict[str, float]
    roof_shares: dict[str, float]

    @property
    def flops(self) -> int:
        """Multiplications and additions of the product."""
        return 2 * self.m * self.n * self.k


@dataclass(frozen=True)
class Peer:
    """Another program's run of the same shapes, in alternation with ours.

    Attributes:
        name: the program and its version.
        file_type: what all its matrices are stored in, embedding and head included.
        weights_bytes: of its file's tensors.
        prefill_tokens_per_s: median.
        decode_tokens_per_s: median.
        prefill_speedup: of quantkit over it, the median of paired ratios.
        decode_speedup: likewise.
    """

    name: str
    file_type: str
    weights_bytes: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    prefill_speedup: float
    decode_speedup: float


@dataclass(frozen=True)
class ModelRun:
    """A whole model with random weights, attention included: a prompt, then token by token after it.

    Attributes:
        model: the one whose shapes it has.
        scheme: of the blocks' matrices, and of a head of its own where a peer runs beside; else embedding and
            head are bfloat16.
        prompt_tokens: run at once.
        decode_tokens: run one by one, from a cache that holds the prompt.
        rounds: how often both were run.
        weights_bytes: of the whole model.
        token_bytes: of the weights that one token reads: all but the embedding, unless that is the head, too.
        prefill_tokens_per_s: median.
        decode_tokens_per_s: median.
        read_share: the share of the read bandwidth at which decoding takes in `token_bytes`, median of pairs.
        peer: another program beside it, None where there was none.
    """

    model: str
    scheme: str
    prompt_tokens: int
    decode_tokens: int
    rounds: int
    weights_bytes: int
    token_bytes: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    read_share: float
    peer: Peer | None


@dataclass(frozen=True)
class Bench:
    """All of one benchmark.

    Attributes:
        quick: a small run that only shows that everything works: its figures mean nothing.
        machine: where.
        limits: what the machine can do.
        shapes: the preset whose matrices `cells` have.
        cells: the kernels; empty where they were not asked for.
        models: whole models; empty where they were not asked for.
    """

    quick: bool
    machine: Machine
    limits: Limits
    shapes: str
    cells: tuple[Cell, ...]
    models: tuple[ModelRun, ...]

    @property
    def words(self) -> Words:
        """How its figures are said."""
        return Words("CPU kernels", "reads", "read bandwidth", "ms", 1e3, "GFLOP/s", 1e9)


@dataclass(frozen=True)
class Layer:
    """All matrices of one layer in one scheme with M rows: the sums of its cells.

    Attributes:
        name: the scheme's; `torch bf16` for what runs beside it.
        m: M.
        weight_bytes: of all matrices.
        seconds: sum of the medians.
        flops: sum.
        speedups: of quantkit over each other contender, matrices weighted by quantkit's time.
        roof_share: of what the machine can do at most, matrices weighted likewise.
    """

    name: str
    m: int
    weight_bytes: int
    seconds: float
    flops: int
    speedups: dict[str, float]
    roof_share: float

    @property
    def flops_per_s(self) -> float:
        """Operations a second while it ran; a machine that drifts moves them."""
        return self.flops / self.seconds

    @property
    def intensity(self) -> float:
        """Arithmetic intensity: operations for each byte of weights."""
        return self.flops / self.weight_bytes


def layers(cells: Sequence[Cell]) -> list[Layer]:
    """Return the sums of each scheme and M, in the order of the cells; those that lack a matrix are left out."""
    return [
        _layer(group[0].scheme, group, OURS, sum(cell.weight_bytes for cell in group))
        for group in whole_layers(cells)
    ]


def whole_layers(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Return the cells of each scheme and M that have every matrix there is."""
    grouped: dict[tuple[str, int], list[Cell]] = {}
    for cell in cells:
        grouped.setdefault((cell.scheme, cell.m), []).append(cell)
    matrices = len({cell.matrix for cell in cells})
    return [group for group in grouped.values() if len(group) == matrices]


def bf16_layers(cells: Sequence[Cell]) -> list[Layer]:
    """Return what torch does with the same matrices in bfloat16, beside the first scheme."""
    whole = whole_layers(cells)
    first = [group for group in whole if group[0].scheme == whole[0][0].scheme]
    return [_layer(BF16, group, BF16, sum(2 * cell.n * cell.k for cell in group)) for group in first]


def _layer(name: str, group: Sequence[Cell], contender: str, weight_bytes: int) -> Layer:
    seconds = sum(cell.seconds[contender] for cell in group)

    def weighted(values: Sequence[float]) -> float:
        pairs = zip(values, group, strict=True)
        return sum(value * cell.seconds[contender] for value, cell in pairs) / seconds

    others = [other for other in group[0].speedups if all(other in cell.speedups for cell in group)]
    return Layer(
        name=name,
        m=group[0].m,
        weight_bytes=weight_bytes,
        seconds=seconds,
        flops=sum(cell.flops for cell in group),
        speedups={
            other: weighted([cell.speedups[other] for cell in group]) for other in others if contender == OURS
        },
        roof_share=weighted([cell.roof_shares[contender] for cell in group]),
    )
