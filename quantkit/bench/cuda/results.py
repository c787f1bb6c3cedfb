"""What a benchmark on a CUDA GPU finds, as values: `asdict` of a `CudaBench` is the body of a record.

B sequences. As in `quantkit.bench.results`, whose cells it shares, bytes of weights are those of codes and scales as
a checkpoint stores them. No torch here: reports read records with these classes.
"""

from __future__ import annotations

from dataclasses import dataclass

from quantkit.bench.results import Bench, Cell, Words

DEQUANTIZE, BITSANDBYTES = "dequantize + cuBLAS", "bitsandbytes"


@dataclass(frozen=True)
class Gpu:
    """Where it ran.

    Attributes:
        name: the GPU's.
        capability: its compute capability.
        tuning: the launches that quantkit has for it, as `quantkit.kernels.triton.tuning` says them.
        multiprocessors: of the GPU.
        l2_bytes: of its second-level cache.
        memory_bytes: of the GPU.
        cuda: the version that torch was built for.
        torch: its version.
        triton: its version.
        quantkit: its version.
        backend: what ran quantkit's matrices.
        peers: versions of the packages that ran beside.
        settings: driver, clocks and power, where NVML tells.
    """

    name: str
    capability: str
    tuning: str
    multiprocessors: int
    l2_bytes: int
    memory_bytes: int
    cuda: str
    torch: str
    triton: str
    quantkit: str
    backend: str
    peers: dict[str, str]
    settings: dict[str, str]

    @property
    def line(self) -> str:
        """All that matters, in a line."""
        return f"{self.name}, torch {self.torch}, Triton {self.triton}, quantkit {self.quantkit}"


@dataclass(frozen=True)
class CudaLimits:
    """What the GPU can do at most, medians of the same run.

    Attributes:
        bytes_per_s: of a copy within its memory, bytes read and bytes written: what all else is held to.
        read_bytes_per_s: of torch's sum.
        flops_per_s: of a bfloat16 product in torch of random matrices; a multiplication and an addition are two.
    """

    bytes_per_s: float
    read_bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True)
class Method:
    """How it was measured.

    Attributes:
        seed: of all random numbers.
        rounds: replays of each graph of kernels that were timed.
        away_bytes: what the copies of a matrix take together at least.
        passes: over all copies, in one graph, for up to `short_rows` rows; one for more.
        short_rows: see there.
        copy_bytes: of the copy that tells the bandwidth, read and written together.
        product: M, N and K of the product that tells the peak.
        decode_rounds: how often the tokens were decoded.
        prefill_rounds: how often a prompt was run.
        compile_s: how long all kernels took to compile before anything was timed.
    """

    seed: int
    rounds: int
    away_bytes: int
    passes: int
    short_rows: int
    copy_bytes: int
    product: tuple[int, int, int]
    decode_rounds: int
    prefill_rounds: int
    compile_s: float


@dataclass(frozen=True)
class Decode:
    """A whole model with random weights that decodes: B sequences, a token of each in a step, up to a context.

    Attributes:
        model: the one whose shapes it has.
        scheme: of the blocks' matrices; embedding and head are bfloat16.
        kv_bits: of a cached element.
        batch: B.
        context: tokens in the cache after the last step.
        steps: that were timed at once, greedy, without a word from the host.
        rounds: how often.
        weights_bytes: of the whole model.
        step_bytes: that a step reads at least: all weights but the embedding, and the cache at its mean length.
        seconds: of a step, median.
        roof_share: the time that copying `step_bytes` would take, beside it.
        matrices_seconds: of each contender for the kernels: the blocks' matrices alone at B rows, a step's sum of
            medians; empty where they were not run.
    """

    model: str
    scheme: str
    kv_bits: int
    batch: int
    context: int
    steps: int
    rounds: int
    weights_bytes: int
    step_bytes: int
    seconds: float
    roof_share: float
    matrices_seconds: dict[str, float]

    @property
    def tokens_per_s(self) -> float:
        """Of all sequences together."""
        return self.batch / self.seconds


@dataclass(frozen=True)
class Prefill:
    """A whole model with random weights that runs one prompt.

    Attributes:
        model: the one whose shapes it has.
        scheme: of the blocks' matrices.
        tokens: of the prompt, run at once.
        rounds: how often.
        flops: of the matrices, of attention, and of one token's head.
        seconds: median.
        roof_share: what the GPU would need for these operations, or for reading the weights if that takes longer,
            beside it.
    """

    model: str
    scheme: str
    tokens: int
    rounds: int
    flops: int
    seconds: float
    roof_share: float

    @property
    def tokens_per_s(self) -> float:
        """Of the prompt."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Repeat:
    """Whether the same input gave the same bits twice.

    Attributes:
        what: was run.
        runs: different inputs.
        equal: those of them that gave the same bits.
    """

    what: str
    runs: int
    equal: int


@dataclass(frozen=True)
class Failure:
    """What could not be run, or was left out, and why, in a line."""

    what: str
    reason: str


@dataclass(frozen=True)
class CudaBench:
    """All of one benchmark on a GPU.

    Attributes:
        device: `cuda`, which tells its record apart.
        quick: a small run that only shows that everything works: its figures mean nothing.
        finished: False in what was written before the end.
        machine: where.
        limits: what the GPU can do.
        method: how it was measured.
        shapes: the preset whose matrices `cells` have.
        cells: the kernels.
        prefills: whole models, prompts.
        decodes: whole models, token by token.
        repeats: what was run twice.
        failures: what is missing.
    """

    device: str
    quick: bool
    finished: bool
    machine: Gpu
    limits: CudaLimits
    method: Method
    shapes: str
    cells: tuple[Cell, ...] = ()
    prefills: tuple[Prefill, ...] = ()
    decodes: tuple[Decode, ...] = ()
    repeats: tuple[Repeat, ...] = ()
    failures: tuple[Failure, ...] = ()

    @property
    def words(self) -> Words:
        """How its figures are said."""
        return Words("CUDA kernels", "copies", "copy bandwidth", "µs", 1e6, "TFLOP/s", 1e12)


Finding = Cell | Prefill | Decode | Repeat | Failure
AnyBench = Bench | CudaBench
