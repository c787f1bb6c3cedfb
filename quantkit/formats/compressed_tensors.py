"""compressed-tensors `pack-quantized`: int4 and int8 linears, as transformers and vLLM load them.

A linear `X` is stored as `X.weight_packed` (int32 words), `X.weight_scale`, `X.weight_shape` and,
asymmetric, `X.weight_zero_point`. Which modules are quantized, and how, stands in config.json's
`config_groups` (the package's `quantization/quant_config.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from reprlib import repr as shown
from typing import TYPE_CHECKING, Any

from calculators.units import ceil_div
from quantkit.config import json_object
from quantkit.errors import CheckpointError
from quantkit.formats.safetensors import FLOAT_DTYPES, Entry
from quantkit.schemes import QuantScheme, int_scheme

if TYPE_CHECKING:
    import torch

    from quantkit.tensor import QuantizedTensor

_PARTS = ("_packed", "_scale", "_zero_point", "_shape")


def quantization_config(plan: Mapping[str, QuantScheme], kept: list[str]) -> dict[str, Any]:
    """Return config.json's `quantization_config` for the matrices of `plan`.

    Args:
        plan: scheme of each quantized matrix. With one scheme its group targets every Linear; with
            two, each group names its modules.
        kept: names of the linear modules left as they are.
    """
    schemes = list(dict.fromkeys(plan.values()))
    groups = {}
    for index, scheme in enumerate(schemes):
        names = [name.removesuffix(".weight") for name, other in plan.items() if other == scheme]
        groups[f"group_{index}"] = {
            "targets": ["Linear"] if len(schemes) == 1 else names,
            "weights": {
                "num_bits": scheme.bits,
                "type": "int",
                "symmetric": scheme.symmetric,
                "strategy": "group" if scheme.group else "channel",
                "group_size": scheme.group or None,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
        }
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": kept,
    }
    if any(not scheme.symmetric for scheme in schemes):
        config["dequantize"] = True  # transformers loads packed zero points only this way
    return config


def part_names(weight: str, scheme: QuantScheme) -> list[str]:
    """Return the names under which the matrix `weight` is stored."""
    return [weight + part for part in _PARTS if scheme.symmetric is False or part != "_zero_point"]


def to_parts(weight: str, tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
    """Return the tensors to store for the matrix `weight`."""
    import torch

    from quantkit.quantize.packing import to_words

    parts = {
        f"{weight}_packed": to_words(tensor.codes),
        f"{weight}_scale": tensor.scales,
        f"{weight}_shape": torch.tensor(tensor.shape, dtype=torch.int64),
    }
    if tensor.zeros is not None:
        parts[f"{weight}_zero_point"] = tensor.zeros
    return parts


class Groups:
    """The `config_groups` of a checkpoint that someone quantized.

    Raises:
        CheckpointError: the format or a group is of a kind quantkit does not compute with, or broken.
        ConfigError: something that must be an object is none.
    """

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        if config.get("format") != "pack-quantized":
            raise CheckpointError(
                f"{where}: compressed-tensors format {shown(config.get('format'))} is not supported; "
                "only pack-quantized is"
            )
        self._where = where
        self._schemes: dict[str, QuantScheme] = {}  # by target; the last group that names one wins
        groups = json_object(config, "config_groups", where)
        for name in groups:
            group = json_object(groups, name, f"{where}: config_groups")
            scheme = self._scheme(name, group)
            self._schemes |= dict.fromkeys(self._targets(name, group), scheme)

    def _targets(self, name: str, group: Mapping[str, Any]) -> list[str]:
        targets = group.get("targets")
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            raise CheckpointError(
                f"{self._where}: targets of {name} is {shown(targets)}, not a list of names"
            )
        for target in filter(_is_pattern, targets):
            try:
                re.compile(target.removeprefix("re:"))
            except re.error as error:
                raise CheckpointError(
                    f"{self._where}: the target {target!r} of {name} is no regular expression: {error}"
                ) from None
        return targets

    def _scheme(self, name: str, group: Mapping[str, Any]) -> QuantScheme:
        weights = json_object(group, "weights", f"{self._where}: {name}")
        kind, bits, strategy = weights.get("type", "int"), weights.get("num_bits"), weights.get("strategy")
        known = kind == "int" and strategy in ("group", "channel")
        if not known or type(bits) is not int or bits not in (4, 8):
            raise CheckpointError(
                f"{self._where}: {name} holds {shown(kind)} weights of {shown(bits)} bits by "
                f"{shown(strategy)}; supported are int weights of 4 or 8 bits by group or channel"
            )
        if group.get("input_activations"):
            raise CheckpointError(f"{self._where}: {name} quantizes activations too, which is not supported")
        symmetric = weights.get("symmetric", True)
        if not isinstance(symmetric, bool):
            raise CheckpointError(
                f"{self._where}: symmetric of {name} is {shown(symmetric)}; it must be true or false"
            )
        if bits == 8 and not symmetric:
            raise CheckpointError(f"{self._where}: {name} holds asymmetric int8, which is not supported")
        if strategy == "channel":
            return int_scheme(bits, 0, symmetric)
        size = weights.get("group_size")
        if type(size) is not int or size <= 0:
            raise CheckpointError(
                f"{self._where}: group_size of {name} is {shown(size)}; it must be a whole number above 0"
            )
        return int_scheme(bits, size, symmetric)

    def scheme_of(self, module: str) -> QuantScheme:
        """Return the scheme of a module as compressed-tensors chooses it, over the targets of all groups.

        The module's name goes before regular expressions, and these, in the order of their strings, before
        `Linear` (its `utils/match.py`, match_targets).
        """
        if module in self._schemes:
            return self._schemes[module]
        for target in sorted(filter(_is_pattern, self._schemes)):
            if re.match(target.removeprefix("re:"), module):
                return self._schemes[target]
        if "Linear" in self._schemes:
            return self._schemes["Linear"]
        raise CheckpointError(f"{self._where}: no config group targets {module}, yet it is stored packed")


def _is_pattern(target: str) -> bool:
    return target.startswith("re:")


def stored_scheme(
    weight: str, shape: tuple[int, ...], entries: Mapping[str, Entry], groups: Groups
) -> QuantScheme:
    """Return the scheme in which the matrix `weight` is stored, after checking its parts' shapes."""
    scheme = groups.scheme_of(weight.removesuffix(".weight"))
    rows, cols = shape
    n_groups = ceil_div(cols, scheme.group) if scheme.group else 1
    wanted = {"_packed": (rows, ceil_div(cols * scheme.bits, 32)), "_scale": (rows, n_groups)}
    if not scheme.symmetric:
        wanted["_zero_point"] = (ceil_div(rows * scheme.bits, 32), n_groups)
    for part, part_shape in wanted.items():
        entry = entries.get(weight + part)
        kinds = tuple(FLOAT_DTYPES) if part == "_scale" else ("I32",)
        if entry is None or entry.shape != part_shape or entry.dtype not in kinds:
            found = "is missing" if entry is None else f"is {entry.dtype} {list(entry.shape)}"
            raise CheckpointError(
                f"{weight}{part} {found}; {scheme.name} {list(shape)} needs {'/'.join(kinds)} {list(part_shape)}"
            )
    zeros = entries.get(
        f"{weight}_zero_point"
    )  # one of another shape is what symmetric files once held: zeros
    if scheme.symmetric and zeros and zeros.shape == (ceil_div(rows * scheme.bits, 32), n_groups):
        raise CheckpointError(
            f"{weight}_zero_point is stored, but config.json says that {weight} is {scheme.name}, without zero points"
        )
    if f"{weight}_g_idx" in entries:
        raise CheckpointError(f"{weight}_g_idx: columns in activation order are not supported")
    return scheme


