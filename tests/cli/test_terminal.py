"""Bars, colour, folding and time left on a terminal; none of it in a pipe. Quiet, JSON, help and completion."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
from collections.abc import Mapping
from fcntl import ioctl
from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from calculators.hardware import GPUS, find_gpu
from quantkit.cli import bars, page
from quantkit.cli.main import COMMANDS, cli
from quantkit.cli.remarks import Progress
from quantkit.presets import PRESETS
from quantkit.schemes import SCHEMES
from tests.paths import ROOT, shared_data

BLOCKS = re.compile("[█▓▒░›]")
ESCAPE = "\x1b["
SETTINGS = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "TERM")


def environment(settings: Mapping[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    return {**kept, "TERM": "xterm", "PYTHONIOENCODING": "utf-8", **settings}


def terminal(columns: int, *arguments: str, **settings: str) -> str:
    """Return what a command prints on a terminal of so many columns, stdout and stderr together."""
    master, slave = pty.openpty()
    ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    child = subprocess.Popen(
        [sys.executable, "-m", "quantkit", *arguments],
        cwd=ROOT, env=environment(settings), stdin=slave, stdout=slave, stderr=slave,
    )  # fmt: skip
    os.close(slave)
    pieces = []
    while True:
        try:
            piece = os.read(master, 65536)
        except OSError:  # the child has closed its end
            break
        if not piece:
            break
        pieces.append(piece)
    os.close(master)
    assert child.wait() == 0, b"".join(pieces).decode()
    return b"".join(pieces).decode().replace("\r\n", "\n")


def piped(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "quantkit", *arguments],
        cwd=ROOT, env=environment(settings), capture_output=True, text=True, encoding="utf-8", check=True,
    )  # fmt: skip


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("width", [1, 7, 8, 13, 32])
@pytest.mark.parametrize("sizes", [(3, 3, 3), (100, 1, 1, 1, 1), (0, 0, 5), (1,), (10**10, 7, 0, 10**9)])
def test_the_columns_of_a_bar_add_up(sizes: tuple[int, ...], width: int) -> None:
    scale = sum(sizes)
    found = bars.cells(sizes, scale, width)
    assert sum(found) == width
    for size, count in zip(sizes, found, strict=True):
        assert abs(count - size * width / scale) < 1
    half = bars.cells(sizes, 2 * scale, 2 * width)
    assert sum(half) == width
    assert sum(bars.cells(sizes, max(scale // 2, 1), width)) == width  # what is beyond is cut


def test_a_bar_is_drawn_in_its_glyphs_and_colours() -> None:
    plain = bars.stack((4, 3, 0, 0, 1), 8, 8, bars.COMPONENTS, colour=False)
    assert plain == "████▓▓▓·"
    painted = bars.stack((4, 3, 0, 0, 1), 8, 8, bars.COMPONENTS, colour=True)
    assert painted != plain
    assert click.unstyle(painted) == plain


def test_lengths_are_in_eighths() -> None:
    assert bars.length(1.0, 1.0, 4) == "████"
    assert bars.length(0.5, 1.0, 3) == "█▌"
    assert bars.length(0.0, 1.0, 4) == bars.length(0.0, 0.0, 4) == ""


def test_more_than_a_memory_is_marked() -> None:
    drawn = bars.usage("", "GPU", [(4, 2, 8), (6, 4, 8)]).draw(8, False)
    assert drawn == ["████▓▓··", "█████▓▓›"]


def test_bars_shrink_then_headers_then_the_table_splits() -> None:
    beside = bars.stacks("", [(1, 1, 1, 1, 1)], [5])
    header, short = ["scheme", "activations", "overhead"], ["scheme", "activ.", "overh."]

    def drawn(width: int) -> list[str]:
        screen = bars.Screen(width, blocks=True)
        text = page.table(header, [["bf16", "1.00", "2.00"]], short=short, beside=beside, screen=screen)
        lines = text.split("\n")
        assert all(len(line) <= width for line in lines[:2])
        return lines

    assert len(drawn(100)[1]) == 29 + 2 + bars.WIDEST
    assert len(drawn(45)[1]) == 45
    assert drawn(32)[0].split() == short
    assert BLOCKS.search(drawn(32)[1])
    assert not any(BLOCKS.search(line) for line in drawn(29))
    assert drawn(29)[0].split() == header
    assert drawn(18)[0] == "scheme  activ."


def test_folded_text_hangs_below_its_label() -> None:
    text = "short\n  overhead  one two three four five six seven"
    assert page.fold(text, 30) == "short\n  overhead  one two three four\n            five six seven"
    assert page.fold(text, None) == text


def test_a_pipe_gets_no_bars_no_colour_and_no_folding() -> None:
    arguments = ("estimate", "--gpu", "RTX 4060", "--context", "8k")
    found = piped(*arguments).stdout
    assert ESCAPE not in found
    assert not BLOCKS.search(found)
    assert max(map(len, found.splitlines())) > 120
    assert found == run(*arguments) == piped(*arguments, COLUMNS="40").stdout


def test_closed_streams_are_no_error(tmp_path: Path) -> None:
    model, out = shlex.quote(str(shared_data("stories260K"))), shlex.quote(str(tmp_path / "out"))
    for line in ("estimate --context 8k >&-", f"quantize {model} {out} --scheme int8 >&- 2>&-"):
        command = f"{shlex.quote(sys.executable)} -m quantkit {line}"
        done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


def test_a_terminal_gets_bars_in_colour_with_a_legend() -> None:
    found = terminal(80, "estimate", "--context", "32k", "--bits", "4")
    assert ESCAPE in found
    lines = click.unstyle(found).splitlines()
    assert "█ weights  ▓ KV cache  ▒ activations  ░ allocator  · overhead" in lines
    assert all(BLOCKS.search(line) for line in lines if line.startswith("int4-g"))
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    "settings", [{"NO_COLOR": "1"}, {"NO_COLOR": "1", "FORCE_COLOR": "1"}, {"TERM": "dumb"}]
)
def test_no_colour_where_it_is_not_wanted(settings: dict[str, str]) -> None:
    found = terminal(100, "fit", "--gpu", "RTX 4060", **settings)
    assert ESCAPE not in found
    assert BLOCKS.search(found)


def test_forced_colour_reaches_a_pipe_without_bars() -> None:
    arguments = ("estimate", "--gpu", "RTX 4060", "--context", "8k")
    found = piped(*arguments, FORCE_COLOR="1").stdout
    assert ESCAPE in found
    assert click.unstyle(found) == piped(*arguments).stdout


@pytest.mark.parametrize("columns", [40, 80, 120])
@pytest.mark.parametrize(
    "arguments",
    [
        "estimate --gpu RTX4060 --scheme nf4",
        "estimate --context 8k --vram 9GiB",
        "fit --scheme nf4",
        "inspect",
    ],
)
def test_no_line_is_wider_than_the_terminal(arguments: str, columns: int) -> None:
    lines = click.unstyle(terminal(columns, *arguments.split())).splitlines()
    assert max(map(len, lines)) <= columns


def test_an_encoding_without_blocks_gets_no_bars() -> None:
    found = terminal(100, "estimate", "--context", "8k", PYTHONIOENCODING="ascii")
    assert "bf16" in found
    assert not BLOCKS.search(found)


def test_progress_says_the_time_left_within_its_width(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    progress = Progress("evaluating", 100, hidden=True)
    assert "left" not in progress.line(80)
    clock[0] = 30.0
    progress.update(25)
    assert progress.line(79).endswith(" 25%  1:30 left")
    assert "#" in progress.line(79)
    for columns in range(5, 80):
        assert len(progress.line(columns)) <= columns
    clock[0] = 4000.0
    assert progress.line(79).endswith("3:20:00 left")


def test_progress_shows_on_a_terminal_alone_and_quiet_hides_it(tmp_path: Path) -> None:
    model = str(shared_data("stories260K"))
    arguments = ("quantize", model, str(tmp_path / "out"), "--scheme", "int8", "--force")
    assert "writing int8" in terminal(80, *arguments)
    assert "writing int8" not in terminal(80, *arguments, "--quiet")
    assert piped(*arguments).stderr == ""


def test_quiet_silences_remarks_but_not_errors(tmp_path: Path) -> None:
    arguments = ["estimate", "--context", "1024k", "--output", str(tmp_path / "record.json")]
    loud = CliRunner().invoke(cli, arguments)
    assert "Warning: 1024k" in loud.stderr
    assert "record: " in loud.stderr
    quiet = CliRunner().invoke(cli, [*arguments, "-q"])
    assert (quiet.stderr, quiet.stdout) == ("", loud.stdout)
    check = ["estimate", "--quiet", "--vram", "8GiB", "--scheme", "bf16", "--check"]
    assert "does not fit: bf16" in CliRunner().invoke(cli, check).stderr
    assert "No such option" in CliRunner().invoke(cli, ["estimate", "--quiet", "--bogus"]).stderr


def test_every_command_can_be_quiet_and_says_how_it_is_used() -> None:
    for name in COMMANDS:
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        parts = list(command.commands.values()) if isinstance(command, click.Group) else [command]
        for part in parts:
            assert name == "completion" or any("--quiet" in param.opts for param in part.params), name
        assert command.help
        assert "Examples:" in command.help, name
        for line in command.help.split("Examples:\n")[1].splitlines():
            words = shlex.split(line)
            words = words[: words.index(">>")] if ">>" in words else words
            words = words[: words.index(">")] if ">" in words else words
            assert words[:2] == ["quantkit", name]
            command.make_context(name, words[2:])


def documented_keys(name: str) -> set[str]:
    lines = (ROOT / "docs" / "terminal.md").read_text(encoding="utf-8").splitlines()
    row = next(line for line in lines if line.startswith(f"| `{name}` | `"))
    return set(re.findall(r"`(\w+)`", row.split("|")[2]))


@pytest.mark.parametrize(
    "arguments",
    [
        "estimate --gpu RTX4060",
        "fit --gpu RTX4060",
        "inspect",
        "measure --trace --scheme nf4 --context 64 --kv-bits 16",
    ],
)
def test_json_has_the_documented_keys(arguments: str) -> None:
    name, *rest = arguments.split()
    assert set(json.loads(run(name, *rest, "--json"))) <= documented_keys(name)


def test_json_of_what_needs_weights_has_the_documented_keys(tmp_path: Path) -> None:
    model, record = shared_data("stories260K"), tmp_path / "record.json"
    text = shared_data("text", "tinystories_val_1000.txt")
    bodies = {
        "inspect": run("inspect", model, "--json"),
        "quantize": run("quantize", model, tmp_path / "int8", "--scheme", "int8", "--json"),
        "eval": run("eval", model, "--text", text, "--limit-tokens", "1100", "-o", record, "--json"),
        "generate": run("generate", model, "Once upon a time", "-n", "4", "--json"),
        "report": run("report", record, "-o", tmp_path / "report", "--json"),
    }
    for name, body in bodies.items():
        assert set(json.loads(body)) <= documented_keys(name), name
    generated = json.loads(bodies["generate"])
    assert generated["text"] == run("generate", model, "Once upon a time", "-n", "4").removesuffix("\n")
    assert (generated["new_tokens"], generated["stopped"]) == (4, "length")
    assert str(tmp_path / "report" / "report.md") in json.loads(bodies["report"])["written"]


def test_help_is_a_table_of_contents() -> None:
    text = run("--help")
    assert [line for line in text.splitlines() if re.fullmatch(r"(Know|Make|Measure|Show).*:", line)]
    for name in COMMANDS:
        assert len(re.findall(rf"^  {name} +\S.*$", text, re.MULTILINE)) == 1
    entries = text[text.index("Know") : text.index("Options:")]
    assert all(re.match(r"  \S|\S.*:$", line) for line in entries.splitlines() if line)  # each takes one line


def completed(words: list[str], incomplete: str) -> list[str]:
    found = ShellComplete(cli, {}, "quantkit", "_QUANTKIT_COMPLETE").get_completions(words, incomplete)
    return [item.value for item in found if item.type == "plain"]


def test_completion_knows_commands_presets_schemes_and_gpus() -> None:
    assert completed([], "") == list(COMMANDS)
    assert set(completed(["estimate"], "")) == {*PRESETS, "tiny-mistral"}
    assert completed(["eval"], "") == ["tiny-mistral"]
    for command in ("estimate", "fit", "eval", "measure", "generate", "quantize"):
        assert completed([command, "--scheme"], "") == list(SCHEMES)
    assert completed(["fit", "--scheme"], "NF") == ["nf4", "nf4-dq"]
    assert len(completed(["fit", "--gpu"], "")) == len(GPUS)
    assert completed(["estimate", "--gpu"], "rtx 409") == ["RTX4090"]


def test_completed_gpus_are_understood() -> None:
    for word in completed(["fit", "--gpu"], ""):
        assert " " not in word
        assert find_gpu(word).name.replace(" ", "") == word


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(shell: str) -> None:
    script = run("completion", shell)
    assert f"_QUANTKIT_COMPLETE={shell}_complete" in script
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_completing_loads_no_torch() -> None:
    program = (
        "import sys; sys.argv = ['quantkit']\nfrom quantkit.cli.main import run\n"
        "try: run()\nfinally: print([n for n in ('torch', 'numpy') if n in sys.modules], file=sys.stderr)"
    )
    asked = {
        "_QUANTKIT_COMPLETE": "bash_complete",
        "COMP_WORDS": "quantkit\neval\n--scheme\nnf",
        "COMP_CWORD": "3",
    }
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environment(asked),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["plain,nf4", "plain,nf4-dq"]
    assert done.stderr == "[]\n"
