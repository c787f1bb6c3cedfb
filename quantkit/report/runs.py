"""What a report needs of a record, as checked values.

A record is JSON that may have been written by another version or by hand: keys that are missing or
of the wrong type are refused by name, keys that are not known here are kept where they can be shown
(assumptions, protocol) and ignored elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

from quantkit.bench.cuda.results import AnyBench
from quantkit.errors import RecordError
from quantkit.records import read_record
from quantkit.report.bench_run import read_bench
from quantkit.report.fields import Fields

QUANTITIES = ("allocated_bytes", "reserved_bytes", "device_bytes", "other_bytes")
COMPONENTS = ("weights", "kv_cache", "activations", "allocator", "overhead")


@dataclass(frozen=True)
class Source:
    """Where a run comes from: the record's file, its date (UTC), quantkit's version, the machine."""

    path: Path
    created: str
    quantkit: str
    environment: Mapping[str, Any]


@dataclass(frozen=True)
class Estimate:
    """The bytes of one scheme at one context."""

    scheme: str
    kv_bits: int
    context: int
    batch: int
    weights_bytes: int
    kv_cache_bytes: int
    activations_bytes: int
    allocator_bytes: int
    overhead_bytes: int
    total_bytes: int

    def component(self, name: str) -> int:
        """Return the bytes of one of COMPONENTS."""
        return int(getattr(self, f"{name}_bytes"))


@dataclass(frozen=True)
class Overhead:
    """What the driver and runtime take: assumed or measured, and by whom."""

    size_bytes: int
    status: str
    source: str


@dataclass(frozen=True)
class EstimateRun:
    """A record of kind `estimate`."""

    source: Source
    model: str
    parameters: int
    parameters_by_role: Mapping[str, int]
    runtime: str
    prefill_chunk: int
    kv_layout: str
    kv_bytes_per_token: int
    overhead: Overhead
    other_assumptions: Mapping[str, Any]
    estimates: tuple[Estimate, ...]

    @property
    def schemes(self) -> list[str]:
        """Names of the schemes, in the record's order."""
        return list(dict.fromkeys(estimate.scheme for estimate in self.estimates))

    @property
    def contexts(self) -> list[int]:
        """Contexts in tokens, ascending."""
        return sorted({estimate.context for estimate in self.estimates})

    @property
    def setting(self) -> str:
        """What the estimates share beside the model, in words; true of what `settings` yields."""
        first = self.estimates[0]
        chunk = f"prefill in chunks of {self.prefill_chunk} tokens"
        return f"batch {first.batch}, {first.kv_bits}-bit KV cache, {chunk}"

    def settings(self) -> Iterator[tuple[str, EstimateRun]]:
        """Yield the run split by KV bits and batch, each with a suffix for its files (empty for one)."""
        keys = list(dict.fromkeys((estimate.kv_bits, estimate.batch) for estimate in self.estimates))
        for kv_bits, batch in keys:
            chosen = tuple(e for e in self.estimates if (e.kv_bits, e.batch) == (kv_bits, batch))
            suffix = f"-kv{kv_bits}-batch{batch}" if len(keys) > 1 else ""
            yield suffix, replace(self, estimates=chosen)


@dataclass(frozen=True)
class Result:
    """The perplexity of one scheme; a standard error is None where one window gives none.

    That of the difference is of paired windows; records of 0.1.0's first days lack it.
    """

    scheme: str
    kv_bits: int
    perplexity: float
    nll: float
    standard_error: float | None
    tokens_scored: int
    weights_bytes: int
    tokens_per_second: float
    difference: float | None
    difference_standard_error: float | None = None

    @property
    def bar(self) -> float | None:
        """The error to draw: that of the difference where the windows were paired, else the perplexity's own."""
        return self.difference_standard_error or self.standard_error


@dataclass(frozen=True)
class PerplexityRun:
    """A record of kind `perplexity`; the first result is the original."""

    source: Source
    model: str
    parameters: int
    dtype: str
    text: str
    sha256: str
    window: int
    stride: int
    tokens_scored: int
    other_protocol: Mapping[str, Any]
    results: tuple[Result, ...]

    def label(self, result: Result) -> str:
        """Return the result's scheme, with its KV cache's bits where these differ between results."""
        varied = len({other.kv_bits for other in self.results}) > 1
        return f"{result.scheme}, KV {result.kv_bits}" if varied else result.scheme


