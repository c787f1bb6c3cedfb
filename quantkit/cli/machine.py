"""The GPU and the runtime that `estimate` and `fit` compute for: options, and what they come to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from typing import TYPE_CHECKING, Any, cast

import click

from calculators.fit import ERROR_BAND, Verdict, verdict
from calculators.hardware import GPU, GPUS, Overhead, Platform, find_gpu, platform_of
from calculators.units import format_bytes, format_gib
from quantkit.cli import options
from quantkit.cli.completion import items
from quantkit.estimate import PREFILL_CHUNK, Estimator, Workload
from quantkit.schemes import SCHEMES

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from quantkit.config import ModelConfig
    from quantkit.estimate import MemoryEstimate

AS_STORED = "as-stored"
RUNTIME = "quantkit's own runtime on one GPU: quantized matrices dequantized to multiply, in pieces"
CEILING = (
    "bandwidth / (weights + KV cache at that context, of an untied embedding only the rows used): "
    "a ceiling, not a prediction"
)
TIGHT_MEANS = (
    f"fits, but by less than {ERROR_BAND:.0%} of the need: the error that estimates are held to "
    "(on an H200, the one GPU measured, it was at most 1.1%)"
)
_STATUSES = ("assumed", "published", "measured")  # the weakest first


class GPUParam(click.ParamType):
    """A GPU by name, such as `RTX 4090`."""

    name = "gpu"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> GPU:
        """Return the GPU; usage error, with the nearest names, where there is none of that name."""
        if isinstance(value, GPU):
            return value
        try:
            return find_gpu(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Return the GPUs that begin so, without the spaces, which a shell would have to quote."""
        names = ((gpu.name.replace(" ", ""), f"{gpu.sold_gb} GB") for gpu in GPUS)
        return items(names, incomplete.replace(" ", ""))


@dataclass(frozen=True)
class Machine:
    """Where the model is to run.

    Attributes:
        gpu: as named, or None.
        size: the memory as given by --vram, or None.
        reserve: bytes of the memory to keep free.
        attention: the attention asked for, `flash` or `math`; None for the one that the GPU runs.
        expandable_segments: the allocator's setting.
        gpus: how many share the model by tensor parallelism.
    """

    gpu: GPU | None = None
    size: options.Size | None = None
    reserve: int = 0
    attention: str | None = None
    expandable_segments: bool = False
    gpus: int = 1

    @property
    def memory(self) -> int | None:
        """Bytes of the memory named, the reserve included; None where none was named."""
        if self.gpu:
            return self.gpu.usable_bytes
        return self.size.nbytes if self.size else None

    @property
    def title(self) -> str:
        """The memory in words, `the RTX 4090 with 23.99 GiB`; empty where none was named."""
        if self.memory is None:
            return ""
        size = format_bytes(self.memory - self.reserve)
        if self.gpu is None:
            return f"each GPU's {size}" if self.gpus > 1 else size
        return f"{'each' if self.gpus > 1 else 'the'} {self.gpu.name} with {size}"

    def verdict(self, entry: MemoryEstimate) -> Verdict | None:
        """Return whether an estimate fits, None where no memory was named."""
        return None if self.memory is None else verdict(entry.total_bytes, self.memory, self.reserve)

    @property
    def free(self) -> int | None:
        """Bytes of the memory that the process may take; None where none was named."""
        return None if self.memory is None else self.memory - self.reserve

    @property
    def bandwidth(self) -> float | None:
        """GB/s of the GPU named; None where none was."""
        return self.gpu.bandwidth_gb_s if self.gpu else None

    def share(self, config: ModelConfig) -> ModelConfig:
        """Return what each GPU holds of a model."""
        if self.gpus == 1:
            return config
        from quantkit.shard import shard

        return shard(config, self.gpus)

    def platform(self) -> Platform:
        """Return what the device and its libraries take: as calibrated here, as published, or as assumed.

        Raises:
            click.UsageError: flash attention is asked for on a GPU that has none.
        """
        base = platform_of(self.gpu)
        attention = self.attention or base.attention
        if self.gpu and attention == "flash" != base.attention:
            raise click.UsageError(f"the {self.gpu.name} runs no flash attention: choose --attention math")
        if self.gpu:
            from quantkit.calibration import calibrated

            base = calibrated(self.gpu.name, base)
        return replace(base, attention=attention, expandable_segments=self.expandable_segments)


def machine(command: options.Command) -> options.Command:
    """Add the options of the machine to a command, which gets them as `machine`."""

    @wraps(command)
    def collected(
        gpu: GPU | None,
        vram: options.Size | None,
        reserve: options.Size | None,
        attention: str | None,
        expandable_segments: bool,
        tensor_parallel: int,
        **rest: Any,
    ) -> Any:
        if gpu and vram:
            raise click.UsageError("--gpu and --vram exclude each other: choose one")
        kept = reserve.nbytes if reserve else 0
        where = Machine(gpu, vram, kept, attention, expandable_segments, tensor_parallel)
        if where.memory is not None and kept >= where.memory:
            raise click.UsageError(
                f"--reserve keeps {format_bytes(kept)} of {format_bytes(where.memory)} free: nothing is left"
            )
        return command(machine=where, **rest)

    decorated: Any = collected
    for option in reversed(_MACHINE):
        decorated = option(decorated)
    return cast(options.Command, decorated)


