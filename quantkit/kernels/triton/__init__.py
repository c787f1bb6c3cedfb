"""The CUDA kernels, in Triton: weights repacked once, then multiplied without being dequantized in memory.

`layout.py` draws the bytes of a repacked matrix, `kernels.py` holds the kernels, `launch.py` chooses among them by
the rows of x, and `tuning.py` is the data by which it does. `row_kernels.py` and `row.py` are for one row of x, with
what a decoded token needs around it. `layout.py`, `tuning.py` and the PTX of both need no Triton.

Factors are exact in float32 and sums are float32, with two exceptions: on tensor cores NF4's codebook is rounded to
x's dtype, and for many rows the whole matrix is, as the reference does.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch

from quantkit.errors import BackendError
from quantkit.kernels.triton.layout import Tiles, below_each_other, takes, tiles
from quantkit.schemes import QuantScheme
from quantkit.tensor import QuantizedTensor

_ZEROS_PER_WORD = 8


@dataclass(frozen=True)
class TiledWeight:
    """A quantized (N, K) matrix in the layout of the CUDA kernels.

    Attributes:
        tiles: the repacked codes and scales.
        scheme: the precision.
        nbytes: of the codes and scales as a checkpoint has them; `tiles` pads ragged columns.
    """

    tiles: Tiles
    scheme: QuantScheme
    nbytes: int

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.tiles.rows, self.tiles.cols

    @property
    def device(self) -> torch.device:
        return self.tiles.codes.device


@cache
def launcher() -> ModuleType | None:
    """Return the module that launches the kernels, None where there is no Triton."""
    return import_module("quantkit.kernels.triton.launch") if find_spec("triton") else None


@cache
def cannot_start() -> str | None:
    """Return in a line why Triton cannot launch on the GPU there is, None where it can.

    When it first runs, it builds a small extension for that.
    """
    try:
        import_module("triton.runtime").driver.active.get_current_target()
    except subprocess.CalledProcessError:
        return "the C compiler that Triton calls fails; it needs Python's headers (python3-dev)"
    except Exception as error:  # of Triton, of the compiler it looks for, of the driver
        said = " ".join(str(error).split()) or type(error).__name__
        return f"Triton cannot start: {said}"
    return None


def packs(scheme: QuantScheme, shape: tuple[int, int]) -> bool:
    """Whether `pack` takes a matrix: a group is whole 16 columns or a whole row, and int32 counts its elements."""
    return takes(scheme, shape)


def fusable(weights: Sequence[QuantizedTensor]) -> bool:
    """Whether matrices can be packed below each other: one K, one scheme, scales that do not run across rows."""
    first = weights[0]
    rows = sum(weight.shape[0] for weight in weights)
    if not packs(first.scheme, (rows, first.shape[1])):
        return False
    return len(weights) == 1 or all(
        weight.scheme == first.scheme
        and weight.scales.dtype == first.scales.dtype
        and weight.shape[1] == first.shape[1]
        and not weight.scheme.nested
        and (weight.scheme.method == "int" or weight.shape[1] % weight.scheme.group == 0)
        and (weight.zeros is None or weight.shape[0] % _ZEROS_PER_WORD == 0)
        for weight in weights
    )


def pack(weights: Sequence[QuantizedTensor], device: torch.device | str | None = None) -> TiledWeight:
    """Repack one matrix, or several `fusable` ones below each other, on `device`; None means where they are.

    Those that come from elsewhere go there one at a time, and leave when they are repacked.

    Raises:
        BackendError: the kernels cannot take the matrices.
    """
    if not weights or not fusable(weights):
        raise BackendError("the triton backend cannot take these matrices: see `fusable`")
    parts = [tiles(weight.to(device or weight.device)) for weight in weights]
    packed = parts[0] if len(parts) == 1 else below_each_other(parts)
    if packed.codes.is_cuda:
        # a kernel that begins early reads the matrix before those ahead of it have ended
        torch.cuda.current_stream(packed.codes.device).synchronize()
    return TiledWeight(packed, weights[0].scheme, sum(weight.nbytes for weight in weights))


def linear(x: torch.Tensor, weight: TiledWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x @ W.T + bias for x (..., K), in x's dtype; float32 is multiplied in float32."""
    matrix = weight.tiles
    return torch.ops.quantkit.tiled_linear(
        x, matrix.codes, matrix.scales, matrix.zeros, matrix.nested_scales, matrix.nested_offset, bias,
        matrix.rows, matrix.cols, matrix.bits, matrix.group, matrix.nf4,
    )  # fmt: skip


# An operator, so that torch.compile and tracing see one node where kernels run.
_LIBRARY = torch.library.Library("quantkit", "FRAGMENT")
_LIBRARY.define(
    "tiled_linear(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor? nested_scales, "
    "Tensor? nested_offset, Tensor? bias, int rows, int cols, int bits, int group, bool nf4) -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order,),
)


def _tiled_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    nested_scales: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    bias: torch.Tensor | None,
    rows: int,
    cols: int,
    bits: int,
    group: int,
    nf4: bool,
) -> torch.Tensor:
    launch = launcher()
    if launch is None or not (x.is_cuda or launch.INTERPRETED):
        raise BackendError(
            f"the triton kernels run on a CUDA GPU where Triton is installed, not on {x.device}"
        )
    matrix = Tiles(codes, scales, zeros, nested_scales, nested_offset, rows, cols, bits, group, nf4)
    found: torch.Tensor = launch.linear(x.reshape(-1, cols).contiguous(), matrix, bias)
    return found.view(*x.shape[:-1], rows)


_LIBRARY.impl("tiled_linear", _tiled_linear, "CUDA")
_LIBRARY.impl("tiled_linear", _tiled_linear, "CPU")  # Triton's interpreter


@torch.library.register_fake("quantkit::tiled_linear", lib=_LIBRARY)
def _tiled_linear_fake(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    nested_scales: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    bias: torch.Tensor | None,
    rows: int,
    cols: int,
    bits: int,
    group: int,
    nf4: bool,
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], rows)
