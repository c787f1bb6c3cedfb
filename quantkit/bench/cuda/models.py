"""Whole models with random weights on a GPU: prompts, and greedy decoding of B sequences at some context.

Nothing is synchronized while tokens are decoded: the argmax of one step's logits is the next step's input, and stays
on the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import torch

from calculators.units import format_bytes, format_tokens
from quantkit.bench.cuda.device import Device, Place, Run
from quantkit.bench.cuda.kernels import reason
from quantkit.bench.cuda.results import Decode, Failure, Finding, Gpu, Prefill, Repeat
from quantkit.bench.random_weights import RandomCheckpoint, random_bytes
from quantkit.bench.results import Cell, whole_layers
from quantkit.bench.shapes import token_bytes
from quantkit.config import ModelConfig
from quantkit.estimate import Estimator, Workload
from quantkit.measure.cuda import platform
from quantkit.models.decoder import Decoder
from quantkit.models.kv_cache import KVCache
from quantkit.models.loader import load
from quantkit.schemes import QuantScheme, get_scheme

PLAIN = "bf16"
STEPS, QUICK_STEPS = 32, 3
_QUANTIZED_CACHES = "int4-g128"  # the scheme that also runs with caches of 8 and 4 bits


@dataclass(frozen=True)
class Setting:
    """One decoding: B sequences up to a context, with a cache of some bits."""

    batch: int
    context: int
    kv_bits: int = 16

    def describe(self, scheme: str) -> str:
        """Return the setting in a few words."""
        size = f"batch {self.batch}, {format_tokens(self.context)} tokens"
        return f"{scheme}, {size}, KV {self.kv_bits} bits"


@dataclass(frozen=True)
class Grid:
    """What every model runs: prompts of these tokens, decoding of these settings."""

    prompts: tuple[int, ...]
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    steps: int

    def settings(self, scheme: QuantScheme) -> list[Setting]:
        """Return the decodings of one scheme."""
        found = [Setting(batch, context) for context in self.contexts for batch in self.batches]
        if scheme.name == _QUANTIZED_CACHES:
            found += [Setting(1, max(self.contexts), kv_bits) for kv_bits in (8, 4)]
        return found


GRID = Grid((512, 2048), (1, 4, 16, 64), (1024, 8192, 32768), STEPS)
QUICK_GRID = Grid((64,), (1, 4), (256,), QUICK_STEPS)


def with_plain(schemes: Sequence[QuantScheme]) -> list[QuantScheme]:
    """Return the schemes after bf16, which whole models are compared with."""
    return [get_scheme(PLAIN), *schemes]


def jobs(
    config: ModelConfig, schemes: Sequence[QuantScheme], grid: Grid, device: Device, gpu: Gpu
) -> list[Run]:
    """Return what launches every kernel of `measure` once, by models of one layer: a job for each scheme."""
    return [
        partial(_touch, config, scheme, grid, str(device.torch_device), device.backend, gpu)
        for scheme in with_plain(schemes)
    ]


def _touch(config: ModelConfig, scheme: QuantScheme, grid: Grid, device: str, backend: str, gpu: Gpu) -> None:
    decoder = _load(replace(config, n_layers=1), scheme, torch.device(device), backend)
    for tokens in grid.prompts:
        _prefill(decoder, tokens)()
    for setting in grid.settings(scheme):
        if _lacks_room(Estimator(config, scheme, platform=platform(_named(gpu))), setting, gpu) is None:
            _Sequences(decoder, setting, 1).run()


def measure(
    config: ModelConfig,
    scheme: QuantScheme,
    grid: Grid,
    place: Place,
    cells: Sequence[Cell],
) -> Iterator[Finding]:
    """Yield every prompt and decoding of one model at one precision, and what did not run.

    Args:
        config: the model's shapes.
        scheme: of its blocks' matrices.
        grid: what is run.
        place: where and how.
        cells: of the kernels, for the sums of their times.
    """
    device, gpu = place.device, place.gpu
    try:
        decoder = _load(config, scheme, device.torch_device, device.backend)
    except Exception as error:  # the other precisions are measured all the same
        yield Failure(f"{config.name}, {scheme.name}", reason(error))
        return
    estimator = Estimator(config, scheme, platform=platform(_named(gpu)))
    for tokens in grid.prompts:
        try:
            yield _measure_prefill(decoder, scheme, tokens, place)
        except Exception as error:  # likewise
            yield Failure(f"{config.name}, {scheme.name}, a prompt of {tokens:,} tokens", reason(error))
    equal: list[bool] = []
    for setting in grid.settings(scheme):
        lacking = _lacks_room(estimator, setting, gpu)
        if lacking is not None:
            yield Failure(f"{config.name}, {setting.describe(scheme.name)}", lacking)
            continue
        try:
            sums = matrices_seconds(cells, scheme.name, setting.batch, config.n_layers)
            run, same = _measure_decode(decoder, scheme, setting, grid.steps, place, sums)
            equal.append(same)
            yield run
        except Exception as error:  # likewise
            yield Failure(f"{config.name}, {setting.describe(scheme.name)}", reason(error))
        device.release()
    yield Repeat(f"{config.name}, {scheme.name}, decoding", len(equal), sum(equal))


def matrices_seconds(cells: Sequence[Cell], scheme: str, rows: int, layers: int) -> dict[str, float]:
    """Return what each contender takes for the matrices of all layers, those that have every matrix of a layer."""
    for group in whole_layers(cells):
        if (group[0].scheme, group[0].m) == (scheme, rows):
            names = [name for name in group[0].seconds if all(name in cell.seconds for cell in group)]
            return {name: layers * sum(cell.seconds[name] for cell in group) for name in names}
    return {}


def _named(gpu: Gpu) -> dict[str, str]:
    return {"name": gpu.name, "torch": gpu.torch}


def _load(config: ModelConfig, scheme: QuantScheme, device: torch.device, backend: str) -> Decoder:
    return load(RandomCheckpoint(config, scheme, device), dtype="bf16", device=device, backend=backend)


def _lacks_room(estimator: Estimator, setting: Setting, gpu: Gpu) -> str | None:
    """Return why a setting does not fit, None where it does, by the estimate of decoding alone."""
    workload = Workload(setting.context, setting.batch, setting.kv_bits, prefill_chunk=1)
    need = estimator.estimate(workload).total_bytes
    if need <= gpu.memory_bytes:
        return None
    return f"needs {format_bytes(need)} by the estimate, and the GPU has {format_bytes(gpu.memory_bytes)}"


def _prefill(decoder: Decoder, tokens: int) -> Run:
    ids = torch.randint(decoder.config.vocab_size, (1, tokens), device=decoder.device)
    cache = decoder.new_cache(1, tokens)

    def run() -> None:
        cache.length = 0
        decoder.prefill(ids, cache)

    return run


def _measure_prefill(decoder: Decoder, scheme: QuantScheme, tokens: int, place: Place) -> Prefill:
    limits, rounds = place.limits, place.method.prefill_rounds
    times = place.device.alternate({"prefill": _prefill(decoder, tokens)}, rounds)
    seconds, flops = median(times["prefill"]), prefill_flops(decoder.config, tokens)
    read = token_bytes(decoder.config, decoder.weights_bytes)
    least = max(flops / limits.flops_per_s, read / limits.bytes_per_s)
    return Prefill(
        model=decoder.config.name,
        scheme=scheme.name,
        tokens=tokens,
        rounds=rounds,
        flops=flops,
        seconds=seconds,
        roof_share=least / seconds,
    )


def prefill_flops(config: ModelConfig, tokens: int) -> int:
    """Return multiplications and additions of one prompt: matrices, causal attention, one token's head."""
    matrices = sum(spec.elements for spec in config.tensors if spec.is_block_linear)
    pairs = tokens * (tokens + 1) // 2
    attention = 2 * config.n_layers * config.n_heads * config.head_dim * pairs  # scores, and their values
    return 2 * (matrices * tokens + attention + config.vocab_size * config.hidden_size)


