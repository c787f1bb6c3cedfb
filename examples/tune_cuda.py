"""Try launches of the kernel for many rows of x on this GPU, beside torch's bfloat16 and what is launched today.

    python examples/tune_cuda.py OUT.json [SCHEME [ROWS...]]

Runs the matrices of one layer of Mistral-7B, for every scheme that has launches in `tuning.py` or the one named, at 64,
128, 256 and 512 rows or those named. Of every launch it notes the time, whether two runs gave the same bits, and the
relative error; the fastest of each matrix, all of it right, is printed. `tuning.py` is where such a launch goes.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from quantkit.bench.contenders import Contender, rotating
from quantkit.bench.cuda.device import Cuda, Device, Run
from quantkit.bench.cuda.kernels import pass_over, reason
from quantkit.bench.random_weights import random_quantized
from quantkit.bench.results import BF16
from quantkit.bench.shapes import matrices
from quantkit.bench.timing import paired
from quantkit.errors import QuantkitError
from quantkit.kernels import ops, reference
from quantkit.kernels.triton import TiledWeight, launcher
from quantkit.kernels.triton.tuning import Batch
from quantkit.presets import DEFAULT_PRESET, PRESETS
from quantkit.schemes import get_scheme

SCHEMES, ROWS = ("int4-g128", "int8", "nf4"), (64, 128, 256, 512)
TODAY = "today"
# rows of the matrix, rows of x, warps of a program, stages
TILES = (
    (256, 128, 16, 3), (256, 128, 16, 4), (256, 128, 8, 3), (256, 64, 16, 3), (128, 128, 8, 2), (128, 128, 8, 3),
    (128, 64, 8, 3), (128, 64, 4, 3),
)  # fmt: skip
PROGRAMS = (132, 264)
AWAY = 4  # times the second-level cache: what the copies of a matrix take at least
ROUNDS = 7
RIGHT = 1e-2  # relative error of products in bfloat16; a wrong one has 1


def launches() -> list[Batch]:
    """Return what is tried."""
    return [
        Batch(1 << 20, rows, warps, stages, programs, lines, scaled=True)
        for (rows, lines, warps, stages), programs in itertools.product(TILES, PROGRAMS)
    ]


def multiply(x: torch.Tensor, weight: TiledWeight, batch: Batch) -> torch.Tensor:
    launch = launcher()
    assert launch is not None
    found: torch.Tensor = launch.by_batch(x, weight.tiles, None, batch)
    return found


def touch(shape: tuple[int, int], scheme: str, m: int, batch: Batch, device: str, backend: str) -> None:
    """Compile one launch."""
    weight = ops.prepare(random_quantized(shape, get_scheme(scheme), device), backend)
    assert isinstance(weight, TiledWeight)
    multiply(torch.zeros(m, shape[1], dtype=torch.bfloat16, device=device), weight, batch)


def tried(
    device: Device,
    scheme: str,
    name: str,
    shape: tuple[int, int],
    rows: Sequence[int],
    batches: Sequence[Batch],
    away_bytes: int,
) -> Iterator[dict[str, Any]]:
    """Yield what came of every launch for one matrix, a dictionary each, at each number of rows of x."""
    weight = random_quantized(shape, get_scheme(scheme), device.torch_device)
    exact = reference.dequantize(weight, torch.float32)
    ours = rotating(lambda: ops.prepare(weight, device.backend), away_bytes, ops.linear)
    plain = rotating(exact.bfloat16().clone, away_bytes, torch.nn.functional.linear)
    for m in rows:
        x = torch.randn(m, shape[1], device=weight.device).bfloat16()
        expected = x.float() @ exact.T
        contenders: list[tuple[Any, Contender]] = [(BF16, plain), (TODAY, ours)]
        for batch in batches:
            contenders.append((asdict(batch), Contender(ours.copies, partial(multiply, batch=batch))))
        graphs: dict[int, Run] = {}
        notes: list[dict[str, Any]] = []
        for at, (launch, contender) in enumerate(contenders):
            note = {"scheme": scheme, "matrix": name, "m": m, "launch": launch}
            notes.append(note)
            try:
                found = contender.run(x, 0)
                note["error"] = ((found.float() - expected).norm() / expected.norm()).item()
                note["same_bits"] = all(torch.equal(contender.run(x, 0), found) for _ in range(3))
                graphs[at] = device.graph(partial(pass_over, contender, [x], 1))
            except Exception as error:  # too much shared memory, and whatever else a launch runs into
                note["failed"] = reason(error)
        times = {
            at: [whole / len(contenders[at][1].copies) for whole in taken]
            for at, taken in device.alternate(graphs, ROUNDS).items()
        }
        for at, taken in times.items():
            notes[at] |= {"seconds": median(taken), "times_bf16": paired(times[0], taken)}
        yield from notes


def best(notes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the fastest launch of some that were right."""
    right = (note for note in notes if note.get("same_bits") and note["error"] < RIGHT and "seconds" in note)
    return min((note for note in right if note["launch"] != BF16), key=lambda note: float(note["seconds"]))


def main(out: str, scheme: str | None = None, *rows: str) -> None:
    schemes, counts = [scheme] if scheme else SCHEMES, [int(each) for each in rows] or ROWS
    try:
        device = Cuda()
        known = [get_scheme(name).name for name in schemes]
    except QuantkitError as error:
        raise SystemExit(str(error)) from None
    config = PRESETS[DEFAULT_PRESET]
    cases, batches = list(itertools.product(known, matrices(config).items())), launches()
    where = str(device.torch_device), device.backend
    device.compile(
        [
            partial(touch, shape, name, m, batch, *where)
            for (name, (_, shape)), m, batch in itertools.product(cases, counts, batches)
        ]
    )
    found: list[dict[str, Any]] = []
    away_bytes = AWAY * device.describe().l2_bytes
    for name, (matrix, shape) in cases:
        notes = list(tried(device, name, matrix, shape, counts, batches, away_bytes))
        found += notes
        Path(out).write_text(json.dumps(found, indent=1) + "\n")
        for m in counts:
            some = [note for note in notes if note["m"] == m]
            today = next(note for note in some if note["launch"] == TODAY)
            chosen = best(some)
            print(
                f"{name:10} {matrix:8} {m:4}  today {today['times_bf16']:.2f} times bf16, "
                f"best {chosen['times_bf16']:.2f}: {chosen['launch']}",
                flush=True,
            )
        device.release()


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
