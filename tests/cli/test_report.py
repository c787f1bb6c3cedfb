"""`quantkit report` prints what it wrote and refuses what is no record."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from quantkit.cli.report import command
from quantkit.errors import RecordError
from quantkit.records import Record, write_record


@pytest.fixture
def record(tmp_path: Path) -> Path:
    result = {
        "kv_bits": 32,
        "nll": 1.0,
        "standard_error": 0.1,
        "tokens_scored": 4096,
        "tokens_per_second": 10.0,
    }
    body = {
        "model": "tiny",
        "parameters": 260_032,
        "dtype": "fp32",
        "protocol": {
            "text": "a text",
            "sha256": "00",
            "window": 512,
            "stride": 512,
            "bos": True,
            "tokens_scored": 4096,
        },
        "results": [
            {**result, "scheme": "fp32", "perplexity": 3.0, "difference": 0.0, "weights_bytes": 1_040_128},
            {**result, "scheme": "int8", "perplexity": 3.1, "difference": 0.1, "weights_bytes": 300_000},
        ],
    }
    path = tmp_path / "record.json"
    write_record(path, Record("perplexity", body, "2025-01-02T03:04:05+00:00", "0.1.0", {"python": "3.12"}))
    return path


def test_report_prints_the_paths_it_wrote(record: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "report"
    for _ in range(2):  # the folder may exist
        result = CliRunner().invoke(command, [str(record), "-o", str(out)])
        assert result.exit_code == 0, result.output
        assert sorted(map(Path, result.output.split())) == sorted(out.iterdir())
    assert {path.name for path in out.iterdir()} == {
        "report.md",
        "tiny-perplexity.csv",
        "tiny-perplexity.md",
        "tiny-perplexity.png",
    }


def test_a_directory_among_the_records_is_refused(record: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(command, [str(record), str(tmp_path), "-o", str(tmp_path / "report")])
    assert result.exit_code == 2
    assert f"{tmp_path} is a directory" in result.output
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("arguments", [[], ["record.json"], ["-o", "report"]])
def test_records_and_a_folder_are_needed(arguments: list[str]) -> None:
    assert CliRunner().invoke(command, arguments).exit_code == 2


def test_an_absent_record_is_a_record_error(tmp_path: Path) -> None:
    result = CliRunner().invoke(command, [str(tmp_path / "absent.json"), "-o", str(tmp_path / "report")])
    assert isinstance(result.exception, RecordError)


def test_help_loads_no_plotting() -> None:
    program = (
        "import sys; from quantkit.cli.report import command; "
        "print([name for name in ('matplotlib', 'pandas', 'torch', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
