"""config_groups: the scheme of a module is the one compressed-tensors chooses, and broken ones are refused."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.errors import CheckpointError, QuantkitError
from quantkit.formats.checkpoint import open_checkpoint
from quantkit.formats.compressed_tensors import Groups, stored_scheme
from quantkit.formats.huggingface import quantization_of
from quantkit.formats.safetensors import Entry
from quantkit.quantize.convert import convert
from quantkit.schemes import SCHEMES
from tests.checkpoints import tiny_config, write_checkpoint

match_targets = pytest.importorskip("compressed_tensors.utils").match_targets
DOWN = "model.layers.0.mlp.down_proj"


def group(targets: Any, size: Any = 32, **weights: Any) -> dict[str, Any]:
    fields = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": size}
    return {"targets": targets, "weights": {**fields, **weights}}


def groups_of(*groups: Any) -> Groups:
    named = {f"group_{index}": value for index, value in enumerate(groups)}
    return Groups({"format": "pack-quantized", "config_groups": named}, "config.json")


@pytest.mark.parametrize(
    "targets",
    [
        [["Linear"], ["re:.*mlp.*"], [DOWN]],
        [["re:.*mlp.*"], ["re:.*down_proj"], ["Linear"]],
        [["re:model.*"], ["Linear", "re:.*gate_proj"]],
        [["Linear"], ["Linear"]],
        [[DOWN], ["re:.*", DOWN]],
    ],
    ids=str,
)
@pytest.mark.parametrize("module", [DOWN, "model.layers.0.mlp.gate_proj", "model.layers.1.self_attn.q_proj"])
def test_overlapping_targets_are_chosen_from_as_the_package_does(
    targets: list[list[str]], module: str
) -> None:
    sizes = (32, 64, 128)
    by_target = OrderedDict(
        (target, size) for names, size in zip(targets, sizes, strict=False) for target in names
    )
    theirs = match_targets(module, torch.nn.Linear(1, 1), by_target)
    groups = groups_of(*(group(names, size) for names, size in zip(targets, sizes, strict=False)))
    assert groups.scheme_of(module).group == by_target[theirs[0]]


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ([], "config_groups"),
        ({"g": 5}, "'g' is 5"),
        ({"g": {**group(["Linear"]), "weights": []}}, "'weights' is"),
        ({"g": group("Linear")}, "targets of g is 'Linear'"),
        ({"g": group([5])}, r"targets of g is \[5\]"),
        ({"g": group(["re:["])}, r"target 're:\[' of g is no regular expression"),
        ({"g": group(["Linear"], None)}, "group_size of g is None"),
        ({"g": group(["Linear"], 0)}, "group_size of g is 0"),
        ({"g": group(["Linear"], "32")}, "group_size of g is '32'"),
        ({"g": group(["Linear"], num_bits=4.0)}, "weights of 4.0 bits"),
        ({"g": group(["Linear"], num_bits=[4])}, "weights of"),
        ({"g": group(["Linear"], symmetric=None)}, "symmetric of g is None"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_broken_config_is_refused_in_one_line(groups: Any, said: str) -> None:
    settings = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    with pytest.raises(QuantkitError, match=said) as refusal:
        quantization_of({"quantization_config": settings}, "config.json")
    assert str(refusal.value).startswith("config.json: ")
    assert "\n" not in str(refusal.value)


def test_zero_points_of_a_symmetric_scheme_are_refused(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", tiny_config(), "bf16", seed=0)
    convert(open_checkpoint(source), tmp_path / "out", SCHEMES["int4-g32-asym"])
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    raw["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] = True
    (tmp_path / "out" / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"weight_zero_point is stored, but .* is int4-g32, without"):
        open_checkpoint(tmp_path / "out")


def test_zeros_that_symmetric_files_once_held_are_passed_over() -> None:
    entries = {
        f"w{part}": Entry(dtype, shape, 0, 0)
        for part, dtype, shape in (
            ("_packed", "I32", (64, 32)), ("_scale", "BF16", (64, 1)), ("_shape", "I64", (2,)),
            ("_zero_point", "I8", (64, 1)),
        )
    }  # fmt: skip
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel"}}
    groups = Groups({"format": "pack-quantized", "config_groups": {"group_0": group}}, "config.json")
    assert stored_scheme("w", (64, 128), entries, groups) == SCHEMES["int8"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"blocksize": 0}, "no quant_state with a blocksize above 0"),
        ({"shape": 5}, "its quant_state says 'nf4' 5"),
        ({"nested_offset": "x"}, "nested_offset of its quant_state is 'x'"),
    ],
    ids=["blocksize", "shape", "nested_offset"],
)
def test_a_broken_quant_state_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", tiny_config(), "bf16", seed=0)
    convert(open_checkpoint(source), tmp_path / "out", SCHEMES["nf4-dq"])
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    name = f"{DOWN}.weight.quant_state.bitsandbytes__nf4"
    state = {**json.loads(bytes(tensors[name].tolist())), **change}
    tensors[name] = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(tmp_path / "out")
