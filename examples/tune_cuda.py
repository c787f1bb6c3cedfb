"""Try launches of the kernel for many rows of x on this GPU, beside torch's bfloat16 and what is launched today.

    python examples/tune_cuda.py OUT.json [SCHEME [ROWS...]]

Runs the matrices of one layer of Mistral-7B, for every scheme that has launches in `tuning.py` or the one named, at 64,
128, 256 and 512 rows or those named. Of every launch it notes the time, whether two runs gave the same bits, and the
relative error; the fastest of each matrix, all of it right, is printed. `tuning.py` is where such a launch goes.

What OUT.json holds already is not tried again: after a launch that takes the GPU from the process, run it once more,
and after a change of `tuning.py` name another file.
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
from quantkit.bench.cuda.device import Cuda, Device
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
from quantkit.records import write_text
from quantkit.schemes import get_scheme

Note = dict[str, Any]
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


class GpuLost(Exception):
    """After this launch CUDA runs nothing more in this process."""


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
    known: Sequence[Note] = (),
) -> Iterator[Note]:
    """Yield what came of every launch for one matrix at each number of rows of x, but for what is `known`.

    Raises:
        GpuLost: a launch, that of the last note, took the GPU from this process.
    """
    weight = random_quantized(shape, get_scheme(scheme), device.torch_device)
    exact = reference.dequantize(weight, torch.float32)
    ours = rotating(lambda: ops.prepare(weight, device.backend), away_bytes, ops.linear)
    plain = rotating(exact.bfloat16().clone, away_bytes, torch.nn.functional.linear)
    contenders: list[tuple[Any, Contender]] = [(BF16, plain), (TODAY, ours)]
    for batch in batches:
        contenders.append((asdict(batch), Contender(ours.copies, partial(multiply, batch=batch))))
    for m in rows:
        x = torch.randn(m, shape[1], device=weight.device).bfloat16()
        expected = x.float() @ exact.T
        beside = device.graph(partial(pass_over, plain, [x], 1))
        for launch, contender in contenders:
            note = {"scheme": scheme, "matrix": name, "m": m, "launch": launch}
            if any(note.items() <= other.items() for other in known):
                continue
            try:
                found = contender.run(x, 0)
                note["error"] = ((found.float() - expected).norm() / expected.norm()).item()
                note["same_bits"] = all(torch.equal(contender.run(x, 0), found) for _ in range(3))
                pair = beside, device.graph(partial(pass_over, contender, [x], 1))
                taken = device.alternate(dict(enumerate(pair)), ROUNDS)
                note["seconds"] = median(taken[1]) / len(contender.copies)
                note["times_bf16"] = paired(taken[0], taken[1]) * len(contender.copies) / len(plain.copies)
            except Exception as error:  # too much shared memory, and whatever else a launch runs into
                note["failed"] = reason(error)
            yield note
            if "failed" in note:
                try:
                    device.release()
                except RuntimeError as error:  # nothing more can run
                    raise GpuLost(f"{launch} took the GPU: {reason(error)}") from None


def best(notes: Sequence[Note]) -> Note | None:
    """Return the launch of quantkit's that was right and the fastest beside bfloat16, timed in turns with it."""
    right = (note for note in notes if note.get("same_bits") and note["error"] < RIGHT and "seconds" in note)
    ours = (note for note in right if note["launch"] != BF16)
    return max(ours, key=lambda note: float(note["times_bf16"]), default=None)


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
    path, away_bytes = Path(out), AWAY * device.describe().l2_bytes
    notes: list[Note] = json.loads(path.read_text()) if path.exists() else []
    for name, (matrix, shape) in cases:
        try:
            for note in tried(device, name, matrix, shape, counts, batches, away_bytes, notes):
                notes.append(note)
                write_text(path, json.dumps(notes, indent=1) + "\n")
        except GpuLost as error:
            raise SystemExit(f"{error}; run again to go on") from None
        for m in counts:
            some = [
                note for note in notes if (note["scheme"], note["matrix"], note["m"]) == (name, matrix, m)
            ]
            today, chosen = best([note for note in some if note["launch"] == TODAY]), best(some)
            said = [
                f"{what} {note['times_bf16']:.2f} times bf16: {note['launch']}"
                if note
                else f"{what} none is right"
                for what, note in (("today", today), ("best", chosen))
            ]
            print(f"{name:10} {matrix:8} {m:4}  {', '.join(said)}", flush=True)
        device.release()


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