@dataclass(frozen=True)
class MeasuredCell:
    """One run of a record of kind `measure`: bytes by name, measured (or traced) and estimated alike."""

    scheme: str
    kv_bits: int
    context: int
    batch: int
    prefill_chunk: int
    held_out: bool
    own_process: bool
    measured: Mapping[str, int]
    estimated: Mapping[str, int]

    def exact(self, quantity: str) -> bool:
        """Whether the estimate of a quantity is what was measured, to the byte."""
        return self.measured[quantity] == self.estimated[quantity]


@dataclass(frozen=True)
class MeasureRun:
    """A record of kind `measure`; `device` is empty where the runs were traced without a GPU."""

    source: Source
    model: str
    parameters: int
    device: Mapping[str, Any]
    method: Mapping[str, Any]
    cells: tuple[MeasuredCell, ...]
    failures: tuple[str, ...]

    @property
    def traced(self) -> bool:
        """Whether the runs were followed without a GPU: then nothing of them was measured."""
        return not self.device

    @property
    def where(self) -> str:
        """The device, its driver and PyTorch, in words."""
        if self.traced:
            return "traced, without a GPU"
        return f"{self.device['name']}, driver {self.device['driver']}, torch {self.device['torch']}"

    @property
    def quantities(self) -> tuple[str, ...]:
        """Which of QUANTITIES every cell has."""
        return tuple(name for name in QUANTITIES if all(name in cell.measured for cell in self.cells))


@dataclass(frozen=True)
class BenchRun:
    """A record of kind `bench`."""

    source: Source
    bench: AnyBench

    @property
    def model(self) -> str:
        """The model whose shapes the kernels had."""
        return self.bench.shapes


Run = EstimateRun | PerplexityRun | MeasureRun | BenchRun


def display_name(model: str) -> str:
    """Return the last part of a model's path or Hub name, for titles and files."""
    return PurePath(model).name or model


def read_run(path: Path) -> Run:
    """Read and check one record of any kind.

    Raises:
        RecordError: the file is no record, or its body lacks a key or has one of a wrong type.
    """
    record = read_record(path)
    header = Fields(path, "", record.__dict__)
    source = Source(path, header.text("created"), header.text("quantkit"), header.mapping("environment"))
    body = Fields(path, "body.", header.mapping("body"))
    if record.kind == "bench":
        return BenchRun(source, read_bench(body))
    if record.kind == "estimate":
        return _estimate_run(source, body)
    return _perplexity_run(source, body) if record.kind == "perplexity" else _measure_run(source, body)


def _estimate_run(source: Source, body: Fields) -> EstimateRun:
    assumptions = body.fields("assumptions")
    overhead = assumptions.fields("overhead")
    roles = body.fields("parameters_by_role")
    known = ("runtime", "prefill_chunk", "kv_layout", "kv_bytes_per_token", "overhead")
    estimates = tuple(_estimate(fields) for fields in body.rows("estimates"))
    keys = [(e.scheme, e.kv_bits, e.context, e.batch) for e in estimates]
    if len(set(keys)) < len(keys):
        raise RecordError(f"{source.path}: body.estimates holds one scheme, context and batch more than once")
    return EstimateRun(
        source=source,
        model=body.text("model"),
        parameters=body.integer("parameters"),
        parameters_by_role={role: roles.integer(role) for role in roles.value},
        runtime=assumptions.text("runtime"),
        prefill_chunk=assumptions.integer("prefill_chunk"),
        kv_layout=assumptions.text("kv_layout"),
        kv_bytes_per_token=assumptions.integer("kv_bytes_per_token"),
        overhead=Overhead(overhead.integer("bytes"), overhead.text("status"), overhead.text("source")),
        other_assumptions=assumptions.others(known),
        estimates=estimates,
    )


