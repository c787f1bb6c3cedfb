"""A record of kind `bench`, read with checks into the classes that it was written from."""

from __future__ import annotations

from quantkit.bench.cuda.results import AnyBench
from quantkit.bench.results import BF16, OURS, Bench, Cell, Limits, Machine, ModelRun, Peer, Reader
from quantkit.report.cuda_bench_run import read_cuda_bench
from quantkit.report.fields import Fields


def read_bench(body: Fields) -> AnyBench:
    """Return the benchmark in a record's body.

    Raises:
        RecordError: it lacks a key, or has one of a wrong type or sign.
    """
    if body.value.get("device") == "cuda":
        return read_cuda_bench(body, _cell)
    machine, limits = body.fields("machine"), body.fields("limits")
    texts = {name: machine.text(name) for name in ("cpu", "isa", "torch", "quantkit")}
    counts = {
        name: machine.integer(name, least=1) for name in ("cores", "threads", "cache_bytes", "memory_bytes")
    }
    readers = tuple(
        Reader(reader.text("name"), reader.text("pages"), reader.positive("bytes_per_s"))
        for reader in limits.rows("readers")
    )
    return Bench(
        quick=bool(body.get("quick")),
        machine=Machine(**texts, **counts),  # type: ignore[arg-type]
        limits=Limits(readers, limits.positive("flops_per_s")),
        shapes=body.text("shapes"),
        cells=tuple(_cell(cell) for cell in body.rows("cells")) if body.get("cells") else (),
        models=tuple(_model(model) for model in body.rows("models")) if body.get("models") else (),
    )


def _cell(cell: Fields) -> Cell:
    seconds, speedups, shares = cell.fields("seconds"), cell.fields("speedups"), cell.fields("roof_shares")
    for name in (OURS, BF16):
        seconds.positive(name)
    speedups.positive(BF16)
    return Cell(
        scheme=cell.text("scheme"),
        matrix=cell.text("matrix"),
        n=cell.integer("n", least=1),
        k=cell.integer("k", least=1),
        m=cell.integer("m", least=1),
        weight_bytes=cell.integer("weight_bytes", least=1),
        rounds=cell.integer("rounds", least=1),
        seconds={name: seconds.positive(name) for name in seconds.value},
        speedups={name: speedups.positive(name) for name in speedups.value},
        roof_shares={name: shares.positive(name) for name in (OURS, BF16)},
    )


def _model(run: Fields) -> ModelRun:
    counts = ("prompt_tokens", "decode_tokens", "rounds", "weights_bytes", "token_bytes")
    return ModelRun(
        model=run.text("model"),
        scheme=run.text("scheme"),
        **{name: run.integer(name, least=1) for name in counts},
        prefill_tokens_per_s=run.positive("prefill_tokens_per_s"),
        decode_tokens_per_s=run.positive("decode_tokens_per_s"),
        read_share=run.positive("read_share"),
        peer=None if run.get("peer") is None else _peer(run.fields("peer")),
    )


def _peer(peer: Fields) -> Peer:
    return Peer(
        name=peer.text("name"),
        file_type=peer.text("file_type"),
        weights_bytes=peer.integer("weights_bytes", least=1),
        prefill_tokens_per_s=peer.positive("prefill_tokens_per_s"),
        decode_tokens_per_s=peer.positive("decode_tokens_per_s"),
        prefill_speedup=peer.positive("prefill_speedup"),
        decode_speedup=peer.positive("decode_speedup"),
    )
