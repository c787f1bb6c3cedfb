"""How the kernels are launched, for each family of GPUs. Data: nothing is tuned when a program runs.

None of these figures was measured on a GPU yet. They follow from counting: 16-byte loads in flight against what the
memory's latency needs, and registers against spills.
"""

from __future__ import annotations

from dataclasses import dataclass


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
        scaled: whether scales meet the matrix, rounded to x's dtype, and not the sums.
    """

    limit: int
    rows: int
    warps: int
    stages: int
    programs: int = 512
    lines: int = 64
    scaled: bool = False


@dataclass(frozen=True)
class Tuning:
    """The launch of every kernel on one family.

    Attributes:
        programs: of one launch; K is split until there are about so many.
        batches: in the order of their limits; above the last, the matrix is dequantized and multiplied.
        vector: kinds of codes whose product with one row is `vector_kernel`'s; of others it is `batch_kernel`'s.
        vector_rows: of the matrix, a program of `vector_kernel`.
        vector_unroll: tiles whose loads are issued together.
        vector_warps: of a program.
        dequantize_rows: of the matrix, a program of `dequantize_kernel`.
        dequantize_warps: of a program.
        overlap: whether kernels start while the one before them ends.
    """

    programs: int
    batches: tuple[Batch, ...]
    vector: frozenset[str] = frozenset({"int8", "int4", "nf4"})
    vector_rows: int = 64
    vector_unroll: int = 4
    vector_warps: int = 4
    dequantize_rows: int = 64
    dequantize_warps: int = 4
    overlap: bool = False

    def batch(self, rows: int) -> Batch | None:
        """Return the launch of `batch_kernel` for so many rows of x, None where there are too many."""
        return next((batch for batch in self.batches if rows <= batch.limit), None)


# by compute capability; a GPU takes the newest that is not newer than it
FAMILIES = {
    75: Tuning(256, ()),  # Triton has no tensor cores before 8.0
    80: Tuning(512, (Batch(32, rows=64, warps=4, stages=4), Batch(64, rows=128, warps=8, stages=2))),
    86: Tuning(384, (Batch(32, rows=64, warps=4, stages=3), Batch(64, rows=128, warps=8, stages=2))),
    89: Tuning(512, (Batch(32, rows=64, warps=4, stages=3), Batch(64, rows=128, warps=8, stages=2))),
    90: Tuning(
        640, (Batch(32, rows=64, warps=4, stages=3), Batch(64, rows=64, warps=8, stages=3)), overlap=True
    ),
    100: Tuning(640, ()),  # what Triton makes of `batch_kernel` for these tensor cores was not looked into
    120: Tuning(640, (Batch(32, rows=64, warps=4, stages=3), Batch(64, rows=128, warps=8, stages=2))),
}
HOPPER = 90


def tuning(capability: int) -> Tuning:
    """Return the launches of a GPU of compute capability `capability`, 10 times its major number plus its minor."""
    return FAMILIES[max(family for family in FAMILIES if family <= capability)]
