"""FlashAttention's splits: what an H200 was seen to ask for, and the rule by hand."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest

from calculators.flash import Call, accumulators, flash_runs, splits


def call(
    tokens: int, keys: int, batch: int = 1, n_heads: int = 32, n_kv_heads: int = 8, head_dim: int = 128
) -> Call:
    return Call(batch, tokens, keys, n_heads, n_kv_heads, head_dim)


def test_what_flash_attention_takes() -> None:
    assert flash_runs(2, 128)
    assert not flash_runs(4, 128)
    assert not flash_runs(2, 20)
    assert not flash_runs(2, 512)


@pytest.mark.parametrize(
    ("asked", "sizes"), [(call(275, 1299), (105_600, 13_516_800)), (call(1, 1300), (1_408, 180_224))]
)
def test_what_an_h200_was_seen_to_ask_for(asked: Call, sizes: tuple[int, int]) -> None:
    assert tuple(math.prod(factors) for _, factors in accumulators(asked, 132)) == sizes


@pytest.mark.parametrize(
    ("asked", "sm_count", "count"),
    [
        (
            call(385, 32768),
            132,
            1,
        ),  # 7 blocks of 64 queries in 32 heads: 224 of 264 slots, four in five at work
        (call(384, 32768), 132, 4),  # 192 programs: 4 times as many fill 2.9 of 3 waves
        (call(512, 512, batch=4), 132, 1),
        (call(64, 100), 132, 1),  # one block of keys cannot be split
        (call(64, 1024), 132, 8),  # 256 of 264 slots
        (call(64, 1152), 132, 5),  # of 9 blocks: 6, 7 and 8 parts would leave the last one empty
        (call(1, 1 << 20), 132, 29),  # 8 groups of heads: 232 of 264 slots are more than 85%, 224 are not
        (call(1, 32768), 24, 6),  # 48 slots at work
        (call(1, 1 << 20, n_kv_heads=1), 170, 110),  # at most 128, of which 85% are 109: as long as 108
    ],
)
def test_the_rule_by_hand(asked: Call, sm_count: int, count: int) -> None:
    assert splits(asked, sm_count) == count


@pytest.mark.parametrize(("head_dim", "padded"), [(64, 64), (80, 96), (128, 128), (160, 192), (256, 256)])
def test_heads_are_padded(head_dim: int, padded: int) -> None:
    [(_, norms), (_, results)] = accumulators(call(64, 4096, head_dim=head_dim), 132)
    assert results == (*norms[:-1], padded, 4)


def test_the_fewest_that_keep_nearly_as_many_busy_as_any() -> None:
    """The same rule in fractions, where no part is empty and the work does not nearly fill the slots."""
    for tokens, keys, sm_count in itertools.product(
        (2, 60, 275, 384), (1, 129, 1300, 9000), (24, 108, 132, 188)
    ):
        work, slots, blocks = 32 * math.ceil(tokens / 64), 2 * sm_count, math.ceil(keys / 128)
        shares = {
            count: Fraction(work * count, slots * math.ceil(Fraction(work * count, slots)))
            for count in range(1, min(blocks, slots, 128) + 1)
            if math.ceil(blocks / math.ceil(blocks / count)) == count
        }
        fewest = min(
            count for count, share in shares.items() if share >= Fraction(85, 100) * max(shares.values())
        )
        expected = 1 if work >= Fraction(8, 10) * slots else fewest
        assert splits(call(tokens, keys), sm_count) == expected
