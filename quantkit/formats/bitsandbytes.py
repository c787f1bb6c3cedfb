"""bitsandbytes' pre-quantized 4-bit linears, as transformers saves and loads them.

A linear `X` is stored as `X.weight` (uint8 codes), `X.weight.absmax`, `X.weight.quant_map`, one
JSON object as uint8 bytes, and, double-quantized, `X.weight.nested_absmax` and
`X.weight.nested_quant_map` (`bitsandbytes/functional.py`, class QuantState).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from reprlib import repr as shown
from typing import TYPE_CHECKING, Any

from quantkit.config import DTYPE_NAMES
from quantkit.errors import CheckpointError
from quantkit.formats.safetensors import Entry
from quantkit.schemes import NESTED_GROUP, QuantScheme, nf4_scheme

if TYPE_CHECKING:
    import torch

    from quantkit.tensor import QuantizedTensor

STATE = ".quant_state.bitsandbytes__nf4"
_CODES_AND_SCALES = ("", ".absmax", ".nested_absmax")
_TABLES = (".quant_map", ".nested_quant_map", STATE)
_LONG_NAMES = {short: long for long, short in DTYPE_NAMES.items()}


def quantization_config(scheme: QuantScheme, dtype: str, kept: list[str]) -> dict[str, Any]:
    """Return config.json's `quantization_config`; `kept` names the linear modules left as they are."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": scheme.nested,
        "bnb_4bit_compute_dtype": _LONG_NAMES[dtype],
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": kept,
    }


def part_names(weight: str, scheme: QuantScheme) -> list[str]:
    """Return the names under which the matrix `weight` is stored."""
    nested = [".nested_absmax", ".nested_quant_map"] if scheme.nested else []
    return [weight + suffix for suffix in ("", ".absmax", ".quant_map", *nested, STATE)]


def to_parts(weight: str, tensor: QuantizedTensor, dtype: str) -> dict[str, torch.Tensor]:
    """Return the tensors to store for the matrix `weight`; `dtype` is what it was quantized from."""
    import torch

    from quantkit.quantize.nf4 import NF4_CODEBOOK, dynamic_map

    state = {
        "quant_type": "nf4",
        "blocksize": tensor.scheme.group,
        "dtype": _LONG_NAMES[dtype],
        "shape": list(tensor.shape),
    }
    parts = {
        weight: tensor.codes.view(-1, 1),
        f"{weight}.absmax": tensor.scales,
        f"{weight}.quant_map": torch.tensor(NF4_CODEBOOK),
    }
    if tensor.nested_scales is not None and tensor.nested_offset is not None:
        state |= {
            "nested_blocksize": NESTED_GROUP,
            "nested_dtype": "float32",
            "nested_offset": tensor.nested_offset.item(),
        }
        parts[f"{weight}.nested_absmax"] = tensor.nested_scales
        parts[f"{weight}.nested_quant_map"] = dynamic_map()
    parts[weight + STATE] = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    return parts


def stored_scheme(
    weight: str, shape: tuple[int, ...], entries: Mapping[str, Entry], read_bytes: Callable[[str], bytes]
) -> QuantScheme:
    """Return the scheme in which the matrix `weight` is stored, after checking its parts' shapes.

    Raises:
        CheckpointError: a part is missing, contradicts the shape, or is of an unknown kind.
    """
    state = _state(weight, entries, read_bytes)
    if state.get("quant_type") != "nf4" or state.get("shape") != list(shape):
        raise CheckpointError(
            f"{weight}: its quant_state says {shown(state.get('quant_type'))} {shown(state.get('shape'))}, "
            f"but nf4 {list(shape)} is needed"
        )
    nested = f"{weight}.nested_absmax" in entries
    if nested and state.get("nested_blocksize") != NESTED_GROUP:
        raise CheckpointError(
            f"{weight}: nested_blocksize {shown(state.get('nested_blocksize'))} is not {NESTED_GROUP}"
        )
    offset = state.get("nested_offset") if nested else 0
    if not isinstance(offset, int | float) or not abs(offset) <= sys.float_info.max:
        raise CheckpointError(f"{weight}: nested_offset of its quant_state is {shown(offset)}, not a number")
    scheme = nf4_scheme(state["blocksize"], nested)
    blocks = -(-shape[0] * shape[1] // scheme.group)
    wanted = {"": (shape[0] * shape[1] + 1) // 2, ".absmax": blocks * (1 if nested else 4)}
    if nested:
        wanted[".nested_absmax"] = -(-blocks // NESTED_GROUP) * 4
    for suffix, nbytes in wanted.items():
        entry = entries.get(weight + suffix)
        if entry is None or entry.nbytes != nbytes:
            found = "is missing" if entry is None else f"has {entry.nbytes:,} bytes"
            raise CheckpointError(
                f"{weight}{suffix} {found}; {scheme.name} {list(shape)} needs {nbytes:,} bytes"
            )
    return scheme


def is_stored(weight: str, entries: Mapping[str, Entry]) -> bool:
    """Whether `weight` is stored in this format."""
    return f"{weight}.absmax" in entries


def from_parts(
    weight: str, scheme: QuantScheme, shape: tuple[int, int], get: Callable[[str], torch.Tensor]
) -> QuantizedTensor:
    """Return the matrix `weight`; `get` returns a stored tensor by name."""
    import torch

    from quantkit.tensor import QuantizedTensor

    codes = get(weight).view(torch.uint8).reshape(-1)
    scales = get(f"{weight}.absmax")
    if not scheme.nested:
        return QuantizedTensor(scheme, shape, codes, scales)
    offset = json.loads(bytes(get(weight + STATE).tolist()))["nested_offset"]
    return QuantizedTensor(
        scheme,
        shape,
        codes,
        scales,
        nested_scales=get(f"{weight}.nested_absmax"),
        nested_offset=torch.tensor(offset, dtype=torch.float32),
    )


def stored_bytes(weight: str, entries: Mapping[str, Entry]) -> int:
    """Return the bytes of codes and scales, the double quantization's offset included."""
    offset = 4 if f"{weight}.nested_absmax" in entries else 0
    found = (entries.get(weight + suffix) for suffix in _CODES_AND_SCALES)
    return offset + sum(entry.nbytes for entry in found if entry is not None)


def own_names(weight: str) -> set[str]:
    """Return every name that may belong to the matrix `weight` in this format."""
    return {weight + suffix for suffix in (*_CODES_AND_SCALES, *_TABLES)}


def _state(weight: str, entries: Mapping[str, Entry], read_bytes: Callable[[str], bytes]) -> dict[str, Any]:
    name = weight + STATE
    if name not in entries:
        others = [key for key in entries if key.startswith(f"{weight}.quant_state.")]
        raise CheckpointError(
            f"{weight}: only nf4 is supported; {others[0] if others else name + ' is missing'}"
        )
    try:
        state = json.loads(read_bytes(name))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} holds no JSON: {error}") from None
    block = state.get("blocksize") if isinstance(state, dict) else None
    if type(block) is not int or block <= 0:
        raise CheckpointError(f"{name} holds no quant_state with a blocksize above 0")
    return state
