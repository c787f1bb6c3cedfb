"""The pages say what is so: their commands and code run and print what stands beneath, their links resolve."""

from __future__ import annotations

import doctest
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from quantkit.cli.main import cli
from tests.paths import ROOT

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://)([^)#\s]*)(?:#([^)\s]+))?\)")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line on which the text begins."""

    language: str
    text: str
    line: int

    @property
    def commands(self) -> list[tuple[str, str]]:
        """Every command after a `$`, and what stands beneath it."""
        parts = re.split(r"^\$ ", self.text, flags=re.MULTILINE)[1:]
        split = (part.replace("\\\n", " ").partition("\n") for part in parts)
        return [(command, output.rstrip()) for command, _, output in split]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [Block(found[1], found[2], text.count("\n", 0, found.start(2))) for found in FENCE.finditer(text)]


def is_followed(page: Path) -> bool:
    """Whether a page has files to write or lines to change: it is followed from top to bottom in a copy."""
    return any(block.language in ("python", "diff") for block in blocks(page))


def shown_commands() -> Iterator[Any]:
    """Yield every `$ quantkit` command that needs nothing but the package, with its output."""
    for page in PAGES:
        if not is_followed(page):
            for block in blocks(page):
                for command, output in block.commands:
                    yield pytest.param(command, output, id=f"{name(page)}: {command[:60]}")


@pytest.fixture(autouse=True)
def nothing_calibrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what this machine knows of its own GPU out of what is printed."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


@pytest.mark.parametrize(("command", "output"), shown_commands())
def test_a_command_prints_what_the_page_shows(command: str, output: str) -> None:
    program, *arguments = shlex.split(command)
    assert program == "quantkit"
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    assert result.output.rstrip() == output


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any(block.language == "pycon" for block in blocks(page))],
    ids=name,
)
def test_a_python_prompt_answers_what_the_page_shows(page: Path) -> None:
    names: dict[str, Any] = {}
    runner = doctest.DocTestRunner(verbose=False)
    report: list[str] = []
    for block in blocks(page):
        if block.language == "pycon":
            example = doctest.DocTestParser().get_doctest(block.text, names, page.name, str(page), block.line)
            runner.run(example, out=report.append, clear_globs=False)
            names = example.globs
    assert not runner.failures, "".join(report)


@pytest.mark.parametrize("page", [page for page in PAGES if is_followed(page)], ids=name)
def test_a_page_that_changes_the_code_works_when_followed(page: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for package in ("calculators", "quantkit"):
        shutil.copytree(ROOT / package, tree / package, ignore=shutil.ignore_patterns("__pycache__"))
    for block in blocks(page):
        if block.language == "python":
            file = re.match(r"# (\w+\.py)\n", block.text)
            assert file, f"{name(page)}:{block.line}: the first line of a program is its file's name"
            (tree / file[1]).write_text(block.text)
        elif block.language == "diff":
            apply(block.text, tree)
        for command, output in block.commands:
            assert in_tree(command, tree) == output, command


def in_tree(command: str, tree: Path) -> str:
    """Return what a command prints in a source tree; its standard error appears where it fails."""
    program, *arguments = shlex.split(command)
    # the finder of an editable installation comes before PYTHONPATH: without it the tree's own files are found
    (tree / "sitecustomize.py").write_text(
        "import sys\nsys.meta_path[:] = [f for f in sys.meta_path if 'ScikitBuild' not in type(f).__name__]\n"
    )
    start = {"python": [], "quantkit": ["-m", "quantkit"]}[program]
    result = subprocess.run(
        [sys.executable, *start, *arguments],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.rstrip()


def apply(diff: str, tree: Path) -> None:
    """Change the files of a unified diff, each of whose hunks must be found exactly once."""
    for change in re.split(r"^--- .*\n", diff, flags=re.MULTILINE)[1:]:
        header, _, body = change.partition("\n")
        path = tree / header.removeprefix("+++ b/")
        for hunk in re.split(r"^@@.*\n", body, flags=re.MULTILINE)[1:]:
            lines = hunk.splitlines(keepends=True)
            before = "".join(line[1:] for line in lines if line[0] in " -")
            after = "".join(line[1:] for line in lines if line[0] in " +")
            text = path.read_text()
            assert text.count(before) == 1, (
                f"{path.name} holds these lines {text.count(before)} times:\n{before}"
            )
            path.write_text(text.replace(before, after))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_that_are_not_run_have_the_options_they_show(page: Path) -> None:
    for block in blocks(page):
        for line in block.text.replace("\\\n", " ").splitlines():
            if line.startswith(("quantkit ", "python -m quantkit ")):
                check_options(line.split("quantkit ", 1)[1])


def check_options(line: str) -> None:
    verb, *words = shlex.split(line, comments=True)
    assert isinstance(cli, click.Group)
    command = cli.get_command(click.Context(cli), verb)
    assert command is not None, f"there is no quantkit {verb}"
    if isinstance(command, click.Group):
        command = command.commands[words.pop(0)]
    known = {"--help", *(option for param in command.params for option in param.opts + param.secondary_opts)}
    assert {word for word in words if word.startswith("-")} <= known, line


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_resolve(page: Path) -> None:
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target, anchor in LINK.findall(prose):
        path = page.parent / target if target else page
        assert path.exists(), f"{name(page)} links to {target}, which is not there"
        if anchor:
            assert anchor in anchors(path), f"{name(page)} links to {target}#{anchor}: no such heading"


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives a page's headings."""
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_index_names_every_page() -> None:
    listed = {target for target, _ in LINK.findall((ROOT / "docs" / "README.md").read_text())}
    assert {page.name for page in DOCS} - {"README.md"} <= listed


def test_the_pages_say_that_nothing_was_measured_as_long_as_that_is_so() -> None:
    texts = (path.read_text()[:200] for path in (ROOT / "reports" / "measured").glob("*.json"))
    records = [text for text in texts if '"kind": "measure"' in text]
    said = "No record from a GPU is there yet" in (ROOT / "docs" / "memory-model.md").read_text()
    assert said != bool(records), "reports/measured and docs/memory-model.md disagree"
