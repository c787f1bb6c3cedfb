"""What a benchmark finds, as values: `asdict` of a `Bench` is the body of a record of kind `bench`.

M rows of x, N and K of a matrix (N, K). Bytes of weights are those of codes and scales as a checkpoint stores them,
whatever a kernel makes of them. Every ratio is a median of ratios of runs that came one after the other, so that a
machine whose speed drifts changes both sides alike.

No torch here: reports read records with these classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

OURS, BF16 = "quantkit", "torch bf16"


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

    def roof(self, intensity: float) -> float:
        """Return the most operations a second for so many of them on each byte that is read."""
        return min(self.flops_per_s, self.bytes_per_s * intensity)


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
        scheme: of the blocks' matrices; embedding and head are bfloat16.
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
    """Return the sums of each scheme and M, in the order of the cells."""
    grouped: dict[tuple[str, int], list[Cell]] = {}
    for cell in cells:
        grouped.setdefault((cell.scheme, cell.m), []).append(cell)
    return [
        _layer(scheme, group, OURS, sum(cell.weight_bytes for cell in group))
        for (scheme, _), group in grouped.items()
    ]


def bf16_layers(cells: Sequence[Cell]) -> list[Layer]:
    """Return what torch does with the same matrices in bfloat16, beside the first scheme."""
    first = [cell for cell in cells if cell.scheme == cells[0].scheme]
    grouped = [[cell for cell in first if cell.m == m] for m in dict.fromkeys(cell.m for cell in first)]
    return [_layer(BF16, group, BF16, sum(2 * cell.n * cell.k for cell in group)) for group in grouped]


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
