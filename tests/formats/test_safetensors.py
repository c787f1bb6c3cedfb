"""Broken safetensors files and indices are refused in one line that says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quantkit.errors import CheckpointError
from quantkit.formats.checkpoint import open_checkpoint
from quantkit.formats.safetensors import SafetensorsFile
from tests.checkpoints import tiny_config, write_checkpoint


def write(path: Path, header: object, data_bytes: int = 8) -> Path:
    """Write a file of this header and as many zeros."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(data_bytes))
    return path


def tensor(begin: Any, end: Any, shape: Any = (4,), dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_tensors_may_be_listed_in_any_order(tmp_path: Path) -> None:
    header = {"b": tensor(4, 8), "empty": tensor(4, 4, [0, 3]), "a": tensor(0, 4)}
    assert list(SafetensorsFile(write(tmp_path / "m", header)).entries) == ["b", "empty", "a"]


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ([], "broken header: it is no JSON object"),
        (b"[" * 100_000, "broken header"),
        ({"a": 5}, "a has the unknown dtype None"),
        ({"a": tensor(0, 8, [8], ["U8"])}, r"a has the unknown dtype \['U8'\]"),
        ({"a": tensor(0, 8, [8.0])}, r"a has the shape \[8.0\], not a list of whole numbers"),
        ({"a": tensor(0, 8, [-8])}, "a has the shape"),
        ({"a": tensor(0, 8, 8)}, "a has the shape 8"),
        ({"a": tensor(0.0, 8.0, [8])}, r"a has the data_offsets \[0.0, 8.0\], not two whole numbers"),
        ({"a": tensor("0", "8", [8])}, "a has the data_offsets"),
        ({"a": tensor(0, 8, [2**40] * 3000)}, "a takes 8 bytes, which U8"),
        ({"a": tensor(0, 4), "b": tensor(2, 6)}, "b overlaps the tensor before it"),
        ({"a": tensor(0, 3, [3]), "b": tensor(4, 8)}, "b has a hole before it"),
        ({"a": tensor(0, 4)}, "4 bytes behind the last tensor belong to none"),
        ({"a": tensor(0, 16, [16])}, "is truncated: a ends at byte"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_is_wrong_with_a_header_is_said(header: object, said: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=said) as refusal:
        SafetensorsFile(write(tmp_path / "m", header))
    assert "\n" not in str(refusal.value)


def test_a_git_lfs_pointer_is_named(tmp_path: Path) -> None:
    (tmp_path / "m").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(CheckpointError, match=r"m is a Git LFS pointer.*git lfs pull"):
        SafetensorsFile(tmp_path / "m")


def test_model_safetensors_goes_before_other_files(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model", tiny_config(), "bf16", seed=0)
    write(path / "consolidated.safetensors", {}, 0)
    (path / "model.safetensors.index.json").write_text("{}")
    assert open_checkpoint(path).stored_bytes == 2 * tiny_config().parameters


def test_an_index_that_names_no_file_is_refused(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model", tiny_config(), "bf16", seed=0, shards=2)
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": 3}}')
    with pytest.raises(CheckpointError, match="a lies in 3, which is no file name"):
        open_checkpoint(path)
