"""The body of a record of kind `bench` from a GPU, read with checks into the classes that it was written from."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from quantkit.bench.cuda.results import CudaBench, CudaLimits, Decode, Failure, Gpu, Method, Prefill, Repeat
from quantkit.bench.results import Cell
from quantkit.errors import RecordError
from quantkit.report.fields import Fields

Value = TypeVar("Value")


def read_cuda_bench(body: Fields, read_cell: Callable[[Fields], Cell]) -> CudaBench:
    """Return the benchmark in a record's body.

    Raises:
        RecordError: it lacks a key, or has one of a wrong type or sign.
    """
    limits = body.fields("limits")
    return CudaBench(
        device=body.text("device"),
        quick=bool(body.get("quick")),
        finished=bool(body.get("finished")),
        machine=_gpu(body.fields("machine")),
        limits=CudaLimits(**{name: limits.positive(name) for name in CudaLimits.__dataclass_fields__}),
        method=_method(body.fields("method")),
        shapes=body.text("shapes"),
        cells=_all(body, "cells", read_cell),
        prefills=_all(body, "prefills", _prefill),
        decodes=_all(body, "decodes", _decode),
        repeats=_all(body, "repeats", _repeat),
        failures=_all(body, "failures", lambda one: Failure(one.text("what"), one.text("reason"))),
    )


def _all(body: Fields, key: str, read: Callable[[Fields], Value]) -> tuple[Value, ...]:
    return tuple(read(one) for one in body.rows(key)) if body.get(key) else ()


def _gpu(gpu: Fields) -> Gpu:
    texts = ("name", "capability", "tuning", "cuda", "torch", "triton", "quantkit", "backend")
    counts = ("multiprocessors", "l2_bytes", "memory_bytes")
    peers, settings = gpu.fields("peers"), gpu.fields("settings")
    return Gpu(
        **{name: gpu.text(name) for name in texts},  # type: ignore[arg-type]
        **{name: gpu.integer(name, least=1) for name in counts},  # type: ignore[arg-type]
        peers={name: peers.text(name) for name in peers.value},
        settings={name: settings.text(name) for name in settings.value},
    )


def _method(method: Fields) -> Method:
    counts = [name for name in Method.__dataclass_fields__ if name not in ("product", "compile_s")]
    product = method.get("product")
    if not isinstance(product, list) or [type(side) for side in product] != [int] * 3:
        raise RecordError(f"{method.path}: {method.where}product is {product!r}; it must be M, N and K")
    m, n, k = product
    return Method(
        **{name: method.integer(name) for name in counts},
        product=(m, n, k),
        compile_s=method.number("compile_s"),
    )


def _prefill(run: Fields) -> Prefill:
    return Prefill(
        model=run.text("model"),
        scheme=run.text("scheme"),
        **{name: run.integer(name, least=1) for name in ("tokens", "rounds", "flops")},
        seconds=run.positive("seconds"),
        roof_share=run.positive("roof_share"),
    )


def _decode(run: Fields) -> Decode:
    counts = ("kv_bits", "batch", "context", "steps", "rounds", "weights_bytes", "step_bytes")
    sums = run.fields("matrices_seconds")
    return Decode(
        model=run.text("model"),
        scheme=run.text("scheme"),
        **{name: run.integer(name, least=1) for name in counts},
        seconds=run.positive("seconds"),
        roof_share=run.positive("roof_share"),
        matrices_seconds={name: sums.positive(name) for name in sums.value},
    )


def _repeat(repeat: Fields) -> Repeat:
    return Repeat(repeat.text("what"), repeat.integer("runs"), repeat.integer("equal"))
