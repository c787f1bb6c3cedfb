"""Configs and their tables of tensors, held to published shapes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from quantkit.config import ROLES, ModelConfig, config_from_dict, config_from_json
from quantkit.errors import ConfigError
from quantkit.presets import DEFAULT_PRESET, PRESETS
from tests.checkpoints import hf_config, tiny_config
from tests.paths import shared_data

_MISTRAL = (131_072_000, 1_342_177_280, 5_637_144_576, 266_240, 131_072_000)
_MISTRAL_V3 = (134_217_728, 1_342_177_280, 5_637_144_576, 266_240, 134_217_728)
PARAMETERS = {  # embedding, attention, FFN, norms, head
    "mistral-7b-instruct-v0.2": (7_241_732_096, _MISTRAL),
    "mistral-7b-v0.1": (7_241_732_096, _MISTRAL),
    "mistral-7b-instruct-v0.1": (7_241_732_096, _MISTRAL),
    "mistral-7b-v0.3": (7_248_023_552, _MISTRAL_V3),
    "mistral-7b-instruct-v0.3": (7_248_023_552, _MISTRAL_V3),
    "llama-2-7b": (6_738_415_616, (131_072_000, 2_147_483_648, 4_328_521_728, 266_240, 131_072_000)),
    "llama-3.1-8b": (8_030_261_248, (525_336_576, 1_342_177_280, 5_637_144_576, 266_240, 525_336_576)),
    "tinyllama-1.1b": (1_100_048_384, (65_536_000, 207_618_048, 761_266_176, 92_160, 65_536_000)),
    "smollm2-135m": (134_515_008, (28_311_552, 26_542_080, 79_626_240, 35_136, 0)),
    "qwen2.5-7b": (7_615_616_512, (544_997_376, 822_212_608, 5_703_204_864, 204_288, 544_997_376)),
}


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_by_role(name: str) -> None:
    total, by_role = PARAMETERS[name]
    config = PRESETS[name]
    assert config.parameters == total == sum(by_role)
    assert tuple(config.parameters_by_role().values()) == by_role
    assert tuple(config.parameters_by_role()) == ROLES


def test_every_listed_model_is_a_preset() -> None:
    assert set(PRESETS) == set(PARAMETERS)
    assert DEFAULT_PRESET in PRESETS


def test_the_tensors_of_mistral_are_those_of_its_index() -> None:
    table = shared_data("mistral-7b-instruct-v0.2", "param_table.tsv")
    with table.open(encoding="utf-8", newline="") as file:
        published = {
            row["name"]: tuple(json.loads(row["shape"])) for row in csv.DictReader(file, delimiter="\t")
        }
    tensors = PRESETS[DEFAULT_PRESET].tensors
    assert {spec.name: spec.shape for spec in tensors} == published
    assert len(tensors) == len(published) == 291


def test_the_default_preset_restates_its_config_json() -> None:
    config = config_from_json(shared_data("mistral-7b-instruct-v0.2", "config.json"))
    assert config == PRESETS[DEFAULT_PRESET]


def test_only_block_linears_are_quantized_by_default() -> None:
    config = PRESETS["mistral-7b-instruct-v0.2"]
    linears = [spec for spec in config.tensors if spec.is_block_linear]
    assert sum(spec.elements for spec in linears) == 6_979_321_856
    assert sum(spec.shape[0] for spec in linears) == 1_376_256
    assert {spec.role for spec in linears} == {"attention", "ffn"}


def test_windows_and_thetas_are_not_mixed_up() -> None:
    first, second, third = (PRESETS[f"mistral-7b-instruct-v0.{version}"] for version in (1, 2, 3))
    assert (first.sliding_window, second.sliding_window, third.sliding_window) == (4096, None, None)
    assert (first.rope_theta, second.rope_theta, third.rope_theta) == (1e4, 1e6, 1e6)
    assert (first.vocab_size, second.vocab_size, third.vocab_size) == (32000, 32000, 32768)


def described(config: ModelConfig, **changes: Any) -> ModelConfig:
    raw = {**hf_config(config, config.dtype), **changes}
    return config_from_dict(
        {key: value for key, value in raw.items() if value is not ...}, "tiny", "config.json"
    )


@pytest.mark.parametrize(
    "config",
    [
        tiny_config(),
        tiny_config(sliding_window=7),
        tiny_config(architecture="llama", tie_embeddings=True, qkv_bias=True, o_bias=True, mlp_bias=True),
        tiny_config(architecture="qwen2", qkv_bias=True),
        tiny_config(head_dim=48),
    ],
    ids=["mistral", "window", "llama-biases", "qwen2", "head_dim"],
)
def test_a_config_survives_its_json(config: ModelConfig) -> None:
    assert described(config) == config


def test_head_dim_is_read_where_it_is_named() -> None:
    assert described(tiny_config(head_dim=48)).head_dim == 48
    assert described(tiny_config(), head_dim=...).head_dim == 32
    assert described(tiny_config(), head_dim=None).head_dim == 32


def test_a_tied_head_counts_once() -> None:
    untied, tied = tiny_config(), tiny_config(tie_embeddings=True)
    assert untied.parameters - tied.parameters == 96 * 128
    assert tied.parameters_by_role()["head"] == 0


def test_newer_spellings_are_understood() -> None:
    newer = described(
        tiny_config(), torch_dtype=..., rope_theta=..., dtype="bfloat16", rope_parameters={"rope_theta": 5e5}
    )
    assert (newer.dtype, newer.rope_theta) == ("bf16", 5e5)


def test_llama3_scaling_is_read() -> None:
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = described(tiny_config(architecture="llama"), rope_scaling=scaling)
    assert config.rope_scaling == PRESETS["llama-3.1-8b"].rope_scaling


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": ...}, "'hidden_size' is missing"),
        ({"num_hidden_layers": "two"}, "'num_hidden_layers' is 'two', not a number"),
        ({"vocab_size": 96.5}, "'vocab_size' is 96.5; it must be a whole number above 0"),
        ({"architectures": ["GPT2LMHeadModel"]}, "unknown architecture GPT2LMHeadModel"),
        ({"architectures": ..., "model_type": ...}, "'architectures' is missing"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"torch_dtype": "int8"}, "dtype 'int8' is not one of"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "RoPE scaling 'yarn'"),
        ({"num_key_value_heads": 3}, "cannot share 3 key/value heads"),
        ({"head_dim": 31}, "RoPE needs an even one"),
        ({"num_hidden_layers": 0}, "'num_hidden_layers' is 0"),
        ({"num_attention_heads": 0, "head_dim": ...}, "'num_attention_heads' is 0"),
        ({"num_key_value_heads": ...}, "4 attention heads cannot share mistral's default of 8"),
        ({"sliding_window": -1}, "'sliding_window' is -1"),
        ({"rms_norm_eps": -1e-5}, "norm_eps is -1e-05"),
        ({"rope_theta": 0}, "rope_theta is 0"),
    ],
)
def test_what_is_wrong_with_a_config_is_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        described(tiny_config(), **changes)
    assert said in str(refusal.value)


@pytest.mark.parametrize(
    ("architecture", "absent", "null"),
    [
        ("llama", (64, None), (64, None)),
        ("mistral", (8, 4096), (64, None)),
        ("qwen2", (32, 4096), (64, None)),
    ],
)
def test_defaults_are_those_of_transformers(
    architecture: str, absent: tuple[int, int | None], null: tuple[int, None]
) -> None:
    config = tiny_config(architecture=architecture, qkv_bias=architecture == "qwen2", n_heads=64)
    keys = ("num_key_value_heads", "sliding_window")
    windows = {"use_sliding_window": True, "layer_types": ["sliding_attention"] * 2}
    for value, expected in ((..., absent), (None, null)):
        found = described(config, **windows, **dict.fromkeys(keys, value))
        assert (found.n_kv_heads, found.sliding_window) == expected


@pytest.mark.parametrize("architecture", ["mistral", "qwen2"])
def test_biases_that_transformers_does_not_know_are_ignored(architecture: str) -> None:
    config = tiny_config(architecture=architecture, qkv_bias=architecture == "qwen2")
    assert described(config, attention_bias=True, mlp_bias=True) == config


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(hf_config(tiny_config(), "bf16")), encoding="utf-8-sig")
    assert config_from_json(tmp_path / "config.json").hidden_size == 128


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00", "[" * 100_000, '{"a": ' + "9" * 5000 + "}"])
def test_a_file_that_is_no_json_object_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        config_from_json(tmp_path / "config.json")


def test_a_token_id_of_minus_one_is_none() -> None:
    config = config_from_dict(
        hf_config(tiny_config(), "bf16") | {"eos_token_id": -1, "bos_token_id": -1}, "tiny", "here"
    )
    assert (config.bos_token_id, config.eos_token_ids) == (None, ())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_parameters", "x"),
        ("rope_theta", "big"),
        ("vocab_size", float("inf")),
        ("architectures", "LlamaForCausalLM"),
        ("eos_token_id", "</s>"),
        ("eos_token_id", -2),
        ("bos_token_id", True),
        ("num_hidden_layers", 10**9),
        ("vocab_size", 10**400),
        ("hidden_size", 10**300),
        ("head_dim", 10**400),
        ("architectures", [["LlamaForCausalLM"]]),
        *(("tie_word_embeddings", value) for value in ("false", [], 0)),
        ("attention_bias", "no"),
        ("mlp_bias", 1),
        *(("torch_dtype", value) for value in ("", 0, [])),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_value_of_the_wrong_kind_is_refused_in_one_line(key: str, value: object) -> None:
    raw = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 8, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    with pytest.raises(ConfigError) as error:
        config_from_dict({**raw, key: value}, "model", "config.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        *(
            {"sliding_window": value}
            for value in ("abc", "4", [1], {}, True, 1.5, float("inf"), float("nan"))
        ),
        {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "layer_types": 5},
        {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": "yes"},
    ],
    ids=lambda changes: str(changes)[:60],
)
def test_a_window_of_the_wrong_kind_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=list(changes)[-1]):
        described(tiny_config(sliding_window=7), **changes)
