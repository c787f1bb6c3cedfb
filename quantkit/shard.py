"""One GPU's share of a model under tensor parallelism, as the model that this GPU runs.

Heads, FFN columns and vocabulary are split, norms and the biases of row-parallel layers replicated:
the scheme of Megatron-LM (https://arxiv.org/abs/1909.08053) with vLLM's handling of vocabulary and
key/value heads (`vllm/model_executor/layers/vocab_parallel_embedding.py`, `layers/linear.py`).
"""

from __future__ import annotations

from dataclasses import replace

from calculators.units import ceil_div
from quantkit.config import ModelConfig
from quantkit.errors import ConfigError

VOCAB_PADDING = 64  # vLLM's DEFAULT_VOCAB_PADDING_SIZE


def shard(config: ModelConfig, n: int) -> ModelConfig:
    """Return the largest share of `config` that one of `n` GPUs holds; `config` itself where `n` is 1.

    Where `n` divides neither FFN nor the padded vocabulary the share is rounded up.

    Raises:
        ConfigError: `n` does not divide the query heads.
    """
    if n == 1:
        return config
    if n < 1 or config.n_heads % n:
        possible = [count for count in range(1, config.n_heads + 1) if config.n_heads % count == 0]
        raise ConfigError(
            f"{config.name}: {config.n_heads} query heads cannot be split over {n} GPUs; "
            f"possible are {', '.join(map(str, possible))}"
        )
    padded = ceil_div(config.vocab_size, VOCAB_PADDING) * VOCAB_PADDING
    return replace(
        config,
        n_heads=config.n_heads // n,
        n_kv_heads=_kv_heads(config, n),
        intermediate_size=ceil_div(config.intermediate_size, n),
        vocab_size=ceil_div(padded, n),
    )


def _kv_heads(config: ModelConfig, n: int) -> int:
    """Return the key/value heads that a GPU's query heads read, made to divide these evenly.

    With `n` a divisor or a multiple of the key/value heads that is max(1, n_kv_heads // n), as in vLLM,
    which takes no other; elsewhere a head that two GPUs' query heads read lies on both.
    """
    heads, sharing = config.n_heads // n, config.n_heads // config.n_kv_heads
    read = max(
        (first + heads - 1) // sharing - first // sharing + 1 for first in range(0, config.n_heads, heads)
    )
    return next(count for count in range(read, heads + 1) if heads % count == 0)
