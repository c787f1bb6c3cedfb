"""The kernels on one layer's matrices, beside what else multiplies by the same weights on a CPU.

M rows of x, W (N, K). Weights are random codes and scales: speed does not depend on them. Every contender has copies of
its own, taken in turn, so that no matrix is still in a cache when it is used again. With few rows a timing is of
several products in a row.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from statistics import median

import torch

from quantkit.bench.contenders import Contender, rotating, torch_int8
from quantkit.bench.machine import Roof
from quantkit.bench.random_weights import random_quantized
from quantkit.bench.results import BF16, OURS, Cell
from quantkit.bench.shapes import matrices
from quantkit.bench.timing import Effort, alternate, paired
from quantkit.config import ModelConfig
from quantkit.kernels import native, reference
from quantkit.quantize.nf4 import NF4_CODEBOOK, dequantize_scales
from quantkit.quantize.packing import unpack_low_first
from quantkit.schemes import QuantScheme
from quantkit.tensor import QuantizedTensor

REFERENCE = "reference"
_READ, _PRODUCT = "read", "product"
_TORCH_GROUPS = (32, 64, 128, 256)  # that `_weight_int4pack_mm_for_cpu` takes
_INNER_TILES = 2  # of its packing, which ignores it
_BITSANDBYTES_ROWS = 32  # that its packing takes together


def measure(
    config: ModelConfig,
    schemes: Sequence[QuantScheme],
    rows: Sequence[int],
    roof: Roof,
    effort: Effort,
    away_bytes: int,
    progress: Callable[[int], None],
) -> Iterator[Cell]:
    """Yield a cell for each scheme, matrix and M.

    Args:
        config: the model whose matrices they are.
        schemes: of the matrices.
        rows: each M.
        roof: what runs beside.
        effort: how many rounds.
        away_bytes: what the copies of a matrix take together at least.
        progress: is told of each cell.

    Raises:
        BackendError: the CPU kernels are not built, or cannot take a matrix.
    """
    for scheme in schemes:
        for matrix, shape in matrices(config).items():
            weight = random_quantized(shape, scheme)
            beside = contenders(weight, away_bytes)
            for m in rows:
                x = torch.randn(m, shape[1]).bfloat16()
                yield _cell(
                    matrix, x, weight, beside, roof, effort, max(1, away_bytes // (m * weight.nbytes))
                )
                progress(1)
            del beside  # before the next matrix has copies


@torch.inference_mode()
def _cell(
    matrix: str,
    x: torch.Tensor,
    weight: QuantizedTensor,
    beside: dict[str, Contender],
    roof: Roof,
    effort: Effort,
    products: int,
) -> Cell:
    """Return a cell whose timings are of so many products in a row, as in a model that decodes.

    With few rows there are as many as read `away_bytes`: a single one, after all that the others have moved through
    the caches, would pay for the interpreter's own instructions, which a model pays for once.
    """
    read_bytes = roof.memory.readable(products * weight.nbytes)

    def in_a_row(contender: Contender, turn: int) -> None:
        for index in range(products):
            contender.run(x, turn * products + index)

    runs: dict[str, Callable[[int], object]] = {
        OURS: partial(in_a_row, beside[OURS]),
        _READ: partial(roof.memory.read, nbytes=read_bytes),  # at once after ours: no threads to wake
        _PRODUCT: roof.product.run,
    }
    runs |= {name: partial(in_a_row, contender) for name, contender in beside.items()}
    taken = alternate(runs, effort)
    s_per_byte = [seconds / read_bytes for seconds in taken.pop(_READ)]
    s_per_flop = [seconds / roof.product.flops for seconds in taken.pop(_PRODUCT)]
    times = {name: [seconds / products for seconds in each] for name, each in taken.items()}
    n, k = weight.shape

    def roof_share(name: str, weight_bytes: int) -> float:
        costs = zip(s_per_byte, s_per_flop, strict=True)
        return paired(
            [max(weight_bytes * byte, 2 * len(x) * n * k * flop) for byte, flop in costs], times[name]
        )

    return Cell(
        scheme=weight.scheme.name,
        matrix=matrix,
        n=n,
        k=k,
        m=len(x),
        weight_bytes=weight.nbytes,
        rounds=len(times[OURS]),
        seconds={name: median(taken) for name, taken in times.items()},
        speedups={name: paired(taken, times[OURS]) for name, taken in times.items() if name != OURS},
        roof_shares={OURS: roof_share(OURS, weight.nbytes), BF16: roof_share(BF16, 2 * n * k)},
    )


def contenders(weight: QuantizedTensor, away_bytes: int) -> dict[str, Contender]:
    """Return quantkit's kernel and all that can multiply by the same codes and scales here.

    Args:
        weight: the matrix.
        away_bytes: what each one's copies take together at least, so that none stays in a cache.
    """
    plain = reference.dequantize(weight, torch.bfloat16)
    found = {
        OURS: rotating(lambda: native.pack([weight]), away_bytes, native.linear),
        BF16: rotating(plain.clone, away_bytes, torch.nn.functional.linear),
        REFERENCE: rotating(lambda: _copy(weight), away_bytes, reference.linear),
    }
    scheme, cols = weight.scheme, weight.shape[1]
    if scheme.method == "nf4" and find_spec("bitsandbytes"):
        found["bitsandbytes"] = _bitsandbytes(weight, away_bytes)
    if scheme.method == "int" and scheme.symmetric:
        if scheme.bits == 8 and hasattr(torch.ops.aten, "_weight_int8pack_mm"):
            found["torch int8pack"] = torch_int8(weight, away_bytes)
        whole = scheme.group in _TORCH_GROUPS and cols % scheme.group == 0
        if scheme.bits == 4 and whole and hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
            found["torch int4pack"] = _torch_int4(weight, away_bytes)
    return found


def _copy(weight: QuantizedTensor) -> QuantizedTensor:
    parts = {name: part.clone() for name, part in weight.parts().items()}
    return QuantizedTensor(weight.scheme, weight.shape, **parts)


def _torch_int4(weight: QuantizedTensor, away_bytes: int) -> Contender:
    group = weight.scheme.group
    codes = unpack_low_first(weight.codes, weight.shape[1]).int()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, _INNER_TILES)
    scales = weight.scales.T.contiguous()  # (K / group, N)
    scales_and_zeros = torch.stack((scales, torch.zeros_like(scales)), dim=-1)

    def multiply(x: torch.Tensor, copy: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, copy, group, scales_and_zeros)

    return rotating(packed.clone, away_bytes, multiply)


def _bitsandbytes(weight: QuantizedTensor, away_bytes: int) -> Contender:
    """Return its NF4 as its Linear4bit runs it on a CPU: repacked where there is a kernel for that."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of packages that it could use, too
    import bitsandbytes
    from bitsandbytes import functional

    rows, cols = weight.shape
    state = functional.QuantState(
        absmax=dequantize_scales(weight, 0, rows * cols // weight.scheme.group),
        shape=torch.Size(weight.shape),
        code=torch.tensor(NF4_CODEBOOK),
        blocksize=weight.scheme.group,
        quant_type="nf4",
        dtype=torch.bfloat16,
    )
    codes = weight.codes.view(-1, 1)
    if functional.has_avx512bf16() and rows % _BITSANDBYTES_ROWS == 0 and cols % weight.scheme.group == 0:
        codes, state = functional._convert_weight_packed_for_cpu(codes, state)

    def multiply(x: torch.Tensor, copy: torch.Tensor) -> torch.Tensor:
        return bitsandbytes.matmul_4bit(x, copy, state)

    return rotating(codes.clone, away_bytes, multiply)
