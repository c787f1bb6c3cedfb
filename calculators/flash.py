"""What FlashAttention-2 takes beside its result, as PyTorch carries it.

Few queries leave multiprocessors idle, so the keys are split among them too: each split has a float32
result and log-sum-exp of its own, which are then joined. The rule stands in PyTorch's
`aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp` (`mha_fwd`, `num_splits_heuristic`).
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import NamedTuple

from calculators.tape import FP32, HALF
from calculators.units import ceil_div

_QUERY_BLOCK = 64
_BLOCKS_PER_SM = 2
_MOST_SPLITS = 128
_GOOD_ENOUGH = 0.85  # of the largest share of busy multiprocessors: fewer splits read and write less


class Call(NamedTuple):
    """One call of the kernel, with a window only where there are several queries.

    Attributes:
        batch: sequences.
        tokens: queries of each.
        keys: that they attend to.
        n_heads: of the queries.
        n_kv_heads: of the keys.
        head_dim: elements of a head.
    """

    batch: int
    tokens: int
    keys: int
    n_heads: int
    n_kv_heads: int
    head_dim: int


def flash_runs(element_bytes: int, head_dim: int) -> bool:
    """Tell whether FlashAttention-2 takes this dtype and head."""
    return element_bytes == HALF and head_dim % 8 == 0 and head_dim <= 256


def accumulators(call: Call, sm_count: int) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Return name and factors of the bytes of what the splits are written to, in the order of the requests.

    Args:
        call: what is computed.
        sm_count: the device's streaming multiprocessors.
    """
    count = splits(call, sm_count)
    if count == 1:
        return ()
    vectors = count, call.batch, call.n_heads, call.tokens
    step = 32 if call.head_dim <= 128 else 64
    padded = ceil_div(call.head_dim, step) * step
    return ("splits' log-sum-exp", (*vectors, FP32)), ("splits' attention", (*vectors, padded, FP32))


@lru_cache(maxsize=4096)
def splits(call: Call, sm_count: int) -> int:
    """Return into how many parts the keys are split, 1 where they are not; the arguments are `accumulators`'."""
    tokens, n_heads, head_dim = call.tokens, call.n_heads, call.head_dim
    if tokens == 1:  # the heads of a group stand in for queries
        tokens, n_heads = n_heads // call.n_kv_heads, call.n_kv_heads
    work = call.batch * n_heads * ceil_div(tokens, _QUERY_BLOCK)
    slots = _BLOCKS_PER_SM * sm_count
    if 5 * work >= 4 * slots:
        return 1
    blocks = ceil_div(call.keys, 256 if head_dim <= 64 else 128 if head_dim <= 128 else 64)
    busy = {
        count: _busy(work * count, slots)
        for count in range(1, min(_MOST_SPLITS, slots, blocks) + 1)
        if count == 1 or ceil_div(blocks, count) != ceil_div(blocks, count - 1)  # else the last has no block
    }
    enough = _GOOD_ENOUGH * max(busy.values())
    return next(count for count, share in busy.items() if share >= enough)


def _busy(programs: int, slots: int) -> float:
    """Return the share of slots at work over all waves, in the original's float32: ties hang on it."""
    return _float32(_float32(programs / slots) / ceil_div(programs, slots))


def _float32(x: float) -> float:
    rounded: float = struct.unpack("f", struct.pack("f", x))[0]
    return rounded
