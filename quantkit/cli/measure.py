"""`quantkit measure`: what runs really take of a GPU, or would by a trace, beside the estimate."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from calculators.units import format_bytes, format_gib, format_tokens
from quantkit.cli import options, page, remarks
from quantkit.cli.output import check, finish, keep
from quantkit.config import ModelConfig
from quantkit.presets import DEFAULT_PRESET

if TYPE_CHECKING:
    from quantkit.measure.cells import Cell
    from quantkit.measure.cuda import Measurement

OWN_PROCESSES = 10


@click.command("measure")
@click.argument("model", default=DEFAULT_PRESET)
@click.option("--scheme", "schemes", multiple=True, metavar="NAME", help="Repeatable [default: seven].")
@click.option(
    "--context", "contexts", type=options.TOKENS, multiple=True, help="Repeatable [default: 1k to 32k]."
)
@click.option(
    "--kv-bits", type=click.Choice(["16", "8", "4"]), multiple=True, help="Repeatable [default: all three]."
)
@click.option("--kv-group", type=click.IntRange(0), default=0, help="Elements that share a KV scale.")
@click.option("--batch", "batches", type=options.SEQUENCES, multiple=True, help="Repeatable [default: 1].")
@click.option(
    "--prefill-chunk", "chunks", type=options.TOKENS, multiple=True, help="Repeatable [default: 2048]."
)
@click.option("--grid", is_flag=True, help="All that the published records hold.")
@click.option("--quick", is_flag=True, help="A few cells, for a minute or two.")
@click.option(
    "--own-processes", type=click.IntRange(0), default=OWN_PROCESSES, show_default=True,
    help="Cells to repeat in processes of their own.",
)  # fmt: skip
@click.option("--attention", type=click.Choice(["flash", "math"]), default="flash", show_default=True)
@click.option("--trace", "traced", is_flag=True, help="Follow the same runs without a GPU.")
@click.option("--calibrate", is_flag=True, help="Keep what is learned of this GPU for `estimate` and `fit`.")
@click.option(
    "--verdicts", type=options.SIZE, multiple=True,
    help="Also try verdicts with only so much of the card left; repeatable.",
)  # fmt: skip
@click.option(
    "--events", type=click.Path(dir_okay=False, path_type=Path),
    help="Only save the allocator's events of small runs to this file, and hold the trace to them.",
)  # fmt: skip
@click.option("--output", "-o", type=click.Path(dir_okay=False, path_type=Path), help="Write a record.")
@click.option("--json", "as_json", is_flag=True, help="Print the record's body as JSON.")
@remarks.quiet
@options.examples(
    "measure --quick",
    "measure path/to/model --scheme nf4 --context 8k -o record.json",
    "measure --trace --scheme int4-g128 --context 4k --kv-bits 16",
)
def command(
    model: str,
    schemes: Sequence[str],
    contexts: Sequence[int],
    kv_bits: Sequence[str],
    kv_group: int,
    batches: Sequence[int],
    chunks: Sequence[int],
    grid: bool,
    quick: bool,
    own_processes: int,
    attention: str,
    traced: bool,
    calibrate: bool,
    verdicts: Sequence[options.Size],
    events: Path | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """Measure what MODEL takes of the first CUDA GPU, beside the estimate of the same.

    MODEL is a preset, which runs with random weights of its shapes, or a directory or .gguf file that is
    not quantized yet. Each precision runs in a fresh process.
    """
    from quantkit.errors import SchemeError
    from quantkit.measure import cells as grids

    if grid and quick:
        raise click.UsageError("--grid and --quick exclude each other: choose one")
    if (grid or quick) and (contexts or kv_bits or kv_group or batches or chunks):
        raise click.UsageError(
            "--grid and --quick have their own contexts, KV caches, batches and chunks: choose among them by "
            "--scheme alone, or leave out --grid and --quick"
        )
    if traced and (calibrate or verdicts or events):
        raise click.UsageError("--trace has no GPU to calibrate, to fill or to record: leave one out")
    for path in (output, events):
        check(path)
    subject = options.find_model(model)
    config = subject.config
    if subject.schemes:
        raise SchemeError(f"{config.name} is quantized already: measure the model that it was made from")
    if events:
        _events(config, schemes, events, as_json)
        return
    if grid or quick:
        chosen = grids.full_grid() if grid else grids.quick_grid()
        chosen = [cell for cell in chosen if not schemes or cell.scheme in schemes]
    else:
        bits = [int(one) for one in kv_bits] or list(grids.KV_BITS)
        chosen = grids.product_of(schemes, contexts, bits, batches, chunks, kv_group)
    if not chosen:
        raise SchemeError(f"none of {', '.join(schemes)} is in that grid: {', '.join(grids.SCHEMES)} are")
    grids.check(config, chosen)
    if traced:
        body = _trace(config, chosen, attention)
    else:
        every = [*chosen, *grids.repeats(chosen, own_processes)]
        memories = [size.nbytes for size in verdicts]
        body = _measure(config, _model_name(model, subject), every, attention, calibrate, memories, output)
    finish(output, "measure", body, as_json, lambda: _text(body))


def _model_name(model: str, subject: options.Subject) -> str:
    """Return what a worker opens: a preset's name, or the path of a checkpoint."""
    return str(subject.checkpoint.path) if subject.checkpoint else subject.config.name


