"""What commands share: parameter types, options, examples, and how a MODEL is found."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from inspect import cleandoc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from calculators.units import is_decimal_unit, parse_size, parse_tokens
from quantkit.cli.remarks import Command, warn
from quantkit.config import DTYPE_BITS, ModelConfig, config_from_json
from quantkit.embedded import EMBEDDED_MODEL, embedded_path
from quantkit.errors import CheckpointError, ConfigError
from quantkit.presets import PRESETS
from quantkit.schemes import Indivisible, QuantScheme

if TYPE_CHECKING:
    from quantkit.formats.checkpoint import Checkpoint

# More are refused as a slip of the pen.
MOST_TOKENS = 1 << 24
MOST_SEQUENCES = 1 << 16
MOST_BYTES = 1 << 50


HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class TokensParam(click.ParamType):
    """A count of tokens: `4096`, or `4k` for 4 x 1024; at most `MOST_TOKENS`."""

    name = "tokens"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the tokens; usage error where `value` is no count."""
        if isinstance(value, int):
            return value
        try:
            tokens = parse_tokens(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if tokens > MOST_TOKENS:
            self.fail(f"{value} is more than {MOST_TOKENS:,} tokens, the most that is computed", param, ctx)
        return tokens


@dataclass(frozen=True)
class Size:
    """A size as typed; `decimal` where its unit is a power of ten."""

    nbytes: int
    text: str
    decimal: bool


class SizeParam(click.ParamType):
    """A size with its unit, such as `24GiB`; at most `MOST_BYTES`."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Size:
        """Return the size; usage error where `value` has no number or no unit."""
        if isinstance(value, Size):
            return value
        try:
            size = Size(parse_size(value), value, is_decimal_unit(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)
        except OverflowError:
            size = Size(MOST_BYTES + 1, value, False)
        if size.nbytes > MOST_BYTES:
            self.fail(
                f"{value} is more than {MOST_BYTES // 2**30:,} GiB, the most that is computed", param, ctx
            )
        return size


TOKENS, SIZE = TokensParam(), SizeParam()
SEQUENCES = click.IntRange(1, MOST_SEQUENCES)

schemes = click.option(
    "--scheme", "schemes", multiple=True, metavar="NAME", help="A precision by name, such as nf4; repeatable."
)
kv_bits = click.option(
    "--kv-bits",
    type=click.Choice(["16", "8", "4"]),
    callback=lambda ctx, param, value: int(value) if value else None,
    help="Bits of the KV cache [default: the dtype's].",
)
dtype = click.option(
    "--dtype", type=click.Choice(list(DTYPE_BITS)), help="Compute in this [default: the checkpoint's]."
)
device = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where the model runs; auto is a GPU where PyTorch sees one.",
)
_include = click.option(
    "--include", multiple=True, metavar="PATTERN", help="Also quantize these, such as lm_head; repeatable."
)
_exclude = click.option(
    "--exclude",
    multiple=True,
    metavar="PATTERN",
    help="Leave these as they are, such as '*.v_proj'.",
)


def refuse_idle_group(group: int, caches: Collection[int | None]) -> None:
    """Refuse --kv-group where no cache, of so many bits each, has scales."""
    if group and not {8, 4} & {*caches}:
        raise click.UsageError("--kv-group needs --kv-bits 8 or 4: other caches have no scales")


def policy(command: Command) -> Command:
    """Add --include, --exclude and --indivisible to a command that computes, where short groups can exist."""
    indivisible = click.option(
        "--indivisible",
        type=click.Choice(["short", "int8", "keep"]),
        default="short",
        show_default=True,
        help="A matrix whose K the group does not divide: a short last group, int8, or left as it is.",
    )
    return _include(_exclude(indivisible(command)))


def file_policy(command: Command) -> Command:
    """Add the same options to a command that writes files, which hold no short groups."""
    indivisible = click.option(
        "--indivisible",
        type=click.Choice(["int8", "keep"]),
        help="A matrix whose K the group does not divide: int8, or left as it is [default: refuse].",
    )
    return _include(_exclude(indivisible(command)))


def as_indivisible(text: str | None) -> Indivisible:
    """Return the policy that the value of --indivisible names; none given refuses."""
    known: Mapping[str, Indivisible] = {"short": "short", "int8": "int8", "keep": "keep"}
    return known[text] if text else "refuse"


def examples(*lines: str) -> Callable[[Command], Command]:
    """Add examples to the help of a command, below what its docstring says."""

    def added(command: Command) -> Command:
        shown = "\n".join(f"  quantkit {line}" for line in lines)
        command.__doc__ = f"{cleandoc(command.__doc__ or '')}\n\n\b\nExamples:\n{shown}"
        return command

    return added


@dataclass(frozen=True)
class Subject:
    """A model whose shapes are known, with or without weights.

    Attributes:
        config: the model.
        checkpoint: the weights' headers, None for a preset or a config.json alone.
    """

    config: ModelConfig
    checkpoint: Checkpoint | None = None

    @property
    def schemes(self) -> Mapping[str, QuantScheme]:
        """The scheme of every matrix stored quantized in a format quantkit computes with."""
        return self.checkpoint.schemes if self.checkpoint else {}

    @property
    def is_gguf(self) -> bool:
        return self.checkpoint is not None and self.checkpoint.path.suffix == ".gguf"


def find_model(name: str) -> Subject:
    """Return the preset, directory, .gguf file or model on the Hub that MODEL names; weights are not read.

    Raises:
        ConfigError: none of them, or an incomplete configuration.
        CheckpointError: broken weights, or a model that cannot be had from the Hub.
    """
    if name.lower() in PRESETS:
        return Subject(PRESETS[name.lower()])
    path = embedded_path(name) or Path(name)
    if not path.exists() and HUB_ID.fullmatch(name) and path.suffix != ".gguf":
        from quantkit.formats.hub import open_hub

        config, on_hub = open_hub(name)
        if on_hub is None:
            warn(f"{name} has no safetensors on the Hub: its shapes are those of config.json, unchecked")
        return Subject(config, on_hub)
    if not (name and path.exists()):  # an empty name would be the current directory
        raise ConfigError(
            f"unknown model {name!r}: presets are {', '.join(PRESETS)}; or name {EMBEDDED_MODEL}, a directory "
            "with config.json, a .gguf file, or a model on the Hugging Face Hub as owner/name"
        )
    from quantkit.formats.checkpoint import open_checkpoint

    if path.is_dir():
        from quantkit.formats.huggingface import has_weights

        if not has_weights(path):
            return Subject(config_from_json(path / "config.json"))
    checkpoint = open_checkpoint(path)
    return Subject(checkpoint.config, checkpoint)


def open_weights(name: str) -> Checkpoint:
    """Open the embedded model, the directory or the .gguf file that MODEL names.

    Raises:
        CheckpointError: there is none, it is a preset, or its weights are broken.
        ConfigError: its configuration is incomplete.
    """
    from quantkit.formats.checkpoint import open_checkpoint

    path = embedded_path(name) or Path(name)
    if not name:
        raise CheckpointError(
            f"no model is named: name {EMBEDDED_MODEL}, a directory with config.json, or a .gguf file"
        )
    if not path.exists() and name.lower() in PRESETS:
        raise CheckpointError(
            f"{name} is a preset, shapes without weights: name {EMBEDDED_MODEL}, a model directory with "
            "config.json, or a .gguf file"
        )
    return open_checkpoint(path)


def model_and(last: str) -> Callable[[Command], Command]:
    """Add the arguments `[MODEL] LAST` to a command, which gets them as `words`: a pair.

    Without MODEL it is the embedded one; a LAST that is a model itself shows that the other was forgotten.
    """

    def pair(ctx: click.Context, param: click.Parameter, words: tuple[str, ...]) -> tuple[str, str]:
        if len(words) == 2:
            return words[0], words[1]
        if len(words) > 2:
            raise click.UsageError(
                f"{len(words)} arguments are too many: name MODEL and {last}, or {last} alone"
            )
        if _is_model(words[0]):
            raise click.UsageError(f"{words[0]} is a model: name {last}, too")
        return EMBEDDED_MODEL, words[0]

    return click.argument("words", nargs=-1, required=True, callback=pair, metavar=f"[MODEL] {last}")


def _is_model(word: str) -> bool:
    known = word.lower() in PRESETS or embedded_path(word) is not None or word.endswith(".gguf")
    return known or os.path.exists(os.path.join(word, "config.json"))  # a prompt can be too long for a Path
