"""Every command is documented and explains itself."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from quantkit.cli.main import cli
from tests.paths import ROOT

NAMES = [
    "bench",
    "completion",
    "demo",
    "estimate",
    "eval",
    "fit",
    "generate",
    "inspect",
    "measure",
    "quantize",
    "report",
]


def test_these_are_all_commands() -> None:
    assert sorted(cli.list_commands(click.Context(cli))) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_command_is_documented_and_has_help(name: str) -> None:
    page = ROOT / "README.md"
    assert f"`quantkit {name}" in page.read_text()
    result = CliRunner().invoke(cli, [name, "--help"])
    assert result.exit_code == 0
    assert f"Usage: cli {name}" in result.stdout
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    assert command.help
