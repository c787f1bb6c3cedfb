"""The forward pass against transformers, and against itself: steps, chunks and rolling buffers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from quantkit.errors import BackendError
from quantkit.formats.checkpoint import open_checkpoint
from quantkit.kernels import native
from quantkit.models.attention import Attention, choose_path
from quantkit.models.decoder import Decoder
from quantkit.models.loader import load

# fp32 sums of a few hundred terms differ in order between the two implementations
RELATIVE = 1e-4
SHAPES = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
MODELS = {
    "mistral-gqa": (transformers.MistralConfig, {"sliding_window": None}),
    "mistral-window": (transformers.MistralConfig, {"sliding_window": 7}),
    "mistral-head-dim": (transformers.MistralConfig, {"sliding_window": None, "head_dim": 20}),
    "llama-tied": (transformers.LlamaConfig, {"tie_word_embeddings": True}),
    "llama-biases": (transformers.LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama-3-rope": (transformers.LlamaConfig, {"rope_parameters": LLAMA3}),
    "qwen2-biases": (transformers.Qwen2Config, {"tie_word_embeddings": False}),
}


def make(directory: Path, name: str) -> tuple[transformers.PreTrainedModel, Decoder]:
    """Return a tiny random model of transformers, and ours loaded from what it saves."""
    kind, overrides = MODELS[name]
    torch.manual_seed(0)
    config = kind(**{**SHAPES, **overrides})
    config._attn_implementation = "eager"
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter_name, parameter in theirs.named_parameters():
        if parameter_name.endswith("bias") or "norm" in parameter_name:
            torch.nn.init.normal_(parameter, mean=float("norm" in parameter_name), std=0.3)
    theirs.save_pretrained(directory)
    return theirs, load(open_checkpoint(directory))


def relative_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, SHAPES["vocab_size"], (2, 40), generator=torch.Generator().manual_seed(1))


def run_steps(decoder: Decoder, ids: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Return all logits, fed in pieces of these sizes and then token by token."""
    cache = decoder.new_cache(ids.shape[0], ids.shape[1])
    rest = [1] * (ids.shape[1] - sum(sizes))
    return torch.cat(
        [decoder.logits(decoder.forward(piece, cache)) for piece in ids.split(sizes + rest, dim=1)], 1
    )


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(name: str, tmp_path: Path, ids: torch.Tensor) -> None:
    theirs, ours = make(tmp_path, name)
    with torch.no_grad():
        expected = theirs(ids).logits
    assert relative_difference(run_steps(ours, ids, [40]), expected) <= RELATIVE


@pytest.mark.parametrize("path", ["sdpa", "math"])
@pytest.mark.parametrize("sizes", [[], [40], [13, 1, 9], [3, 30, 7]], ids=str)
@pytest.mark.parametrize("name", ["mistral-gqa", "mistral-window", "llama-tied", "qwen2-biases"])
def test_steps_and_chunks_equal_one_prefill(
    name: str, sizes: list[int], path: str, tmp_path: Path, ids: torch.Tensor
) -> None:
    theirs, ours = make(tmp_path, name)
    ours.attention = path
    with torch.no_grad():
        expected = theirs(ids).logits
    assert relative_difference(run_steps(ours, ids, sizes), expected) <= RELATIVE


def test_a_wrapped_rolling_buffer_holds_only_the_window(tmp_path: Path, ids: torch.Tensor) -> None:
    _, ours = make(tmp_path, "mistral-window")
    cache = ours.new_cache(2, 40)
    assert cache.slots == 7
    ours.prefill(ids, cache, chunk=11)
    assert cache.length == 40
    assert cache.nbytes == ours.new_cache(2, 7).nbytes


def test_prefill_returns_the_last_tokens_logits(tmp_path: Path, ids: torch.Tensor) -> None:
    _, ours = make(tmp_path, "mistral-gqa")
    whole = run_steps(ours, ids, [40])[:, -1]
    chunked = ours.prefill(ids, ours.new_cache(2, 40), chunk=9)
    assert chunked.dtype == torch.float32
    assert relative_difference(chunked, whole) <= RELATIVE


@pytest.mark.parametrize("path", ["sdpa", "math"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("tokens", [5, 2, 1])
def test_attention_shares_keys_among_grouped_heads(path: str, window: int | None, tokens: int) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 5, 6, 8), torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8)
    seen = torch.ones(5, 5, dtype=torch.bool).tril()
    if window and tokens > 1:  # a single token of a rolling cache is given only what it may see
        seen &= torch.ones(5, 5, dtype=torch.bool).triu(1 - window)
    scores = q.transpose(1, 2) @ k.repeat_interleave(2, dim=1).mT / 8**0.5
    probabilities = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    expected = (probabilities @ v.repeat_interleave(2, dim=1)).transpose(1, 2).flatten(2)
    attention = Attention(path, tokens, 5, window, q.device)
    torch.testing.assert_close(attention(q[:, -tokens:].contiguous(), k, v), expected[:, -tokens:])


def test_an_attention_that_cannot_run_is_refused() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    built = native.extension() is not None
    assert choose_path("auto", cpu, torch.bfloat16, 128) == ("native" if built else "sdpa")
    assert choose_path("auto", cpu, torch.bfloat16, 128, own=False) == "sdpa"
    assert (
        choose_path("auto", cpu, torch.bfloat16, 20) == choose_path("auto", cpu, torch.float32, 128) == "sdpa"
    )
    assert choose_path("auto", cuda, torch.bfloat16, 128) == "flash"
    assert (
        choose_path("auto", cuda, torch.float32, 128) == choose_path("math", cpu, torch.float32, 20) == "math"
    )
    for name, device, dtype, head_dim in (
        ("flash", cpu, torch.bfloat16, 128),
        ("flash", cuda, torch.float32, 128),
        ("flash", cuda, torch.bfloat16, 20),
        ("sdpa", cuda, torch.bfloat16, 128),
        ("native", cuda, torch.bfloat16, 128),
        ("native", cpu, torch.float32, 128),
        ("native", cpu, torch.bfloat16, 20),
        ("eager", cpu, torch.bfloat16, 128),
    ):
        with pytest.raises(BackendError, match=r"choose|known"):
            choose_path(name, device, dtype, head_dim)
