"""What every benchmark runs: precisions, rows of x, and the matrices of one layer."""

from __future__ import annotations

from quantkit.config import ModelConfig
from quantkit.errors import SchemeError
from quantkit.presets import DEFAULT_PRESET, PRESETS
from quantkit.schemes import QuantScheme, get_scheme

SCHEMES = ("int8", "int4-g128", "nf4", "nf4-dq")
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
QUICK_ROWS = (1, 16)
QUICK_MODEL = "smollm2-135m"


def rows_of_x(quick: bool) -> tuple[int, ...]:
    """Return each M that a matrix is multiplied with."""
    return QUICK_ROWS if quick else ROWS


def shapes(quick: bool) -> ModelConfig:
    """Return the model whose matrices the kernels multiply by."""
    return PRESETS[QUICK_MODEL if quick else DEFAULT_PRESET]


def matrices(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Return (N, K) of one layer's matrices, those of one input as one."""
    hidden, ffn, heads = config.hidden_size, config.intermediate_size, config.n_heads * config.head_dim
    return {
        "qkv": (heads + 2 * config.n_kv_heads * config.head_dim, hidden),
        "o": (hidden, heads),
        "gate_up": (2 * ffn, hidden),
        "down": (hidden, ffn),
    }


def token_bytes(config: ModelConfig, weights_bytes: int) -> int:
    """Return the bytes of weights that one token reads: all but the embedding, unless that is the head, too."""
    embedding_bytes = 0 if config.tie_embeddings else 2 * config.vocab_size * config.hidden_size
    return weights_bytes - embedding_bytes


def schemes_named(names: tuple[str, ...]) -> tuple[QuantScheme, ...]:
    """Return the schemes of these names, or those that are run where none is named.

    Raises:
        SchemeError: a name is unknown, or that of a plain precision.
    """
    found = tuple(get_scheme(name) for name in dict.fromkeys(names or SCHEMES))
    for scheme in found:
        if not scheme.quantized:
            raise SchemeError(
                f"{scheme.name} is not quantized: torch's bf16 runs beside every scheme; name one of "
                f"{', '.join(SCHEMES)}"
            )
    return found
