"""Prompts and tokens through a whole model by the PTX of a Hopper's kernels, followed on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.kernels.ptx_launch import followed
from tests.kernels.ptx_machine import IN_STEP
from tests.models.cuda_decoders import decode, distance, make, random_ids

# Attention keeps float32 where the operators round to bfloat16; a key on the edge between two codes may fall to either
RELATIVE = {16: 2.0**-5, 8: 2.0**-4, 4: 2.0**-3}
BY_ROWS = {"head_dim": 32, "n_kv_heads": 2, "n_heads": 2}


@pytest.mark.parametrize(
    ("scheme", "kv_bits", "batch", "overrides"),
    [("int8", 16, 1, BY_ROWS), ("int4-g32", 8, 1, BY_ROWS), ("nf4", 4, 2, {})],
)
def test_prompts_and_tokens_are_the_operators(
    scheme: str, kv_bits: int, batch: int, overrides: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from quantkit.kernels.triton import launch

    if launch.INTERPRETED:
        pytest.skip("TRITON_INTERPRET is set")
    overrides = overrides | {"intermediate_size": 128}  # of whole blocks of NF4
    ids = random_ids(batch, 5, "cpu")
    expected = decode(make(scheme, torch.bfloat16, "cpu", False, False, **overrides), ids, 3, kv_bits)
    found = []
    for order in IN_STEP:
        with followed(monkeypatch, order=order) as names:
            decoder = make(scheme, torch.bfloat16, "cpu", **overrides)
            assert decoder._cuda is not None
            found.append(decode(decoder, ids, 3, kv_bits))
        assert {"norm_kernel", "heads_kernel", "swiglu_kernel", "attention_kernel"} <= set(names)
        assert ("row_kernel" in names) == ("n_heads" in overrides)
    assert torch.equal(*found)
    assert distance(found[0], expected) <= RELATIVE[kv_bits]
