"""The `quantkit` command: finds subcommands late, and turns what goes wrong into one line and a code.

Exit codes: 0 done, 1 an error, 2 wrong usage, 3 `estimate --check` found what does not fit, 130
interrupted, 143 terminated.
"""

from __future__ import annotations

import errno
import gc
import importlib
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

import click

from quantkit import __version__
from quantkit.cli.completion import complete_names
from quantkit.errors import QuantkitError, is_device_out_of_memory

SECTIONS = {
    "Know before you download": {
        "estimate": "GPU memory at each precision and context, and whether it fits",
        "fit": "the longest context that fits: by precision, or by GPU",
        "inspect": "parameters by role, shapes, norm, RoPE, window, context",
    },
    "Make it smaller": {
        "quantize": "write a model in int8, int4 or nf4",
        "generate": "run it: stream text, in any precision",
    },
    "Measure what that costs": {
        "eval": "perplexity of the original and of each precision",
        "measure": "memory that runs really take, beside the estimate",
        "bench": "how fast this machine runs it, beside what it could do",
    },
    "Show": {
        "demo": "all of it on a small real model, in a minute or two",
        "report": "tables, charts and a page to calculate on, from records",
        "completion": "make the shell complete names",
    },
}
COMMANDS = tuple(name for section in SECTIONS.values() for name in section)
NEED_WEIGHTS = ("quantize", "generate", "eval")
INTERRUPTED, TERMINATED = 130, 143


class LazyGroup(click.Group):
    """A group whose commands are imported when they are named."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order of their use."""
        return list(COMMANDS)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands before the few options that all have."""
        self.format_commands(ctx, formatter)
        click.Command.format_options(self, ctx, formatter)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands under their headings; none is imported for it."""
        width = max(map(len, COMMANDS))
        for title, section in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(width), line) for name, line in section.items()])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command, None where there is none of that name."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"quantkit.cli.{cmd_name}")
        command: click.Command = module.command
        complete_names(command, presets=cmd_name not in NEED_WEIGHTS)
        return command


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="quantkit")
def cli() -> None:
    """What a language model costs in GPU memory at each precision, and what that does to its quality.

    Every command has examples in its own --help; `quantkit estimate` needs nothing else.
    """


def run() -> NoReturn:
    """Run the command line and exit; whatever cleans up on an exception does so when terminated, too."""
    signal.signal(signal.SIGTERM, _terminate)
    # what a short command makes lives to its end: looking for garbage would be a tenth of its time
    gc.set_threshold(100_000)
    try:
        code = cli.main(prog_name="quantkit", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        code = _say("interrupted", INTERRUPTED)
    except BrokenPipeError:
        _drop_stdout()
        code = 1
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        code = _say(line, 1)
    sys.exit(code or 0)


def explain(error: Exception) -> str | None:
    """Return one line for an error that is no fault of the program, None for any other."""
    if isinstance(error, QuantkitError):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"the disk is full{_file(error)}: nothing was left behind; make room and run again"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{_file(error)}"
    if _is_out_of_memory(error):
        return "out of memory: choose a smaller model, context or window, or another scheme"
    return None


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, in Python or in torch, which raises RuntimeErrors for it."""
    if isinstance(error, MemoryError):
        return True
    return is_device_out_of_memory(error) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def _file(error: OSError) -> str:
    return f": {os.fsdecode(error.filename)}" if isinstance(error.filename, str | bytes) else ""


def _say(line: str, code: int) -> int:
    click.echo(f"Error: {line}", err=True)
    return code


def _drop_stdout() -> None:
    """Point stdout away from a closed pipe, so that flushing it at exit raises nothing."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    """Unwind as from an exception; a second signal does not disturb the cleaning up."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise SystemExit(TERMINATED)
