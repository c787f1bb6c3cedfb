"""Who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import ROOT

CALCULATORS = sorted((ROOT / "calculators").glob("*.py"))
SOURCES = [*CALCULATORS, *sorted((ROOT / "quantkit").rglob("*.py"))]
LIGHT = (
    "calculators.activations", "calculators.fit", "quantkit.config", "quantkit.schemes", "quantkit.estimate",
    "quantkit.records", "quantkit.errors", "quantkit.presets", "quantkit.formats.huggingface",
    "quantkit.formats.gguf", "quantkit.cli.main", "quantkit.cli.estimate", "quantkit.cli.inspect",
    "quantkit.cli.quantize", "quantkit.cli.eval", "quantkit.cli.generate", "quantkit.cli.report",
    "quantkit.cli.fit", "quantkit.cli.machine", "quantkit.cli.measure", "quantkit.fit", "quantkit.shard",
    "quantkit.calibration", "quantkit.formats.hub", "quantkit.cli.bench", "quantkit.bench.results",
    "quantkit.bench.tables", "quantkit.bench.sections", "quantkit.bench.shapes", "quantkit.bench.cuda.results",
)  # fmt: skip
HEAVY = ("torch", "numpy", "pandas", "matplotlib", "gguf", "tokenizers", "transformers", "bitsandbytes")


def imported(path: Path) -> set[str]:
    """Return the top-level packages that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("path", CALCULATORS, ids=lambda path: path.name)
def test_calculators_import_the_standard_library_alone(path: Path) -> None:
    assert imported(path) <= {*sys.stdlib_module_names, "calculators"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_click_stays_in_the_command_line_and_plotting_in_reports(path: Path) -> None:
    packages, room = imported(path), path.relative_to(ROOT).parts[:-1]
    assert "click" not in packages or room[:2] == ("quantkit", "cli")
    assert "matplotlib" not in packages or room[:2] == ("quantkit", "report")
    assert not packages & {"pickle", "tests", "examples"}


def test_a_gpus_benchmark_needs_no_package_that_it_does_not_run() -> None:
    packages = ("gguf", "bitsandbytes", "sentencepiece", "jinja2", "tokenizers", "quantkit.bench.llama")
    program = (
        f"import sys, quantkit.bench.cuda.run; print([name for name in {packages!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


@pytest.mark.parametrize("module", LIGHT)
def test_importing_loads_nothing_heavy(module: str) -> None:
    program = f"import sys, {module}; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    assert done.stdout.strip() == "[]"
