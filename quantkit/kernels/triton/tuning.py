"""How the kernels are launched, for each family of GPUs. Data: nothing is tuned when a program runs.

None of these figures was measured on a GPU yet. They follow from counting: 16-byte loads in flight against what the
memory's latency needs, and registers against spills.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tuning:
    """The launch of every kernel on one family.

    Attributes:
        programs: of one launch; K is split until there are about so many.
        vector_rows: of the matrix, a program of `vector_kernel`.
        vector_unroll: tiles whose loads are issued together.
        vector_warps: of a program.
        batch_limit: rows of x up to which `batch_kernel` runs; from there on, dequantize and multiply.
        batch_rows: of the matrix, a program of `batch_kernel`.
        batch_warps: of a program.
        batch_stages: tiles in flight.
        dequantize_rows: of the matrix, a program of `dequantize_kernel`.
        dequantize_warps: of a program.
    """

    programs: int
    vector_rows: int = 64
    vector_unroll: int = 4
    vector_warps: int = 4
    batch_limit: int = 64
    batch_rows: int = 64
    batch_warps: int = 4
    batch_stages: int = 4
    dequantize_rows: int = 64
    dequantize_warps: int = 4


# by compute capability; a GPU takes the newest that is not newer than it
FAMILIES = {
    75: Tuning(programs=256, batch_stages=2),
    80: Tuning(programs=512),  # A100: 108 multiprocessors
    86: Tuning(programs=384, batch_stages=3),  # 100 KiB of shared memory
    89: Tuning(programs=512, batch_stages=3),
    90: Tuning(programs=640),  # H100, H200: 132 multiprocessors
}
OLDEST = min(FAMILIES)


def tuning(capability: int) -> Tuning:
    """Return the launches of a GPU of compute capability `capability`, 10 times its major number plus its minor."""
    return FAMILIES[max(family for family in FAMILIES if family <= capability)]
