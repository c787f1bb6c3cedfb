"""What a benchmark on a GPU found beyond its kernels, as tables of texts, a header and rows each."""

from __future__ import annotations

from calculators.units import format_bytes, format_tokens
from quantkit.bench.cuda.results import BITSANDBYTES, CudaBench, Decode, Prefill
from quantkit.bench.tables import MISSING, Table

PLAIN = "bf16"
UNFINISHED = "The run was cut short: this is what there was."


def machine(found: CudaBench) -> list[tuple[str, str]]:
    """Return what the GPU is and can do, and how it was measured, as labelled facts."""
    here, limits, method = found.machine, found.limits, found.method
    ran = f"quantkit {here.quantkit}, torch {here.torch}, Triton {here.triton}, CUDA {here.cuda}"
    what = f"capability {here.capability}, {here.multiprocessors} multiprocessors"
    caches = f"{format_bytes(here.memory_bytes)}, L2 {format_bytes(here.l2_bytes)}"
    m, n, k = method.product
    return [
        ("GPU", f"{here.name}, {what}, {caches}"),
        ("runs", ", ".join([ran, *(f"{name} {version}" for name, version in here.peers.items())])),
        *here.settings.items(),
        (
            "copies",
            f"{limits.bytes_per_s / 1e9:,.0f} GB/s, read and written ({format_bytes(method.copy_bytes)})",
        ),
        ("reads", f"{limits.read_bytes_per_s / 1e9:,.0f} GB/s (torch's sum)"),
        ("multiplies", f"{limits.flops_per_s / 1e12:,.0f} TFLOP/s (torch, bfloat16, {m:,} x {n:,} x {k:,})"),
        ("compiling", f"{method.compile_s:.0f} s before anything was timed"),
    ]


def decodes(found: CudaBench) -> Table:
    """Return tokens/s of each decoding, its share of the bandwidth, and how it stands to bf16.

    Where bitsandbytes ran, its time for the blocks' matrices alone stands beside the whole step: by so much at least
    a step of its would be slower.
    """
    header = ["model", "scheme", "KV", "batch", "context", "tokens/s", "ms a step", "of bandwidth", "x bf16"]
    beside = any(BITSANDBYTES in run.matrices_seconds for run in found.decodes)
    header += [f"x {BITSANDBYTES}' matrices"] * beside
    plain = {_place(run): run for run in found.decodes if run.scheme == PLAIN}
    return header, [_decode(run, plain.get(_place(run)))[: len(header)] for run in found.decodes]


def _place(run: Decode) -> tuple[str, int, int]:
    return run.model, run.batch, run.context


def _decode(run: Decode, plain: Decode | None) -> list[str]:
    return [
        run.model,
        run.scheme,
        str(run.kv_bits),
        str(run.batch),
        format_tokens(run.context),
        f"{run.tokens_per_s:,.1f}",
        f"{1e3 * run.seconds:,.2f}",
        f"{run.roof_share:.0%}",
        _times(None if plain is None else plain.seconds, run.seconds),
        _times(run.matrices_seconds.get(BITSANDBYTES), run.seconds),
    ]


def _times(other: float | None, ours: float) -> str:
    return MISSING if other is None else f"{other / ours:.2f}"


def prefills(found: CudaBench) -> Table:
    """Return tokens/s of each prompt, and its share of what the GPU could do."""
    plain = {(run.model, run.tokens): run for run in found.prefills if run.scheme == PLAIN}
    rows = [_prefill(run, plain.get((run.model, run.tokens))) for run in found.prefills]
    return ["model", "scheme", "prompt", "tokens/s", "ms", "of roof", "x bf16"], rows


def _prefill(run: Prefill, plain: Prefill | None) -> list[str]:
    return [
        run.model,
        run.scheme,
        f"{run.tokens:,}",
        f"{run.tokens_per_s:,.0f}",
        f"{1e3 * run.seconds:,.2f}",
        f"{run.roof_share:.0%}",
        _times(None if plain is None else plain.seconds, run.seconds),
    ]


def repeats(found: CudaBench) -> Table:
    """Return what was run twice, and how often the bits were the same."""
    return ["run", "inputs", "equal"], [[one.what, str(one.runs), str(one.equal)] for one in found.repeats]


def failures(found: CudaBench) -> Table:
    """Return what is missing, and why."""
    return ["run", "reason"], [[one.what, one.reason] for one in found.failures]


def about_decodes(found: CudaBench) -> str:
    """Return what `decodes` holds, in a line."""
    about = (
        f"Whole models with random weights decode the last {found.decodes[0].steps} tokens of a context, all sequences "
        "together; the bandwidth is that of copies, for all weights and the cache"
    )
    if any(BITSANDBYTES in run.matrices_seconds for run in found.decodes):
        about += f"; the last column is {BITSANDBYTES}' time for the blocks' matrices alone over quantkit's whole step"
    return about


ABOUT_PREFILLS = "Whole models with random weights run a prompt"
ABOUT_REPEATS = "The same input twice, and whether the bits were the same"
ABOUT_FAILURES = "What did not run"
