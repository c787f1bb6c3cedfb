"""Time greedy text of one sequence in NF4: quantkit beside transformers with bitsandbytes.

    python examples/beside_transformers.py [PROMPT_TOKENS [NEW_TOKENS]]

Both run the shapes of Mistral-7B-Instruct-v0.2 with random weights on a CUDA GPU. transformers generates as it does by
itself; what it takes per token is its host's time as much as the GPU's.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from statistics import median

import torch

from quantkit.bench.random_weights import STD, RandomCheckpoint
from quantkit.config import ModelConfig
from quantkit.models.generate import generate
from quantkit.models.loader import load
from quantkit.presets import DEFAULT_PRESET, PRESETS
from quantkit.schemes import get_scheme

ROUNDS = 3


def ours(config: ModelConfig, device: torch.device, prompt: list[int], tokens: int) -> Callable[[], int]:
    """Return what generates so many tokens by quantkit, and returns how many there are."""
    decoder = load(RandomCheckpoint(config, get_scheme("nf4"), device), dtype="bf16", device=device)
    return lambda: len(list(generate(decoder, prompt, tokens)))


def theirs(config: ModelConfig, device: torch.device, prompt: list[int], tokens: int) -> Callable[[], int]:
    """Return the same by transformers, each of whose layers' matrices is one of bitsandbytes."""
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers import MistralConfig, MistralForCausalLM

    with torch.device("meta"):
        model = MistralForCausalLM(
            MistralConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.n_layers,
                num_attention_heads=config.n_heads,
                num_key_value_heads=config.n_kv_heads,
                head_dim=config.head_dim,
                max_position_embeddings=config.max_context,
                rms_norm_eps=config.norm_eps,
                rope_theta=config.rope_theta,
                sliding_window=config.sliding_window,
            )
        )

    def random(shape: torch.Size) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16) * STD

    for name, module in list(model.named_modules()):
        owner, _, leaf = name.rpartition(".")
        if isinstance(module, torch.nn.Linear) and leaf != "lm_head":
            linear = Linear4bit(
                module.in_features,
                module.out_features,
                bias=False,
                compute_dtype=torch.bfloat16,
                device="meta",
            )
            weight = Params4bit(
                random(module.weight.shape), requires_grad=False, quant_type="nf4", compress_statistics=False
            )
            linear.weight = weight.to(device)
            setattr(model.get_submodule(owner), leaf, linear)
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            owner, _, leaf = name.rpartition(".")
            plain = (
                random(parameter.shape) if parameter.dim() > 1 else torch.ones(parameter.shape, device=device)
            )
            made = torch.nn.Parameter(plain.bfloat16(), requires_grad=False)
            setattr(model.get_submodule(owner), leaf, made)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)
    model.eval()
    ids = torch.tensor([prompt], device=device)

    def run() -> int:
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
            max_new_tokens=tokens, min_new_tokens=tokens,
        )  # fmt: skip
        return int(found.shape[1]) - len(prompt)

    return run


def seconds(run: Callable[[], int], tokens: int) -> float:
    """Return the median time of a few runs, after one for what only a first does."""
    times = []
    for _ in range(1 + ROUNDS):
        start = time.perf_counter()
        if run() != tokens:
            raise RuntimeError(f"not {tokens} tokens came")
        times.append(time.perf_counter() - start)
    return median(times[1:])


def main(prompt_tokens: int = 512, new_tokens: int = 128) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("this needs a CUDA GPU that PyTorch sees")
    config = PRESETS[DEFAULT_PRESET]
    prompt = torch.randint(config.vocab_size, (prompt_tokens,)).tolist()
    times = {}
    for name, build in (("quantkit", ours), ("transformers", theirs)):
        times[name] = seconds(build(config, torch.device("cuda"), prompt, new_tokens), new_tokens)
        print(f"{name:12}  {times[name]:.3f} s  {new_tokens / times[name]:.0f} tokens/s")
        torch.cuda.empty_cache()
    print(f"quantkit is {times['transformers'] / times['quantkit']:.1f} times as fast")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))