def _estimate(fields: Fields) -> Estimate:
    names = [name for name in Estimate.__dataclass_fields__ if name not in ("scheme", "allocator_bytes")]
    # the records of 0.1.0's first days did not know the allocator
    allocator = fields.integer("allocator_bytes") if "allocator_bytes" in fields.value else 0
    least = {"kv_bits": 1, "context": 1, "batch": 1}
    sizes = {name: fields.integer(name, least.get(name, 0)) for name in names}
    estimate = Estimate(fields.text("scheme"), allocator_bytes=allocator, **sizes)
    parts = sum(estimate.component(name) for name in COMPONENTS)
    if parts != estimate.total_bytes:
        raise RecordError(
            f"{fields.path}: {fields.where}total_bytes is {estimate.total_bytes}, but its parts add up to "
            f"{parts}"
        )
    return estimate


def _perplexity_run(source: Source, body: Fields) -> PerplexityRun:
    protocol = body.fields("protocol")
    known = ("text", "sha256", "window", "stride", "tokens_scored")
    window, tokens_scored = protocol.integer("window", least=2), protocol.integer("tokens_scored", least=1)
    single = tokens_scored < window
    results = tuple(_result(fields, single) for fields in body.rows("results"))
    keys = [(result.scheme, result.kv_bits) for result in results]
    if len(set(keys)) < len(keys):
        raise RecordError(f"{source.path}: body.results holds one scheme more than once")
    return PerplexityRun(
        source=source,
        model=body.text("model"),
        parameters=body.integer("parameters"),
        dtype=body.text("dtype"),
        text=protocol.text("text"),
        sha256=protocol.text("sha256"),
        window=window,
        stride=protocol.integer("stride", least=1),
        tokens_scored=tokens_scored,
        other_protocol=protocol.others(known),
        results=results,
    )


def _result(fields: Fields, single: bool) -> Result:
    """Return a result; a single window leaves its errors open, which records of 0.1.0's first days give as 0."""
    error = fields.number_or_none("standard_error", least=0)
    paired = "difference_standard_error"
    difference_error = fields.number_or_none(paired, least=0) if paired in fields.value else None
    return Result(
        scheme=fields.text("scheme"),
        kv_bits=fields.integer("kv_bits", least=1),
        perplexity=fields.positive("perplexity"),
        nll=fields.number("nll"),
        standard_error=None if single else error,
        tokens_scored=fields.integer("tokens_scored"),
        weights_bytes=fields.integer("weights_bytes", least=1),
        tokens_per_second=fields.number("tokens_per_second"),
        difference=fields.number_or_none("difference"),
        difference_standard_error=None if single else difference_error,
    )


def _measure_run(source: Source, body: Fields) -> MeasureRun:
    device = body.get("device")
    if device is not None:
        fields = body.fields("device")
        device = {**fields.value, **{key: fields.text(key) for key in ("name", "driver", "torch")}}
    cells = tuple(_measured_cell(fields) for fields in body.rows("cells"))
    return MeasureRun(
        source=source,
        model=body.text("model"),
        parameters=body.integer("parameters"),
        device=device or {},
        method=body.mapping("method"),
        cells=cells,
        failures=tuple(_failure(fields) for fields in body.rows("failures")) if body.get("failures") else (),
    )


def _measured_cell(fields: Fields) -> MeasuredCell:
    measured, estimated = fields.fields("measured"), fields.fields("estimated")
    return MeasuredCell(
        scheme=fields.text("scheme"),
        kv_bits=fields.integer("kv_bits", least=1),
        context=fields.integer("context", least=1),
        batch=fields.integer("batch", least=1),
        prefill_chunk=fields.integer("prefill_chunk", least=1),
        held_out=bool(fields.get("held_out")),
        own_process=bool(fields.get("own_process")),
        measured={name: measured.integer(name, least=1) for name in measured.value},
        estimated={name: estimated.integer(name, least=1) for name in measured.value},
    )


def _failure(fields: Fields) -> str:
    size = f"{fields.integer('context'):,} tokens, batch {fields.integer('batch')}"
    return f"{fields.text('scheme')}, {size}, KV {fields.integer('kv_bits')} bits: {fields.text('error')}"
