"""QuantScheme and the registry: the one place where a precision is described.

The estimator, the packers, the checkpoint headers, the kernels' dispatch and the CLI's choices
all read one row. `plan_weights` is the one policy that says which matrix gets which scheme.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from calculators.weights import Packing
from quantkit.config import DTYPE_BITS, ModelConfig, TensorSpec
from quantkit.errors import SchemeError

Method = Literal["plain", "int", "nf4"]
Format = Literal["plain", "compressed-tensors", "bitsandbytes"]
Indivisible = Literal["short", "refuse", "int8", "keep"]

NESTED_GROUP = 256  # bitsandbytes' block of nested scales


@dataclass(frozen=True)
class QuantScheme:
    """One precision of a weight matrix.

    Attributes:
        name: as on the command line.
        method: `plain` floating point, `int` affine integers, `nf4` the 4-bit NormalFloat codebook.
        bits: bits of a code, or of an element where plain.
        group: elements that share a scale; 0 means a whole row. NF4 blocks run over the flat matrix.
        symmetric: integers without zero points.
        nested: the scales are quantized in turn (double quantization).
        dtype: of a plain scheme: `fp32`, `bf16` or `fp16`.
    """

    name: str
    method: Method
    bits: int
    group: int = 0
    symmetric: bool = True
    nested: bool = False
    dtype: str | None = None

    @property
    def format(self) -> Format:
        """The ecosystem's format in which a checkpoint of this scheme is written."""
        return {"plain": "plain", "int": "compressed-tensors", "nf4": "bitsandbytes"}[self.method]  # type: ignore[return-value]

    @property
    def quantized(self) -> bool:
        return self.method != "plain"

    def packing(self, dtype: str) -> Packing:
        """Return how a matrix lies in memory; `dtype` is the checkpoint's, which scales take."""
        if self.method == "plain":
            return Packing(code_bits=self.bits)
        if self.method == "nf4":
            if self.nested:
                return Packing(self.bits, self.group, flat=True, scale_bits=8, nested_group=NESTED_GROUP)
            return Packing(self.bits, self.group, flat=True, scale_bits=32)
        zero_bits = 0 if self.symmetric else self.bits
        return Packing(self.bits, self.group, scale_bits=DTYPE_BITS[dtype], zero_bits=zero_bits)

    def divides(self, cols: int) -> bool:
        """Whether rows of `cols` elements split into whole groups, as compressed-tensors demands."""
        return self.method != "int" or self.group == 0 or cols % self.group == 0


def int_scheme(bits: int, group: int, symmetric: bool) -> QuantScheme:
    """Return the integer scheme of this shape; `group` 0 means one scale a row.

    Raises:
        SchemeError: neither 4 bits nor 8 symmetric ones, the only integers that are packed here.
    """
    if bits != 4 and not (bits == 8 and symmetric):
        kind = "symmetric" if symmetric else "asymmetric"
        raise SchemeError(
            f"{bits} {kind} bits cannot be packed: int schemes have 4 bits, or 8 symmetric ones"
        )
    name = f"int{bits}" + (f"-g{group}" if group else "") + ("" if symmetric else "-asym")
    return QuantScheme(name, "int", bits, group=group, symmetric=symmetric)


def nf4_scheme(block: int = 64, nested: bool = False) -> QuantScheme:
    """Return NF4 with blocks of `block` elements; its name says so where it is not the usual 64."""
    name = "nf4" + ("-dq" if nested else "") + ("" if block == 64 else f"-b{block}")
    return QuantScheme(name, "nf4", 4, group=block, nested=nested)


_SCHEMES = (
    QuantScheme("fp32", "plain", 32, dtype="fp32"),
    QuantScheme("bf16", "plain", 16, dtype="bf16"),
    QuantScheme("fp16", "plain", 16, dtype="fp16"),
    int_scheme(8, 0, symmetric=True),
    int_scheme(4, 128, symmetric=True),
    int_scheme(4, 64, symmetric=True),
    int_scheme(4, 32, symmetric=True),
    int_scheme(4, 128, symmetric=False),
    int_scheme(4, 64, symmetric=False),
    int_scheme(4, 32, symmetric=False),
    nf4_scheme(),
    nf4_scheme(nested=True),
)

SCHEMES: dict[str, QuantScheme] = {scheme.name: scheme for scheme in _SCHEMES}
HEADLINE = ("int8", "int4-g128", "int4-g64", "int4-g32", "nf4", "nf4-dq")