def _measure(
    config: ModelConfig,
    model: str,
    cells: Sequence[Cell],
    attention: str,
    calibrate: bool,
    memories: Sequence[int],
    output: Path | None,
) -> dict[str, Any]:
    """Run every cell, and write what there is after each process: a long run may be cut short."""
    from quantkit.measure import cells as grids
    from quantkit.measure import cuda

    def body(found: Measurement) -> dict[str, Any]:
        made = _body(config, found.device, found.rows, found.failures)
        made["method"] = {
            "device_bytes": found.method,
            "weights": "random" if model == config.name else model,
            **_path(found.attention),
            "chunks": "all",
        }
        return made

    def save(part: Measurement) -> None:
        keep(output, "measure", body(part))

    with remarks.progress("measuring", len(cells)) as bar:
        found = cuda.measure(config, grids.jobs(model, cells, attention), bar.update, save=save)
    if calibrate:
        remarks.remark(f"calibration: {_calibrate(found)}")
    complete = body(found)
    if memories:
        schemes = list(dict.fromkeys(cell.scheme for cell in cells))
        known = cuda.platform(found.device)
        complete["verdicts"] = cuda.verdicts(config, model, schemes, memories, attention, known)
    return complete


def _trace(config: ModelConfig, cells: Sequence[Cell], attention: str) -> dict[str, Any]:
    from dataclasses import replace

    from calculators.hardware import ASSUMED_PLATFORM
    from quantkit.measure import cells as grids
    from quantkit.measure.trace import trace
    from quantkit.schemes import get_scheme

    platform = replace(ASSUMED_PLATFORM, attention=attention)
    rows = []
    with remarks.progress("tracing", len(cells)) as bar:
        for cell, beside in zip(cells, grids.estimated(config, cells, platform), strict=True):
            found = trace(config, get_scheme(cell.scheme), cell.workload, platform)
            rows.append(grids.joined(cell, grids.traced(found), beside))
            bar.update(1)
    body = _body(config, None, rows, [])
    body["method"] = {"device_bytes": "trace", "weights": "none", **_path(attention), "chunks": "all"}
    return body


def _path(attention: str) -> dict[str, Any]:
    """Return the code path that ran."""
    return {
        "backend": "reference",  # what the estimate describes, so what is traced and measured
        "attention": attention,
        "cuda_graphs": False,
        "expandable_segments": False,
    }


def _body(
    config: ModelConfig,
    device: dict[str, Any] | None,
    rows: list[dict[str, Any]],
    failures: list[dict[str, Any]],
) -> dict[str, Any]:
    return {
        "model": config.name,
        "parameters": config.parameters,
        "dtype": config.dtype,
        "device": device,
        "method": {},
        "cells": rows,
        "failures": failures,
    }


def _calibrate(found: Measurement) -> Path:
    """Keep what lay outside the allocator, and cuBLAS's workspace."""
    from datetime import UTC, datetime

    from calculators.hardware import find_gpu
    from quantkit.calibration import Calibration, save
    from quantkit.errors import RecordError
    from quantkit.measure.cuda import outside_bytes, platform

    if not found.rows:
        raise RecordError("no cell ran, so nothing was learned of this GPU: see the failures")
    device = found.device
    try:
        name = find_gpu(device["name"]).name
    except ValueError:
        name = device["name"]
    workspace = device.get("workspace_bytes") or platform(device).workspace.nbytes
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return save(
        name, Calibration(outside_bytes(found.rows), workspace, device["torch"], device["driver"], now)
    )


def _events(config: ModelConfig, schemes: Sequence[str], path: Path, as_json: bool) -> None:
    from quantkit.measure.events import record_small_runs
    from quantkit.records import write_text

    runs = record_small_runs(config, schemes or ("bf16", "int4-g128", "nf4-dq"))
    write_text(path, json.dumps(runs) + "\n")
    if as_json:
        found = [{"scheme": run["scheme"], "difference": run["difference"]} for run in runs["runs"]]
        click.echo(json.dumps({"events": str(path), "runs": found}, indent=1))
        return
    for found in runs["runs"]:
        click.echo(f"{found['scheme']}: {found['difference'] or 'the trace asks for the same'}")
    remarks.remark(f"events: {path}")


def _text(body: dict[str, Any]) -> str:
    device = body["device"]
    where = f"{device['name']}, driver {device['driver']}, torch {device['torch']}" if device else "a trace"
    parts = ["allocated_bytes", "reserved_bytes", *(["device_bytes"] if device else [])]
    header = ["scheme", "KV bits", "context", "batch", "chunk"]
    for part in parts:
        header += [part.removesuffix("_bytes"), "estimate", "error"]
    rows = []
    for row in body["cells"]:
        chunk = min(row["prefill_chunk"], row["context"])
        cells = [row["scheme"], str(row["kv_bits"]), format_tokens(row["context"]), str(row["batch"])]
        cells.append(format_tokens(chunk))
        for part in parts:
            real, guess = row["measured"][part], row["estimated"][part]
            cells += [format_gib(real), format_gib(guess), f"{guess / real - 1:+.2%}"]
        rows.append(cells)
    lines = [f"{body['model']} on {where}, in GiB", "", page.table(header, rows)]
    for failure in body["failures"]:
        lines.append(
            f"failed: {failure['scheme']} at {format_tokens(failure['context'])}: {failure['error']}"
        )
    for trial in body.get("verdicts", ()):
        said = "ran" if trial["ran"] else "did not run"
        memory = format_bytes(trial["memory_bytes"])
        lines.append(
            f"{memory}: {trial['scheme']} at {trial['context']:,} tokens, {trial['expected']}: {said}"
        )
    return "\n".join(lines)
