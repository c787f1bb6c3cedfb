"""The example programs run, and print what they promise."""

from __future__ import annotations

import subprocess
import sys

from quantkit.schemes import SCHEMES
from tests.paths import ROOT


def run(name: str, *arguments: object) -> str:
    """Return what an example prints; its standard error appears where it fails."""
    command = [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)]
    result = subprocess.run(
        command, cwd=ROOT, env=_environment(), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT)}


def test_fit_a_card_gives_a_verdict_for_each_scheme() -> None:
    lines = run("fit_a_card.py").splitlines()
    assert len(lines) == 7
    assert lines[0].startswith("bf16")
    assert lines[0].endswith("does not fit")
    assert any(line.startswith("int4-g128") and line.endswith(" fits") for line in lines)


def test_quantize_a_matrix_lists_every_scheme() -> None:
    lines = run("quantize_a_matrix.py").splitlines()
    assert [line.split()[0] for line in lines] == [
        name for name, scheme in SCHEMES.items() if scheme.quantized
    ]
    sqnr = {line.split()[0]: float(line.split()[-2]) for line in lines}
    assert sqnr["int8"] > 40
    assert sqnr["int4-g32"] > sqnr["int4-g64"] > sqnr["int4-g128"] > 19


def test_the_embedded_models_divergence_is_in_the_order_of_theory() -> None:
    """Each by at least 5%; NF4 and NF4-dq are alike."""
    lines = run("divergence.py", "tiny-mistral", 4096).splitlines()
    assert lines[0] == "4,096 tokens in 2 windows"
    rows = [line.replace("±", "").split() for line in lines[1:]]
    mean = {name: float(found) for name, found, _ in rows}
    assert mean["int8"] < 0.02 * mean["int4-g32"]
    assert mean["int4-g128"] > 1.05 * mean["int4-g64"] > 1.05**2 * mean["int4-g32"]
    assert mean["int4-g128"] > 1.05 * mean["nf4"] > 1.05**2 * mean["int4-g32"]
    assert abs(mean["nf4-dq"] / mean["nf4"] - 1) < 0.02