def get_scheme(name: str) -> QuantScheme:
    """Return the scheme called `name`.

    Raises:
        SchemeError: there is none.
    """
    try:
        return SCHEMES[name]
    except KeyError:
        raise SchemeError(f"unknown scheme {name!r}; known are {', '.join(SCHEMES)}") from None


def schemes_of_bits(bits: int, dtype: str) -> list[QuantScheme]:
    """Return every scheme of `bits` bits, `int4-g128` first; 16 means the checkpoint's own 16-bit type."""
    if bits == 16:
        return [SCHEMES["fp16" if dtype == "fp16" else "bf16"]]
    return [scheme for scheme in SCHEMES.values() if scheme.bits == bits and scheme.quantized]


def default_schemes(dtype: str) -> list[QuantScheme]:
    """Return what is compared when nothing is asked for: the checkpoint's type and the usual quantizers."""
    names = [dtype, *HEADLINE] if DTYPE_BITS[dtype] == 16 else [dtype, "bf16", *HEADLINE]
    return [SCHEMES[name] for name in names]


def plan_weights(
    config: ModelConfig,
    scheme: QuantScheme,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    indivisible: Indivisible = "short",
) -> dict[str, QuantScheme]:
    """Return the scheme of every matrix that is quantized; what is not named keeps the checkpoint's dtype.

    Args:
        config: the model.
        scheme: what to quantize to; a plain scheme quantizes nothing.
        include: patterns of matrices to quantize beside the linears of the blocks (`lm_head.weight`).
        exclude: patterns of matrices to leave as they are.
        indivisible: a matrix whose K the group does not divide has a `short` last group (which no
            file format holds), is refused (`refuse`), becomes `int8`, or is left as it is (`keep`).

    Raises:
        SchemeError: a matrix is refused, or a pattern matches nothing that can be quantized.
    """
    if not scheme.quantized:
        return {}
    chosen = list(_chosen(config, include, exclude))
    ragged = [spec for spec in chosen if not scheme.divides(spec.shape[1])]
    if ragged and indivisible == "refuse":
        raise SchemeError(_refusal(config, scheme, chosen, ragged[0]))
    plan = {spec.name: scheme for spec in chosen}
    for spec in ragged:
        if indivisible == "int8":
            plan[spec.name] = SCHEMES["int8"]
        elif indivisible == "keep":
            del plan[spec.name]
    return plan


def _chosen(config: ModelConfig, include: Sequence[str], exclude: Sequence[str]) -> Iterable[TensorSpec]:
    """Yield the linears of the blocks, with `include` added and `exclude` taken away."""
    names = [spec.name for spec in config.tensors]
    for pattern in (*include, *exclude):
        if not any(_matches(name, pattern) for name in names):
            hint = (
                "; the head is tied to the embedding" if config.tie_embeddings and "head" in pattern else ""
            )
            raise SchemeError(f"the pattern {pattern!r} matches no tensor of {config.name}{hint}")
    for spec in config.tensors:
        included = any(_matches(spec.name, pattern) for pattern in include)
        if included and not (spec.is_block_linear or spec.role == "head"):
            raise SchemeError(
                f"{spec.name} cannot be quantized: the formats hold matrices of linear layers, not a {spec.role}"
            )
        excluded = any(_matches(spec.name, pattern) for pattern in exclude)
        if (spec.is_block_linear or included) and not excluded:
            yield spec


def _matches(name: str, pattern: str) -> bool:
    """Whether a shell pattern matches a tensor's name, with or without its `.weight`."""
    return fnmatchcase(name, pattern) or fnmatchcase(name.removesuffix(".weight"), pattern)


def _refusal(
    config: ModelConfig, scheme: QuantScheme, chosen: Sequence[TensorSpec], ragged: TensorSpec
) -> str:
    fitting = [
        other.group
        for other in SCHEMES.values()
        if other.method == "int" and other.group and all(other.divides(spec.shape[1]) for spec in chosen)
    ]
    largest = (
        f"the largest group that divides every matrix is {max(fitting)}"
        if fitting
        else "no offered group divides every matrix"
    )
    return (
        f"{scheme.name} cannot be stored: {ragged.name} of {config.name} has K = {ragged.shape[1]}, no multiple of "
        f"{scheme.group}; {largest}. Choose another scheme, or --indivisible int8|keep for such matrices"
    )
