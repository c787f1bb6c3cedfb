"""What is timed side by side computes the same, from memory of its own each turn."""

from __future__ import annotations

import math

import pytest
import torch

from quantkit.bench import machine
from quantkit.bench.kernels import contenders, measure
from quantkit.bench.random_weights import STD, random_quantized
from quantkit.bench.shapes import SCHEMES
from quantkit.bench.timing import Effort
from quantkit.config import ModelConfig
from quantkit.errors import BackendError
from quantkit.kernels import native, reference
from quantkit.schemes import get_scheme

needs_extension = pytest.mark.skipif(native.extension() is None, reason="the extension is not built")

TINY = ModelConfig(
    name="tiny", architecture="llama", vocab_size=64, hidden_size=256, intermediate_size=384, n_layers=2, n_heads=4,
    n_kv_heads=2, head_dim=64, max_context=64, rope_theta=1e4, norm_eps=1e-5,
)  # fmt: skip


@pytest.mark.parametrize("name", [*SCHEMES, "int4-g32-asym"])
def test_random_weights_are_of_the_size_of_weights(name: str) -> None:
    torch.manual_seed(0)
    matrix = reference.dequantize(random_quantized((96, 256), get_scheme(name)))
    assert STD / 2 < float(matrix.std()) < 2 * STD


@needs_extension
@pytest.mark.parametrize("name", [*SCHEMES, "int4-g32", "int4-g64-asym"])
def test_contenders_multiply_by_the_same_weights(name: str) -> None:
    torch.manual_seed(0)
    weight = random_quantized((192, 256), get_scheme(name))
    beside = contenders(weight, away_bytes=0)
    third = {"int8": "torch int8pack", "int4-g128": "torch int4pack", "int4-g32": "torch int4pack"}
    assert {"quantkit", "torch bf16", "reference"} <= set(beside)
    assert third.get(name, "quantkit") in beside
    for m in (1, 5):
        x = torch.randn(m, 256).bfloat16()
        exact = reference.linear(x.float(), weight)
        for who, contender in beside.items():
            # matrices, x and results in bfloat16, whose unit is 2**-8: sums of 256 stay well within 4 of them
            found = contender.run(x, turn=1).float()
            assert (found - exact).abs().max() <= 2**-6 * exact.abs().max(), who


@needs_extension
def test_copies_are_enough_to_leave_every_cache_and_taken_in_turn() -> None:
    weight = random_quantized((64, 256), get_scheme("int8"))
    for contender in contenders(weight, away_bytes=100_000).values():
        assert len(contender.copies) * contender.copies[0].nbytes >= 100_000
    ours = contenders(weight, away_bytes=0)["quantkit"]
    assert len({copy.data.data_ptr() for copy in ours.copies}) == len(ours.copies) == 2


@needs_extension
def test_cells_are_sane() -> None:
    limits, roof = machine.measure(quick=True)
    rates = [reader.bytes_per_s for reader in limits.readers]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] > 0
    assert limits.flops_per_s > 0
    assert {reader.pages for reader in limits.readers} == {"huge", "4K"}
    told: list[int] = []
    cells = list(measure(TINY, [get_scheme("nf4")], (1, 3), roof, Effort(2, 0.0), 0, told.append))
    assert [(cell.matrix, cell.n, cell.k) for cell in cells[::2]] == [
        ("qkv", 512, 256), ("o", 256, 256), ("gate_up", 768, 256), ("down", 256, 384),
    ]  # fmt: skip
    assert sum(told) == len(cells) == 8
    for cell in cells:
        assert cell.rounds == 2
        assert set(cell.speedups) == set(cell.seconds) - {"quantkit"}
        assert all(
            math.isfinite(value) and value > 0 for value in [*cell.seconds.values(), *cell.speedups.values()]
        )
        assert set(cell.roof_shares) == {"quantkit", "torch bf16"}
        assert min(cell.roof_shares.values()) > 0


@needs_extension
def test_readers_read_every_byte() -> None:
    extension = native.require()
    words = torch.arange(5 * 8 * 40, dtype=torch.int64)  # 40 lines: ragged for several streams
    buffer = words.view(torch.uint8)
    start = -buffer.data_ptr() % 64
    aligned = torch.empty(buffer.numel() + 64, dtype=torch.uint8)[start:]
    aligned = aligned[-aligned.data_ptr() % 64 :][: buffer.numel()].copy_(buffer)
    for reader in extension.readers():
        for threads in (1, 3):
            assert extension.read(aligned, reader, threads) == int(words.sum())
    with pytest.raises(ValueError, match="known are plain"):
        extension.read(aligned, "fast", 1)
    with pytest.raises(ValueError, match="whole lines"):
        extension.read(aligned[:65], "plain", 1)


def test_without_the_extension_a_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "extension", lambda: None)
    with pytest.raises(BackendError, match="the native backend is not built: install quantkit where"):
        machine.describe()