class _Sequences:
    """Sequences whose cache seems to hold all but the last `steps` tokens of a context; `run` decodes these."""

    def __init__(self, decoder: Decoder, setting: Setting, steps: int) -> None:
        self._decoder, self._steps = decoder, steps
        self._start = setting.context - steps
        self.cache = decoder.new_cache(setting.batch, setting.context, setting.kv_bits)
        fill(self.cache)
        self._first = torch.arange(1, setting.batch + 1, device=decoder.device)[:, None]  # (B, 1)
        self.logits = torch.empty(0)

    def run(self) -> None:
        """Decode from the same start, greedily, and leave the last logits (B, vocab) in `logits`."""
        self.cache.length = self._start
        ids = self._first
        for _ in range(self._steps):
            self.logits = self._decoder.prefill(ids, self.cache)
            ids = self.logits.argmax(dim=-1, keepdim=True)


def fill(cache: KVCache) -> None:
    """Fill a cache with random keys and values, for runs that begin after tokens which never came."""
    if cache._slab.is_floating_point():
        cache._slab.normal_()
        return
    random_bytes(cache._slab)
    assert cache._scales is not None
    cache._scales.uniform_(0.0, 2.0 ** (1 - cache.bits))


def _measure_decode(
    decoder: Decoder,
    scheme: QuantScheme,
    setting: Setting,
    steps: int,
    place: Place,
    sums: dict[str, float],
) -> tuple[Decode, bool]:
    """Return a decoding, and whether its last logits had the same bits twice."""
    sequences = _Sequences(decoder, setting, steps)
    sequences.run()
    logits = sequences.logits.clone()
    rounds = place.method.decode_rounds
    times = place.device.alternate({"decode": sequences.run}, rounds)
    seconds = median(times["decode"]) / steps
    cached = sequences.cache.nbytes * (2 * setting.context - steps + 1) // (2 * setting.context)
    step_bytes = token_bytes(decoder.config, decoder.weights_bytes) + cached
    run = Decode(
        model=decoder.config.name,
        scheme=scheme.name,
        kv_bits=setting.kv_bits,
        batch=setting.batch,
        context=setting.context,
        steps=steps,
        rounds=rounds,
        weights_bytes=decoder.weights_bytes,
        step_bytes=step_bytes,
        seconds=seconds,
        roof_share=step_bytes / place.limits.bytes_per_s / seconds,
        matrices_seconds=sums,
    )
    return run, torch.equal(logits, sequences.logits)
