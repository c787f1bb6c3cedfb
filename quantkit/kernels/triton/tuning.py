"""How the kernels are launched, for each family of GPUs. Data: nothing is tuned when a program runs.

Hopper's figures were measured on an H200 (`reports/measured`), the others' follow from counting: 16-byte loads in
flight against what the memory's latency needs, and registers against spills.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

KINDS = ("int8", "int4", "int4-asym", "nf4")


@dataclass(frozen=True)
class Batch:
    """One launch of `batch_kernel`.

    Attributes:
        limit: rows of x up to which it runs.
        rows: of the matrix, a program.
        warps: of a program.
        stages: tiles in flight.
        programs: of one launch; K is split until there are about so many.
        lines: rows of x a program at most.
        scaled: whether scales meet the weights, in x's dtype, and not the sums, which takes half the registers.
    """

    limit: int
    rows: int
    warps: int
    stages: int
    programs: int = 512
    lines: int = 64
    scaled: bool = False


@dataclass(frozen=True)
class Row:
    """A launch of `row_kernel`.

    Attributes:
        warps: of the launch; each block of rows is shared by a power of two of them, until there are about so many.
        tiles: of 16 rows, that a warp loads at once, at most; on the way to registers one of several groups counts
            as many.
        parts: times 16 rows are a block; a matrix of two halves has two.
        registers: of a thread, at most; None leaves it to the compiler.
        stages: slots of shared memory for what a warp loads at once; 0 where the next tiles go to registers.
        most_rows: of the matrix, up to which it runs.
    """

    warps: int
    tiles: int
    parts: int = 1
    registers: int | None = None
    stages: int = 0
    most_rows: int = 1 << 16


@dataclass(frozen=True)
class Tuning:
    """The launch of every kernel on one family.

    Attributes:
        batches: for each kind of codes, in the order of their limits; above the last, the matrix is dequantized and
            multiplied.
        rows: for each kind of codes, how one row of x is multiplied, in the order of their `most_rows`; other kinds,
            and matrices of more rows, go by `batches`.
        halves: likewise where one half of the matrix is the other's gate.
        early: whether kernels of one row begin before the one ahead has ended; capability 9.0 is the first that can.
        vector: kinds whose product with one row is `vector_kernel`'s; of others it is `batch_kernel`'s.
        vector_programs: of one launch; K is split until there are about so many.
        vector_rows: of the matrix, a program of `vector_kernel`.
        vector_unroll: tiles whose loads are issued together.
        vector_warps: of a program.
        dequantize_rows: of the matrix, a program of `dequantize_kernel`.
        dequantize_warps: of a program.
    """

    batches: Mapping[str, tuple[Batch, ...]]
    rows: Mapping[str, tuple[Row, ...]] = field(default_factory=dict)
    halves: Mapping[str, tuple[Row, ...]] = field(default_factory=dict)
    early: bool = False
    vector: frozenset[str] = frozenset(KINDS)
    vector_programs: int = 512
    vector_rows: int = 64
    vector_unroll: int = 2
    vector_warps: int = 4
    dequantize_rows: int = 64
    dequantize_warps: int = 4

    def batch(self, kind: str, rows: int) -> Batch | None:
        """Return the launch of `batch_kernel` for so many rows of x, None where there are too many."""
        return next((batch for batch in self.batches.get(kind, ()) if rows <= batch.limit), None)


def _alike(*batches: Batch) -> dict[str, tuple[Batch, ...]]:
    return dict.fromkeys(KINDS, batches)


_HOPPER = Tuning(
    {
        "int8": (
            Batch(1, rows=64, warps=2, stages=4, programs=528),
            Batch(32, rows=64, warps=4, stages=4, programs=528),
            Batch(128, rows=128, warps=4, stages=3, programs=264),
            Batch(256, rows=128, warps=8, stages=3, programs=132),
        ),
        "int4": (
            Batch(1, rows=64, warps=2, stages=3, programs=528),
            Batch(32, rows=128, warps=4, stages=4, programs=528),
            Batch(64, rows=128, warps=8, stages=3, programs=264),
            Batch(256, rows=128, warps=8, stages=3, programs=132),
        ),
        "int4-asym": (
            Batch(32, rows=64, warps=4, stages=3, programs=1056),
            Batch(64, rows=64, warps=8, stages=3, programs=528),
        ),
        "nf4": (
            Batch(1, rows=64, warps=2, stages=3, programs=528),
            Batch(32, rows=128, warps=4, stages=4, programs=264),
            Batch(256, rows=128, warps=4, stages=3, programs=264),
        ),
    },
    rows={
        "int8": (
            Row(warps=1500, tiles=2, stages=2, most_rows=4096),
            Row(warps=2000, tiles=1, stages=3, most_rows=16384),
            Row(warps=2000, tiles=2, parts=2, stages=3),
        ),
        "int4": (
            Row(warps=1500, tiles=2, registers=128, most_rows=4096),
            Row(warps=1000, tiles=4, registers=168, most_rows=16384),
            Row(warps=1500, tiles=4, parts=2, stages=2),
        ),
        "nf4": (
            Row(warps=1500, tiles=4, registers=128, most_rows=4096),
            Row(warps=1000, tiles=4, registers=168, most_rows=16384),
            Row(warps=2000, tiles=2, parts=2, registers=128),
        ),
    },
    halves={
        "int8": (Row(warps=1500, tiles=4, stages=3),),
        "int4": (Row(warps=1500, tiles=4, stages=3),),
        "nf4": (Row(warps=2000, tiles=2, registers=128),),
    },
    early=True,
    vector=frozenset(),
)

# by compute capability; a GPU takes the newest that is not newer than it
FAMILIES = {
    75: Tuning({}, vector_programs=256, vector_rows=32),  # Triton has no tensor cores before 8.0
    80: Tuning(
        _alike(Batch(32, rows=64, warps=4, stages=4), Batch(64, rows=128, warps=8, stages=2))
        | {"int4-asym": (Batch(32, rows=64, warps=8, stages=4), Batch(64, rows=128, warps=8, stages=2))}
    ),
    86: Tuning(_alike(Batch(32, rows=64, warps=4, stages=3, programs=384), Batch(64, 128, 8, 2, 384))),
    89: Tuning(_alike(Batch(32, rows=64, warps=4, stages=3), Batch(64, rows=128, warps=8, stages=2))),
    90: _HOPPER,
    # of 8 rows of x Triton 3.6 makes a warp's own products, of more, and 3.9 of all, those that take unpacked weights
    # from tensor memory; it made nothing at all of some of the latter at int4-asym
    100: Tuning(
        _alike(Batch(8, rows=64, warps=4, stages=4), Batch(64, rows=64, warps=4, stages=3))
        | {"int4-asym": (Batch(32, rows=64, warps=4, stages=4, lines=8),)}
    ),
    120: Tuning(_alike(Batch(32, rows=64, warps=4, stages=3), Batch(64, rows=64, warps=8, stages=2))),
}
HOPPER = 90


def tuning(capability: int) -> Tuning:
    """Return the launches of a GPU of compute capability `capability`, 10 times its major number plus its minor."""
    return FAMILIES[max(family for family in FAMILIES if family <= capability)]
