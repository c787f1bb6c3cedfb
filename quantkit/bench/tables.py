"""What a benchmark found as tables of texts, a header and rows each: the command and reports print the same."""

from __future__ import annotations

from calculators.units import format_bytes
from quantkit.bench.cuda.results import AnyBench
from quantkit.bench.results import OURS, Bench, Layer, ModelRun, Words, bf16_layers, layers

Table = tuple[list[str], list[list[str]]]

MISSING = "–"
QUICK = "A quick run, to see that everything works: its figures mean nothing."


def machine(found: Bench) -> list[tuple[str, str]]:
    """Return what the machine is and can do, as labelled facts."""
    here, best = found.machine, found.limits.readers[0]
    return [
        ("machine", f"{here.cpu}, {here.cores} cores, {format_bytes(here.memory_bytes)}"),
        ("runs", f"quantkit {here.quantkit} with {here.isa}, torch {here.torch}, {here.threads} threads"),
        ("reads", f"{best.bytes_per_s / 1e9:.1f} GB/s ({best.name}, {best.pages} pages)"),
        ("multiplies", f"{found.limits.flops_per_s / 1e9:,.0f} GFLOP/s (torch, bfloat16)"),
    ]


def kernels(found: AnyBench) -> Table:
    """Return one layer's matrices at each M: quantkit's time, and how many times as fast as each other it is."""
    sums = layers(found.cells)
    others = list(dict.fromkeys(name for layer in sums for name in layer.speedups))
    words = found.words
    header = ["scheme", "rows", words.time, words.rate, "of roof", *(f"x {name}" for name in others)]
    return header, [_kernel(layer, others, words) for layer in [*bf16_layers(found.cells), *sums]]


def _kernel(layer: Layer, others: list[str], words: Words) -> list[str]:
    speedups = [f"{layer.speedups[name]:.2f}" if name in layer.speedups else MISSING for name in others]
    return [
        layer.name,
        str(layer.m),
        f"{words.times * layer.seconds:,.2f}",
        f"{layer.flops_per_s / words.rates:,.0f}",
        f"{layer.roof_share:.0%}",
        *speedups,
    ]


def shares(found: AnyBench) -> Table:
    """Return each scheme's share of the bandwidth at one row, matrix by matrix."""
    known = {(cell.scheme, cell.matrix): cell.roof_shares[OURS] for cell in found.cells if cell.m == 1}
    names = list(dict.fromkeys(name for _, name in known))
    rows = [
        [scheme, *(f"{known[scheme, name]:.0%}" if (scheme, name) in known else MISSING for name in names)]
        for scheme in dict.fromkeys(scheme for scheme, _ in known)
    ]
    return ["scheme", *names], rows


def models(found: Bench) -> Table:
    """Return tokens/s of each whole model, and of another program beside it where there was one."""
    header = ["model", "scheme", "decode", "of bandwidth", "prefill"]
    if any(run.peer for run in found.models):
        header += ["beside", "its decode", "x decode", "its prefill", "x prefill"]
    return header, [(_model(run) + [MISSING] * 5)[: len(header)] for run in found.models]


def _model(run: ModelRun) -> list[str]:
    row = [run.model, run.scheme, f"{run.decode_tokens_per_s:,.2f}", f"{run.read_share:.0%}"]
    row.append(f"{run.prefill_tokens_per_s:,.1f}")
    if run.peer:
        row += [run.peer.file_type, f"{run.peer.decode_tokens_per_s:,.2f}", f"{run.peer.decode_speedup:.2f}"]
        row += [f"{run.peer.prefill_tokens_per_s:,.1f}", f"{run.peer.prefill_speedup:.2f}"]
    return row


def about_kernels(found: AnyBench) -> str:
    """Return what `kernels` holds, in a line."""
    return (
        f"All matrices of one layer of {found.shapes}; x is how many times as fast as the other quantkit is"
    )


def about_models(found: Bench) -> str:
    """Return what `models` holds, in a line."""
    first, peers = found.models[0], [run.peer for run in found.models if run.peer]
    about = (
        f"Whole models with random weights, in tokens/s: {first.decode_tokens} tokens one by one after a prompt of "
        f"{first.prompt_tokens}"
    )
    if not peers:
        return f"{about}; without llama.cpp, which --llama names"
    return (
        f"{about}; beside it {peers[0].name} at equal bits, the head's included, but for a tied one, which is "
        "bfloat16 here"
    )
