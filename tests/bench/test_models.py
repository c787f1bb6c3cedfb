"""Whole models with random weights, and llama.cpp's side of the comparison by a stand-in for it."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from quantkit.bench import machine, models
from quantkit.bench import run as benchmark
from quantkit.bench.llama import Llama, write_gguf
from quantkit.bench.random_weights import RandomCheckpoint
from quantkit.bench.timing import Effort
from quantkit.config import ModelConfig
from quantkit.errors import BackendError
from quantkit.formats.checkpoint import open_checkpoint
from quantkit.kernels import native
from quantkit.models.loader import load
from quantkit.schemes import get_scheme

CONFIG = ModelConfig(
    name="tiny", architecture="llama", vocab_size=96, hidden_size=128, intermediate_size=256, n_layers=2, n_heads=4,
    n_kv_heads=2, head_dim=32, max_context=64, rope_theta=1e4, norm_eps=1e-5,
)  # fmt: skip
STAND_IN = """
__version__ = "0.0-test"
class Llama:
    def __init__(self, path, n_ctx, n_batch, n_threads, n_threads_batch, verbose):
        assert open(path, "rb").read(4) == b"GGUF" and n_ctx == 12 and n_threads == n_threads_batch
        self.held = 0
    def reset(self):
        self.held = 0
    def eval(self, tokens):
        self.held += len(tokens)
        if self.held > 12:
            raise ValueError("context is full")
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return an interpreter that has a `llama_cpp` which only counts tokens."""
    (tmp_path / "llama_cpp.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return sys.executable


@pytest.mark.parametrize("name", ["int8", "int4-g128", "nf4-dq"])
def test_random_weights_make_a_decoder_with_finite_logits(name: str) -> None:
    decoder = load(RandomCheckpoint(CONFIG, get_scheme(name)))
    logits = decoder.prefill(torch.arange(9)[None], decoder.new_cache(1, 9))
    assert torch.isfinite(logits).all()
    assert logits.std() > 0


@pytest.mark.parametrize("bits", [4, 8])
def test_the_file_for_llama_is_the_same_model(bits: int, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    nbytes = write_gguf(path, CONFIG, bits)
    checkpoint = open_checkpoint(path)
    config = checkpoint.config
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "n_layers",
        "n_heads",
        "n_kv_heads",
        "head_dim",
    ):
        assert getattr(config, name) == getattr(CONFIG, name), name
    assert {spec.name: spec.shape for spec in config.tensors} == {s.name: s.shape for s in CONFIG.tensors}
    assert checkpoint.stored_bytes == nbytes
    for spec in config.tensors:
        weight = checkpoint.read(spec)
        assert isinstance(weight, torch.Tensor)
        assert np.isfinite(weight.float().numpy()).all()


def test_a_file_for_llama_has_whole_blocks(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"K = 100, no multiple of 32: llama.cpp's Q4_0 cannot hold it"):
        write_gguf(tmp_path / "model.gguf", replace(CONFIG, intermediate_size=100), 4)


@pytest.mark.skipif(native.extension() is None, reason="the extension is not built")
def test_a_model_larger_than_memory_is_refused() -> None:
    huge = replace(CONFIG, name="huge", n_layers=10_000, intermediate_size=1 << 24)
    with pytest.raises(BackendError, match=r"huge at int8 needs .* for weights, and this machine has"):
        benchmark.run(
            benchmark.Plan((get_scheme("int8"),), kernels=False, models=(huge,), quick=True),
            lambda steps: None,
        )


@pytest.mark.skipif(native.extension() is None, reason="the extension is not built")
def test_a_model_runs_beside_another_program(stand_in: str, tmp_path: Path) -> None:
    memory = machine.Memory(quick=True)
    told: list[int] = []
    schemes = [get_scheme(name) for name in ("int8", "nf4", "int4-g128")]
    found = list(
        models.measure(
            [CONFIG], schemes, models.Length(8, 4), memory, Effort(2, 0.0), stand_in, tmp_path, told.append
        )
    )
    assert [(run.scheme, run.peer and run.peer.file_type) for run in found] == [
        ("int8", "Q8_0"), ("nf4", "Q4_0"), ("int4-g128", "Q4_0"),
    ]  # fmt: skip
    assert len(told) == 3
    for run in found:
        assert run.peer is not None
        assert run.peer.name == "llama.cpp (llama-cpp-python 0.0-test)"
        assert min(run.prefill_tokens_per_s, run.decode_tokens_per_s, run.read_share) > 0
        assert min(run.peer.prefill_speedup, run.peer.decode_speedup) > 0
        assert run.weights_bytes - run.token_bytes == 2 * 96 * 128  # the embedding
        alone = load(RandomCheckpoint(CONFIG, get_scheme(run.scheme))).weights_bytes
        assert alone - run.weights_bytes >= 96 * 128 - 2 * 96  # its own has 8 bits at most, the scales apart
    assert not list(tmp_path.glob("quantkit-bench-*"))


def test_what_llama_cannot_do_is_one_line(stand_in: str, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="absent is no Python to run: --llama names an interpreter"):
        Llama(str(tmp_path / "absent"))
    with pytest.raises(BackendError, match="FileNotFoundError"):
        Llama(stand_in, tmp_path / "absent.gguf", 1, 12)
    path = tmp_path / "model.gguf"
    write_gguf(path, CONFIG, 4)
    with Llama(stand_in, path, 1, 12) as llama:
        llama.prefill([1] * 10)
        llama.decode([1, 2])
        with pytest.raises(BackendError, match="ValueError: context is full"):
            llama.decode([3])
        with pytest.raises(BackendError, match="it ended without a word"):
            llama.decode([3])


def test_an_interpreter_without_llama_cpp_is_told_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "llama_cpp.py").write_text("raise ModuleNotFoundError(\"No module named 'llama_cpp'\")")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(
        BackendError, match="No module named 'llama_cpp'; --llama names an interpreter that has"
    ):
        Llama(sys.executable)
