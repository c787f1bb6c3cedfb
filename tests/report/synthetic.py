"""Records as `quantkit estimate` and `quantkit eval` write them, with Mistral-7B's sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantkit.records import Record, write_record

WEIGHTS = {  # Mistral-7B; nf4 and int4-g32 coincide, nf4-dq and int4-g128 nearly
    "bf16": 14_483_464_192,
    "int8": 7_506_894_848,
    "int4-g128": 4_123_533_312,
    "int4-g64": 4_232_585_216,
    "int4-g32": 4_450_689_024,
    "nf4": 4_450_689_024,
    "nf4-dq": 4_125_238_144,
}
CONTEXTS = [1024, 2048, 4096, 8192, 16384, 32768]
PERPLEXITIES = {
    "fp32": (4.42, 0.050),
    "int8": (4.421, 0.050),
    "nf4": (5.0, 0.055),
    "nf4-dq": (4.99, 0.055),
    "int4-g32": (4.95, 0.054),
    "int4-g64": (4.98, 0.055),
    "int4-g128": (5.03, 0.055),
}
OVERHEAD = 569_000_000
ALLOCATOR = 111_000_000


def estimate(scheme: str, context: int, weights: int, kv_bits: int = 16, batch: int = 1) -> dict[str, Any]:
    kv_cache = 131_072 * context * batch * kv_bits // 16
    activations = 400_000_000 + 1000 * context
    return {
        "scheme": scheme,
        "kv_bits": kv_bits,
        "context": context,
        "batch": batch,
        "weights_bytes": weights,
        "kv_cache_bytes": kv_cache,
        "activations_bytes": activations,
        "allocator_bytes": ALLOCATOR,
        "overhead_bytes": OVERHEAD,
        "total_bytes": weights + kv_cache + activations + ALLOCATOR + OVERHEAD,
        "fits": True,  # a key the report does not know
    }


def estimate_body(model: str = "mistral-7b-instruct-v0.2", **shape: Any) -> dict[str, Any]:
    return {
        "model": model,
        "parameters": 7_241_732_096,
        "parameters_by_role": {"attention": 1_342_177_280, "ffn": 5_637_144_576},
        "assumptions": {
            "runtime": "quantkit's own",
            "prefill_chunk": 2048,
            "kv_layout": "contiguous",
            "kv_bytes_per_token": 131_072,
            "overhead": {"bytes": OVERHEAD, "status": "assumed", "source": "a typical driver's context"},
            "allocator": "expandable | segments",
        },
        "estimates": [estimate(s, c, w, **shape) for s, w in WEIGHTS.items() for c in CONTEXTS],
    }


def perplexity_body(model: str = "mistralai/Mistral-7B-Instruct-v0.2") -> dict[str, Any]:
    results = [
        {
            "scheme": scheme,
            "kv_bits": 32,
            "perplexity": perplexity,
            "nll": math.log(perplexity),
            "standard_error": error,
            "tokens_scored": 131_072,
            "weights_bytes": WEIGHTS.get(scheme, 2 * WEIGHTS["bf16"]),
            "tokens_per_second": 1234.56,
            "difference": perplexity - 4.42,
            "difference_standard_error": 0.0 if scheme == "fp32" else error / 10,
        }
        for scheme, (perplexity, error) in PERPLEXITIES.items()
    ]
    protocol = {
        "text": "The Python language reference",
        "sha256": "ab" * 32,
        "window": 2048,
        "stride": 2048,
        "bos": True,
        "tokens_scored": 131_072,
        "tail": "dropped",
    }
    parameters = 7_241_732_096
    return {
        "model": model,
        "parameters": parameters,
        "protocol": protocol,
        "dtype": "fp32",
        "results": results,
    }


DEVICE = {"name": "NVIDIA H200", "driver": "580.1", "torch": "2.11.0"}


def cell(scheme: str, context: int, measured: int, estimated: int, **fields: Any) -> dict[str, Any]:
    """Return a measured cell with the same two figures for every quantity."""
    quantities = ("allocated_bytes", "reserved_bytes", "device_bytes", "other_bytes")
    return {
        "scheme": scheme,
        "kv_bits": 16,
        "kv_group": 0,
        "context": context,
        "batch": 1,
        "prefill_chunk": 2048,
        "held_out": context & (context - 1) != 0,
        "own_process": False,
        "measured": dict.fromkeys(quantities, measured),
        "estimated": dict.fromkeys(quantities, estimated),
        **fields,
    }


def measure_body(cells: list[dict[str, Any]], device: dict[str, Any] | None = DEVICE) -> dict[str, Any]:
    return {
        "model": "mistral-7b-instruct-v0.2",
        "parameters": 7_241_732_096,
        "device": device,
        "method": {
            "device_bytes": "nvml" if device else "trace",
            "backend": "reference",
            "attention": "flash",
        },
        "cells": cells,
        "failures": [],
    }


MATRICES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
BITS = {"int8": 8.004, "int4-g128": 4.125, "nf4": 4.5, "nf4-dq": 4.127}
READS, MULTIPLIES = 42e9, 900e9  # bytes and operations a second


def bench_cell(
    scheme: str, matrix: str, m: int, bandwidth: float = READS, flops: float = MULTIPLIES
) -> dict[str, Any]:
    """Return a cell that reaches 90% of what the machine could, beside a torch that reaches 80%."""
    n, k = MATRICES[matrix]
    weight_bytes = round(n * k * BITS[scheme] / 8)
    ours = max(weight_bytes / bandwidth, 2 * m * n * k / flops) / 0.9
    torch = max(2 * n * k / bandwidth, 2 * m * n * k / flops) / 0.8
    seconds = {"quantkit": ours, "torch bf16": torch, "reference": 3 * torch}
    if scheme.startswith("nf4"):
        seconds["bitsandbytes"] = 1.2 * ours
    return {
        "scheme": scheme,
        "matrix": matrix,
        "n": n,
        "k": k,
        "m": m,
        "weight_bytes": weight_bytes,
        "rounds": 7,
        "seconds": seconds,
        "speedups": {name: taken / ours for name, taken in seconds.items() if name != "quantkit"},
        "roof_shares": {"quantkit": 0.9, "torch bf16": 0.8},
    }


def bench_body(rows: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)) -> dict[str, Any]:
    peer = {
        "name": "llama.cpp (llama-cpp-python 0.3.36)",
        "file_type": "Q4_0",
        "weights_bytes": 4_073_000_000,
        "prefill_tokens_per_s": 31.0,
        "decode_tokens_per_s": 9.3,
        "prefill_speedup": 1.61,
        "decode_speedup": 1.02,
    }
    model = {
        "model": "mistral-7b-instruct-v0.2",
        "prompt_tokens": 512,
        "decode_tokens": 32,
        "rounds": 5,
        "weights_bytes": 4_123_533_312,
        "token_bytes": 3_861_389_312,
        "prefill_tokens_per_s": 50.0,
        "decode_tokens_per_s": 9.5,
        "read_share": 0.87,
    }
    return {
        "quick": False,
        "machine": {
            "cpu": "AMD EPYC 9575F",
            "cores": 2,
            "threads": 2,
            "isa": "avx512bf16",
            "cache_bytes": 32 << 20,
            "memory_bytes": 24 << 30,
            "torch": "2.13.0+cpu",
            "quantkit": "0.1.0",
        },
        "limits": {
            "readers": [
                {"name": "streams-4", "pages": "huge", "bytes_per_s": READS},
                {"name": "plain", "pages": "4K", "bytes_per_s": 0.9 * READS},
            ],
            "flops_per_s": MULTIPLIES,
        },
        "shapes": "mistral-7b-instruct-v0.2",
        "cells": [bench_cell(scheme, matrix, m) for scheme in BITS for matrix in MATRICES for m in rows],
        "models": [{**model, "scheme": "int4-g128", "peer": peer}, {**model, "scheme": "nf4", "peer": None}],
    }


COPIES, CUDA_MULTIPLIES = 4.2e12, 7.1e14


def cuda_bench_body(rows: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)) -> dict[str, Any]:
    """Return a GPU's benchmark with cells as `bench_cell` makes them, two decodings and a prompt in two schemes."""
    rates = {"bandwidth": COPIES, "flops": CUDA_MULTIPLIES}
    model = {"model": "mistral-7b-instruct-v0.2", "rounds": 3, "roof_share": 0.8}
    decode = {
        **model, "kv_bits": 16, "batch": 1, "context": 1024, "steps": 32, "weights_bytes": 4_123_533_312,
        "step_bytes": 4_000_000_000, "seconds": 1.25e-3, "matrices_seconds": {"quantkit": 1e-3, "bitsandbytes": 5e-3},
    }  # fmt: skip
    prefill = {**model, "tokens": 2048, "flops": 30_000_000_000_000}
    return {
        "device": "cuda",
        "quick": False,
        "finished": True,
        "machine": {
            "name": "NVIDIA H200", "capability": "9.0", "tuning": "Tuning(640)", "multiprocessors": 132,
            "l2_bytes": 60 << 20, "memory_bytes": 150_000_000_000, "cuda": "12.9", "torch": "2.11.0", "triton": "3.6.0",
            "quantkit": "0.1.0", "backend": "triton", "peers": {"bitsandbytes": "0.50.2"},
            "settings": {"driver": "580.1"},
        },
        "limits": {"bytes_per_s": COPIES, "read_bytes_per_s": 4.4e12, "flops_per_s": CUDA_MULTIPLIES},
        "method": {
            "seed": 0, "rounds": 9, "away_bytes": 240 << 20, "passes": 4, "short_rows": 64, "copy_bytes": 8 << 30,
            "product": [8192, 8192, 8192], "decode_rounds": 3, "prefill_rounds": 5, "compile_s": 31.0,
        },
        "shapes": "mistral-7b-instruct-v0.2",
        "cells": [bench_cell(scheme, matrix, m, **rates) for scheme in BITS for matrix in MATRICES for m in rows],
        "prefills": [
            {**prefill, "scheme": "bf16", "seconds": 0.05},
            {**prefill, "scheme": "nf4", "seconds": 0.04},
        ],
        "decodes": [
            {**decode, "scheme": "bf16", "seconds": 4e-3, "matrices_seconds": {}},
            {**decode, "scheme": "nf4"},
        ],
        "repeats": [{"what": "nf4, kernels", "runs": 40, "equal": 40}],
        "failures": [{"what": "int8, o, torch int8pack", "reason": "RuntimeError: no kernel"}],
    }  # fmt: skip


def record(folder: Path, kind: str, body: Any, name: str | None = None) -> Path:
    path = folder / f"{name or kind}.json"
    environment = {"python": "3.12.1", "machine": "x86_64", "cpus": "2"}
    write_record(path, Record(kind, body, "2025-01-02T03:04:05+00:00", "0.1.0", environment))
    return path