def is_stored(weight: str, entries: Mapping[str, Entry]) -> bool:
    """Whether `weight` is stored in this format."""
    return f"{weight}_packed" in entries


def from_parts(
    weight: str, scheme: QuantScheme, shape: tuple[int, int], get: Callable[[str], torch.Tensor]
) -> QuantizedTensor:
    """Return the matrix `weight`; `get` returns a stored tensor by name."""
    from calculators.units import bits_to_bytes
    from quantkit.quantize.packing import from_words
    from quantkit.tensor import QuantizedTensor

    codes = from_words(get(f"{weight}_packed"), bits_to_bytes(shape[1] * scheme.bits))
    zeros = None if scheme.symmetric else get(f"{weight}_zero_point")
    return QuantizedTensor(scheme, shape, codes, get(f"{weight}_scale"), zeros=zeros)


def stored_bytes(
    weight: str, scheme: QuantScheme, shape: tuple[int, ...], entries: Mapping[str, Entry]
) -> int:
    """Return the bytes of codes, scales and zero points, without the padding of ragged words."""
    from calculators.weights import matrix_bytes

    dtype = FLOAT_DTYPES[entries[f"{weight}_scale"].dtype]
    return matrix_bytes(shape[0], shape[1], scheme.packing(dtype)).total


def own_names(weight: str) -> set[str]:
    """Return every name that may belong to the matrix `weight` in this format."""
    return {weight + part for part in _PARTS}
