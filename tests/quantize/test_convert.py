"""Whole checkpoints: what is written is what was asked for, whole, and reads back as it was computed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.errors import CheckpointError, OutputError, SchemeError
from quantkit.formats.checkpoint import open_checkpoint
from quantkit.kernels.reference import dequantize
from quantkit.models.loader import TORCH_DTYPES, read_finite
from quantkit.quantize import quantize
from quantkit.quantize.convert import Conversion, convert
from quantkit.quantize.error import sqnr_db
from quantkit.schemes import SCHEMES, plan_weights
from quantkit.tensor import QuantizedTensor
from tests.checkpoints import NAMED_MODELS, tiny_config, write_checkpoint
from tests.paths import shared_data, smollm2_gguf

QUANTIZED = [name for name, scheme in SCHEMES.items() if scheme.quantized]
OTHER_DTYPES = [("mistral-gqa", "fp32"), ("mistral-gqa", "fp16")]
UP = "model.layers.0.mlp.up_proj.weight"


def convert_tiny(tmp_path: Path, scheme: str, dtype: str = "fp32", **options: Any) -> tuple[Path, Conversion]:
    """Convert a tiny Mistral at `tmp_path / "model"` to `tmp_path / "out"`."""
    source = write_checkpoint(tmp_path / "model", tiny_config(), dtype, seed=0)
    return source, convert(open_checkpoint(source), tmp_path / "out", SCHEMES[scheme], **options)


@pytest.mark.parametrize("scheme", QUANTIZED)
@pytest.mark.parametrize(("model", "dtype"), [*((model, "bf16") for model in NAMED_MODELS), *OTHER_DTYPES])
def test_what_is_read_back_is_what_was_quantized(model: str, scheme: str, dtype: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", tiny_config(**NAMED_MODELS[model]), dtype, seed=0)
    original = open_checkpoint(source)
    conversion = convert(original, tmp_path / "out", SCHEMES[scheme])
    written = open_checkpoint(tmp_path / "out")
    assert written.config.dtype == dtype
    assert written.stored_bytes == conversion.bytes_after
    assert original.stored_bytes == conversion.bytes_before
    plan = plan_weights(original.config, SCHEMES[scheme])
    assert written.schemes == plan
    assert {row.name for row in conversion.rows} == set(plan)
    for spec in original.config.tensors:
        weight, stored = original.read(spec), written.read(spec)
        assert isinstance(weight, torch.Tensor)
        if spec.name not in plan:
            assert isinstance(stored, torch.Tensor)
            assert torch.equal(weight, stored)
            continue
        assert isinstance(stored, QuantizedTensor)
        expected = quantize(weight, SCHEMES[scheme], TORCH_DTYPES[dtype]).parts()
        found = stored.parts()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[part], expected[part]) for part in expected)


@pytest.mark.parametrize("scheme", ["fp32", "bf16", "fp16"])
def test_a_plain_scheme_casts_everything(scheme: str, tmp_path: Path) -> None:
    source, conversion = convert_tiny(tmp_path, scheme)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].to(TORCH_DTYPES[scheme]), after[name]) for name in before)
    assert len(conversion.rows) == (0 if scheme == "fp32" else 2 * 7 + 2)
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (
        raw["dtype"]
        == raw["torch_dtype"]
        == {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[scheme]
    )
    assert "quantization_config" not in raw


def test_config_keeps_what_the_source_says(tmp_path: Path) -> None:
    source, _ = convert_tiny(tmp_path, "int8", dtype="bf16")
    before, after = (json.loads((path / "config.json").read_text()) for path in (source, tmp_path / "out"))
    assert {key: after[key] for key in before} == before
    assert after.keys() - before.keys() == {"dtype", "quantization_config"}


def test_tokenizer_files_come_along(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", tiny_config(), "fp32", seed=0)
    for name in ("tokenizer.json", "tokenizer_config.json", "notes.txt"):
        (source / name).write_text("{}")
    convert(open_checkpoint(source), tmp_path / "out", SCHEMES["nf4"])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


def test_many_shards_hold_what_one_file_does(tmp_path: Path) -> None:
    limit = 60_000
    source, _ = convert_tiny(tmp_path, "nf4-dq", shard_bytes=limit)
    out = tmp_path / "out"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 3
    assert [file.name for file in files] == [
        f"model-{n + 1:05}-of-{len(files):05}.safetensors" for n in range(len(files))
    ]
    assert max(file.stat().st_size for file in files) <= limit
    tensors = {name: (tensor, file.name) for file in files for name, tensor in load_file(file).items()}
    assert index["weight_map"] == {name: file for name, (_, file) in tensors.items()}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor, _ in tensors.values())
    convert(open_checkpoint(source), tmp_path / "one", SCHEMES["nf4-dq"])
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert whole.keys() == tensors.keys()
    assert all(torch.equal(whole[name], tensors[name][0]) for name in whole)


def test_a_sharded_source_gives_the_same_output(tmp_path: Path) -> None:
    for shards in (1, 3):
        source = write_checkpoint(tmp_path / f"model{shards}", tiny_config(), "bf16", seed=0, shards=shards)
        convert(open_checkpoint(source), tmp_path / f"out{shards}", SCHEMES["int4-g64"])
    one, three = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out1", "out3"))
    assert one == three


def test_patterns_choose_matrices(tmp_path: Path) -> None:
    _, conversion = convert_tiny(tmp_path, "nf4", include=["lm_head"], exclude=["*.layers.1.*", "*.v_proj"])
    names = {row.name for row in conversion.rows}
    assert "lm_head.weight" in names
    assert UP in names
    assert not any("layers.1." in name or "v_proj" in name for name in names)
    assert open_checkpoint(tmp_path / "out").schemes.keys() == names


def test_errors_are_those_of_the_dequantized_matrices(tmp_path: Path) -> None:
    for scheme in QUANTIZED:
        source, conversion = convert_tiny(tmp_path, scheme, force=True)
        before, written = load_file(source / "model.safetensors"), open_checkpoint(tmp_path / "out")
        for spec, row in zip(
            [s for s in written.config.tensors if s.is_block_linear], conversion.rows, strict=True
        ):
            stored = written.read(spec)
            assert isinstance(stored, QuantizedTensor)
            weight = before[spec.name].double()
            noise = (weight - dequantize(stored).double()).square().sum()
            assert row.name == spec.name
            assert row.sqnr_db == pytest.approx(10 * math.log10(weight.square().sum() / noise), rel=1e-9)
            assert row.bytes_after == stored.nbytes
        assert [row.sqnr_db for row in conversion.worst_first] == sorted(
            row.sqnr_db for row in conversion.rows
        )


@pytest.mark.parametrize("shape", [(1, 1), (9, 172), (1030, 1031), (3, 700_001)], ids=str)
@pytest.mark.parametrize("scheme", QUANTIZED)
def test_the_error_is_the_same_in_pieces(scheme: str, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    stored = quantize(weight, SCHEMES[scheme], torch.float32)
    noise = (weight.double() - dequantize(stored).double()).square().sum()
    expected = 10 * math.log10(weight.double().square().sum() / noise) if noise else math.inf
    assert sqnr_db(weight, stored) == pytest.approx(expected, rel=1e-9)


def test_a_ragged_matrix_is_refused_with_the_largest_group_that_fits(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", tiny_config(intermediate_size=192), "fp32", seed=0)
    with pytest.raises(
        SchemeError, match=r"down_proj.*K = 192.*largest group that divides every matrix is 64"
    ):
        convert(open_checkpoint(source), tmp_path / "out", SCHEMES["int4-g128"])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(("indivisible", "stored_as"), [("int8", "int8"), ("keep", None)])
def test_a_ragged_matrix_becomes_what_was_said(
    indivisible: Any, stored_as: str | None, tmp_path: Path
) -> None:
    source = write_checkpoint(tmp_path / "model", tiny_config(intermediate_size=172), "fp32", seed=0)
    convert(open_checkpoint(source), tmp_path / "out", SCHEMES["int4-g32"], indivisible=indivisible)
    schemes = open_checkpoint(tmp_path / "out").schemes
    down = schemes.get("model.layers.0.mlp.down_proj.weight")
    assert (down.name if down else None) == stored_as
    assert schemes[UP].name == "int4-g32"


@pytest.mark.parametrize(
    ("scheme", "options", "message"),
    [
        ("int8", {"exclude": ["*"]}, "nothing of"),
        ("int8", {"include": ["*.gate"]}, "matches no tensor"),
        ("nf4", {"include": ["*embed*"]}, "cannot be quantized"),
        ("bf16", {"exclude": ["*.v_proj"]}, "casts every tensor"),
        ("int4-g32-asym", {"indivisible": "int8"}, "zero points with one config group"),
    ],
)
def test_what_no_format_holds_is_refused(
    scheme: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source = write_checkpoint(tmp_path / "model", tiny_config(intermediate_size=172), "fp32", seed=0)
    with pytest.raises(SchemeError, match=message):
        convert(open_checkpoint(source), tmp_path / "out", SCHEMES[scheme], **options)
    assert not (tmp_path / "out").exists()


def test_what_is_quantized_already_is_refused(tmp_path: Path) -> None:
    convert_tiny(tmp_path, "int8")
    with pytest.raises(CheckpointError, match=r"out is quantized already \(model\.layers\.0\..* is int8\)"):
        convert(open_checkpoint(tmp_path / "out"), tmp_path / "again", SCHEMES["nf4"])


def test_progress_counts_every_element(tmp_path: Path) -> None:
    seen: list[int] = []
    convert_tiny(tmp_path, "int8", progress=seen.append)
    assert sum(seen) == tiny_config().parameters


def test_a_full_disk_is_seen_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100_000})())
    with pytest.raises(OutputError, match=r"97\.66 KiB free, but the output takes"):
        convert_tiny(tmp_path, "int8")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_smollm2_gguf_becomes_a_directory_that_runs(tmp_path: Path) -> None:
    original = open_checkpoint(smollm2_gguf())
    conversion = convert(original, tmp_path / "out", SCHEMES["int8"], exclude=["model.layers.[1-9]*"])
    written = open_checkpoint(tmp_path / "out")
    assert len(conversion.rows) == len(written.schemes) == 7
    assert written.config.tie_embeddings
    text = "The quick brown fox."
    assert written.tokenizer().encode(text) == original.tokenizer().encode(text)


def test_stories260k_needs_a_policy_for_its_ffn(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(shared_data("stories260K"))
    with pytest.raises(SchemeError, match=r"K = 172.*no offered group divides every matrix"):
        convert(checkpoint, tmp_path / "out", SCHEMES["int4-g32"])


def test_scales_that_overflow_are_refused_by_name(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", tiny_config(), "fp32", seed=0)
    tensors = load_file(source / "model.safetensors")
    tensors[UP] = tensors[UP].sign() * 3e38
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(SchemeError, match=rf"{UP} holds 3e\+38: the scales of nf4-dq overflow"):
        convert(open_checkpoint(source), tmp_path / "out", SCHEMES["nf4-dq"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("scheme", "part"), [("int4-g32", "_scale"), ("nf4-dq", ".nested_absmax")])
def test_scales_that_are_not_finite_are_refused_when_read(scheme: str, part: str, tmp_path: Path) -> None:
    convert_tiny(tmp_path, scheme)
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    tensors[UP + part].view(-1)[1] = math.nan
    save_file(tensors, file)
    written = open_checkpoint(tmp_path / "out")
    spec = next(spec for spec in written.config.tensors if spec.name == UP)
    with pytest.raises(CheckpointError, match=f"{UP} holds NaN or infinite"):
        read_finite(written, spec)
