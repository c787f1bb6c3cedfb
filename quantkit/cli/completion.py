"""`quantkit completion`: the script that makes a shell complete commands, options, presets, schemes and GPUs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import click
from click.types import StringParamType

from quantkit.cli import options
from quantkit.embedded import EMBEDDED_MODEL

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_QUANTKIT_COMPLETE"  # where click looks for what the script asks


class SchemeName(StringParamType):
    """The name of a scheme, checked where it is used."""

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Return the schemes that begin so."""
        from quantkit.schemes import SCHEMES

        return items(((name, "") for name in SCHEMES), incomplete)


class ModelName(StringParamType):
    """A preset, the embedded model or a path, checked where it is used.

    Args:
        presets: whether shapes without weights will do.
    """

    def __init__(self, presets: bool) -> None:
        self.presets = presets

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Return the names that begin so, and leave anything else to the shell as a path."""
        from click.shell_completion import CompletionItem

        from quantkit.presets import PRESETS

        known = [(EMBEDDED_MODEL, "embedded, with weights")]
        if self.presets:
            known = [
                *((name, f"{config.parameters:,} parameters") for name, config in PRESETS.items()),
                *known,
            ]
        # a shell that is told of a path first falls back to it where no name begins so
        return [CompletionItem(incomplete, type="file"), *items(known, incomplete)]


def items(known: Iterable[tuple[str, str]], incomplete: str) -> list[CompletionItem]:
    """Return those of the names, each with its help, that begin as typed, whatever the case."""
    from click.shell_completion import CompletionItem

    start = incomplete.lower()
    return [CompletionItem(name, help=said or None) for name, said in known if name.lower().startswith(start)]


def complete_names(command: click.Command, presets: bool) -> None:
    """Make what names a scheme or a model complete itself: parameters of one name alike on every command."""
    if isinstance(command, click.Group):
        for part in command.commands.values():
            complete_names(part, presets)
    scheme, model = SchemeName(), ModelName(presets)
    types = {"scheme": scheme, "schemes": scheme, "model": model, "models": model, "words": model}
    for param in command.params:
        if isinstance(param.type, StringParamType) and param.name in types:
            param.type = types[param.name]


def script(shell: str, program: click.Command) -> str:
    """Return the script for a shell that completes `program`."""
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None
    maker = found(program, {}, "quantkit", VARIABLE)
    return maker.source_template % maker.source_vars()  # source() would start bash to ask for its version


@click.command("completion")
@click.argument("shell", type=click.Choice(SHELLS))
@options.examples(
    "completion bash >> ~/.bashrc",
    "completion zsh >> ~/.zshrc",
    "completion fish > ~/.config/fish/completions/quantkit.fish",
)
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print what makes SHELL complete quantkit's commands, options and values.

    Names of GPUs are completed without their spaces, which quantkit understands: RTX4090 is RTX 4090.
    """
    click.echo(script(shell, ctx.find_root().command))
