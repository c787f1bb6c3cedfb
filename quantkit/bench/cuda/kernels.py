"""The kernels on one layer's matrices, beside what else multiplies by the same weights on a GPU.

M rows of x, W (N, K). Weights are random codes and scales: speed does not depend on them. A graph multiplies by each
of a contender's copies in turn, so that no matrix is still in a cache when it is used again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from statistics import median

import torch

from quantkit.bench.contenders import Contender
from quantkit.bench.cuda.contenders import builders, dequantize
from quantkit.bench.cuda.device import Device, Place, Run
from quantkit.bench.cuda.results import Failure, Finding, Repeat
from quantkit.bench.random_weights import random_quantized
from quantkit.bench.results import BF16, OURS, Cell
from quantkit.bench.shapes import matrices
from quantkit.bench.timing import paired
from quantkit.config import ModelConfig
from quantkit.kernels import ops
from quantkit.schemes import QuantScheme
from quantkit.tensor import QuantizedTensor

SHORT_ROWS = 64  # up to which a graph passes over all copies several times, so that its ends do not count

_LONGEST = 120  # characters of a reason


def jobs(
    config: ModelConfig, schemes: Sequence[QuantScheme], rows: Sequence[int], device: Device
) -> list[Run]:
    """Return what launches every kernel of `measure` once, a job for each scheme and matrix."""
    where = str(device.torch_device), device.backend
    return [
        partial(_touch, shape, scheme, tuple(rows), *where)
        for scheme in schemes
        for shape in matrices(config).values()
    ]


def _touch(
    shape: tuple[int, int], scheme: QuantScheme, rows: Sequence[int], device: str, backend: str
) -> None:
    weight = ops.prepare(random_quantized(shape, scheme, device), backend)
    dequantize(weight, torch.bfloat16)
    for m in rows:
        ops.linear(torch.zeros(m, shape[1], dtype=torch.bfloat16, device=device), weight)


def measure(
    config: ModelConfig,
    schemes: Sequence[QuantScheme],
    rows: Sequence[int],
    place: Place,
) -> Iterator[Finding]:
    """Yield a cell for each scheme, matrix and M, what failed, and whether each scheme's bits were the same twice.

    Args:
        config: the model whose matrices they are.
        schemes: of the matrices.
        rows: each M.
        place: where and how.
    """
    device, away_bytes = place.device, place.method.away_bytes
    for scheme in schemes:
        equal: list[bool] = []
        for matrix, shape in matrices(config).items():
            weight = random_quantized(shape, scheme, device.torch_device)
            what = f"{scheme.name}, {matrix}"
            beside: dict[str, Contender] = {}
            for name, build in builders(weight, device.backend, away_bytes).items():
                try:
                    beside[name] = build()
                except Exception as error:  # other packages raise what they like
                    yield Failure(f"{what}, {name}", reason(error))
            for m in rows:
                found = list(_cell(matrix, m, weight, beside, place))
                yield from found
                if any(isinstance(one, Cell) for one in found):
                    equal.append(_repeats(beside[OURS], m, weight))
            del beside  # before the next matrix has copies
            device.release()
        yield Repeat(f"{scheme.name}, kernels", len(equal), sum(equal))


def reason(error: Exception) -> str:
    """Return what an error says, in a line of some length."""
    said = " ".join(f"{type(error).__name__}: {error}".split())
    return said if len(said) <= _LONGEST else f"{said[: _LONGEST - 1]}…"


def _cell(
    matrix: str,
    m: int,
    weight: QuantizedTensor,
    beside: dict[str, Contender],
    place: Place,
) -> Iterator[Cell | Failure]:
    device, limits, method = place.device, place.limits, place.method
    n, k = weight.shape
    most = max((len(contender.copies) for contender in beside.values()), default=0)
    xs = [torch.randn(m, k, device=weight.device).bfloat16() for _ in range(most)]
    passes = method.passes if m <= SHORT_ROWS else 1
    graphs: dict[str, Run] = {}
    for name, contender in beside.items():
        try:
            graphs[name] = device.graph(partial(pass_over, contender, xs, passes))
        except Exception as error:  # other packages raise what they like
            yield Failure(f"{weight.scheme.name}, {matrix}, M = {m}, {name}", reason(error))
    if OURS not in graphs or BF16 not in graphs:
        return  # what failed was said
    launches = {name: passes * len(beside[name].copies) for name in graphs}
    times = {
        name: [taken / launches[name] for taken in whole]
        for name, whole in device.alternate(graphs, method.rounds).items()
    }
    seconds = {name: median(taken) for name, taken in times.items()}
    flops = 2 * m * n * k

    def share(name: str, weight_bytes: int) -> float:
        return max(weight_bytes / limits.bytes_per_s, flops / limits.flops_per_s) / seconds[name]

    yield Cell(
        scheme=weight.scheme.name,
        matrix=matrix,
        n=n,
        k=k,
        m=m,
        weight_bytes=weight.nbytes,
        rounds=method.rounds,
        seconds=seconds,
        speedups={name: paired(taken, times[OURS]) for name, taken in times.items() if name != OURS},
        roof_shares={OURS: share(OURS, weight.nbytes), BF16: share(BF16, 2 * n * k)},
    )


def pass_over(contender: Contender, xs: Sequence[torch.Tensor], passes: int) -> None:
    """Multiply by each of a contender's copies in turn, so many times over; rows of x take turns, too."""
    for turn in range(passes * len(contender.copies)):
        contender.run(xs[turn % len(xs)], turn)


def _repeats(contender: Contender, m: int, weight: QuantizedTensor) -> bool:
    """Whether the same x gives the same bits twice."""
    x = torch.randn(m, weight.shape[1], device=weight.device).bfloat16()
    return torch.equal(contender.run(x, 0), contender.run(x, 0))