_MACHINE = [
    click.option("--gpu", type=GPUParam(), help="The GPU by name, such as 'RTX 4090': adds a verdict."),
    click.option("--vram", type=options.SIZE, help="Memory of the GPU, such as 24GiB, in place of its name."),
    click.option("--reserve", type=options.SIZE, help="Memory to keep free, such as 1GiB for a display."),
    click.option(
        "--tensor-parallel",
        type=click.IntRange(1, 1024),
        default=1,
        show_default=True,
        help="GPUs that share the model; the figures are those of each.",
    ),
    click.option(
        "--attention",
        type=click.Choice(["flash", "math"]),
        help="How attention is computed [default: flash where the GPU runs it].",
    ),
    click.option("--expandable-segments", is_flag=True, help="As PYTORCH_ALLOC_CONF sets the allocator."),
]


def workload(command: options.Command) -> options.Command:
    """Add the options of what is run to a command, which gets them as `workload`, its context to be set."""

    @wraps(command)
    def collected(
        batch: int, kv_bits: int | None, kv_group: int | None, prefill_chunk: int, **rest: Any
    ) -> Any:
        run = Workload(1, batch, kv_bits, kv_group or 0, prefill_chunk)
        return command(workload=run, **rest)

    decorated: Any = collected
    for option in (
        click.option(
            "--prefill-chunk",
            type=options.TOKENS,
            default=PREFILL_CHUNK,
            show_default=True,
            help="Tokens of the prompt that run at once.",
        ),
        click.option(
            "--batch", type=options.SEQUENCES, default=1, show_default=True, help="Sequences at once."
        ),
        click.option(
            "--kv-group", type=click.IntRange(1), help="Elements that share a KV scale [default: a head]."
        ),
        options.kv_bits,
    ):
        decorated = option(decorated)
    return cast(options.Command, decorated)


def overhead(platform: Platform) -> Overhead:
    """Return context and workspace as one, with the weaker of their statuses."""
    both = (platform.context, platform.workspace)
    return Overhead(
        sum(one.nbytes for one in both),
        min((one.status for one in both), key=_STATUSES.index),
        " + ".join(one.source for one in both),
    )


def attention(paths: Mapping[str, str]) -> str:
    """Return what computes attention: `flash`, `math`, or who of `paths` has which."""
    found: dict[str, list[str]] = {}
    for name, path in paths.items():
        found.setdefault(path, []).append(name)
    most = max(found, key=lambda path: len(found[path]))
    return "; ".join(
        [most, *(f"{path}: {', '.join(names)}" for path, names in found.items() if path != most)]
    )


def assumptions(where: Machine, rows: Sequence[Estimator]) -> dict[str, Any]:
    """Return what the figures hang on beside the model and the workload."""
    platform = rows[0].platform
    both = overhead(platform)
    found: dict[str, Any] = {
        "attention": attention({row.scheme.name: row.model.attention for row in rows}),
        "allocator": "expandable segments" if platform.expandable_segments else "default segments",
        "overhead": {"bytes": both.nbytes, "status": both.status, "source": both.source},
    }
    if where.gpu:
        gpu = where.gpu
        found |= {
            "gpu": gpu.name,
            "usable": f"{format_gib(gpu.usable_bytes)} GiB as {gpu.usable_is} reports it: {gpu.usable_source}",
            "bandwidth": f"{gpu.bandwidth_gb_s:,} GB/s: {gpu.bandwidth_source}",
            "ceiling": CEILING,
        }
    if where.memory is not None:
        found |= {
            "vram_bytes": where.memory,
            "reserve_bytes": where.reserve,
            "error_band": ERROR_BAND,
            "tight": TIGHT_MEANS,
        }
    return found


def stored_rows(subject: options.Subject, share: ModelConfig, where: Machine) -> list[Estimator]:
    """Return the row of weights as they lie in the file, for a quantized checkpoint and a GGUF.

    How a GGUF's blocks would be split over GPUs is not known, so that a share of it has none.
    """
    checkpoint = subject.checkpoint
    if checkpoint is None or not (checkpoint.schemes or subject.is_gguf):
        return []
    if where.gpus > 1 and subject.is_gguf:
        return []
    scheme = replace(SCHEMES[share.dtype], name=AS_STORED)
    stored = None if where.gpus > 1 else checkpoint.stored_bytes
    return [Estimator(share, scheme, checkpoint.schemes, stored, where.platform())]
