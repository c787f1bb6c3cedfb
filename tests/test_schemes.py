"""The registry of precisions, and the one policy of what is quantized."""

from __future__ import annotations

import pytest

from quantkit.errors import SchemeError
from quantkit.presets import PRESETS
from quantkit.schemes import (
    HEADLINE,
    SCHEMES,
    default_schemes,
    get_scheme,
    int_scheme,
    plan_weights,
    schemes_of_bits,
)
from tests.checkpoints import tiny_config

MISTRAL = PRESETS["mistral-7b-instruct-v0.2"]
SMOLLM2 = PRESETS["smollm2-135m"]
G128 = SCHEMES["int4-g128"]


def test_the_names_of_the_registry() -> None:
    assert list(SCHEMES) == [
        "fp32", "bf16", "fp16", "int8", "int4-g128", "int4-g64", "int4-g32",
        "int4-g128-asym", "int4-g64-asym", "int4-g32-asym", "nf4", "nf4-dq",
    ]  # fmt: skip
    assert all(name == scheme.name for name, scheme in SCHEMES.items())
    assert set(HEADLINE) <= set(SCHEMES)


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(SchemeError, match=r"unknown scheme 'int3'; known are fp32, .*nf4-dq"):
        get_scheme("int3")


def test_bits_choose_every_scheme_of_these_bits() -> None:
    four = [scheme.name for scheme in schemes_of_bits(4, "bf16")]
    assert four[0] == "int4-g128"
    assert set(four) == {name for name, scheme in SCHEMES.items() if scheme.bits == 4}
    assert [scheme.name for scheme in schemes_of_bits(8, "bf16")] == ["int8"]
    assert [schemes_of_bits(16, dtype)[0].name for dtype in ("fp32", "bf16", "fp16")] == [
        "bf16",
        "bf16",
        "fp16",
    ]


def test_the_default_comparison_begins_with_the_checkpoints_own_type() -> None:
    assert [scheme.name for scheme in default_schemes("fp16")][:2] == ["fp16", "int8"]
    assert [scheme.name for scheme in default_schemes("fp32")][:3] == ["fp32", "bf16", "int8"]


@pytest.mark.parametrize("name", SCHEMES)
def test_a_plan_names_the_linears_of_the_blocks(name: str) -> None:
    plan = plan_weights(MISTRAL, SCHEMES[name])
    expected = (
        {spec.name for spec in MISTRAL.tensors if spec.is_block_linear} if SCHEMES[name].quantized else set()
    )
    assert set(plan) == expected
    assert "lm_head.weight" not in plan
    assert "model.embed_tokens.weight" not in plan


def test_patterns_add_and_take_away() -> None:
    plan = plan_weights(MISTRAL, G128, include=["lm_head"], exclude=["*.v_proj", "model.layers.0.*"])
    assert "lm_head.weight" in plan
    assert "model.layers.1.self_attn.v_proj.weight" not in plan
    assert "model.layers.0.mlp.up_proj.weight" not in plan
    assert len(plan) == 1 + 31 * 6


@pytest.mark.parametrize(
    ("include", "exclude", "said"),
    [
        (["nothing.*"], [], "'nothing.*' matches no tensor"),
        ([], ["nothing.*"], "'nothing.*' matches no tensor"),
        (["model.norm"], [], "cannot be quantized"),
        (["model.embed_tokens"], [], "cannot be quantized"),
    ],
)
def test_a_pattern_without_sense_is_refused(include: list[str], exclude: list[str], said: str) -> None:
    with pytest.raises(SchemeError) as refusal:
        plan_weights(MISTRAL, G128, include, exclude)
    assert said in str(refusal.value)


def test_a_tied_head_is_named_as_such() -> None:
    with pytest.raises(SchemeError, match="tied to the embedding"):
        plan_weights(SMOLLM2, G128, include=["lm_head"])


def test_ragged_rows_follow_the_policy() -> None:
    ragged = {spec.name for spec in SMOLLM2.tensors if spec.is_block_linear and spec.shape[1] == 576}
    assert ragged
    assert set(plan_weights(SMOLLM2, G128).values()) == {G128}
    int8 = plan_weights(SMOLLM2, G128, indivisible="int8")
    assert {name for name, scheme in int8.items() if scheme is SCHEMES["int8"]} == ragged
    assert set(plan_weights(SMOLLM2, G128, indivisible="keep")) == set(int8) - ragged
    with pytest.raises(SchemeError, match=r"K = 576.*largest group that divides every matrix is 64"):
        plan_weights(SMOLLM2, G128, indivisible="refuse")


def test_where_no_group_divides_the_refusal_says_so() -> None:
    config = tiny_config(intermediate_size=172)
    with pytest.raises(SchemeError, match="no offered group divides every matrix"):
        plan_weights(config, SCHEMES["int4-g32"], indivisible="refuse")
    for name in ("int8", "nf4", "nf4-dq"):
        assert plan_weights(config, SCHEMES[name], indivisible="refuse")


def test_scales_take_the_checkpoints_dtype() -> None:
    assert SCHEMES["int4-g64"].packing("fp32").scale_bits == 32
    assert SCHEMES["int4-g64"].packing("bf16").scale_bits == 16
    assert SCHEMES["nf4"].packing("bf16").scale_bits == 32
    assert SCHEMES["nf4-dq"].packing("bf16").scale_bits == 8


@pytest.mark.parametrize(("bits", "symmetric"), [(3, True), (8, False), (16, True)])
def test_integers_that_cannot_be_packed_are_no_scheme(bits: int, symmetric: bool) -> None:
    with pytest.raises(SchemeError, match=f"{bits} .*symmetric bits cannot be packed"):
        int_scheme(bits, 128, symmetric)
