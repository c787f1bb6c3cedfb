"""What tokens need beside their linears, against the operators: on a GPU, or in Triton's interpreter.

`test_step.py` runs this file by `cases.py`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from quantkit.kernels import ops
from quantkit.kernels.triton import step
from quantkit.kernels.triton.step import Parts, Slab, Step
from quantkit.models.rope import rotate
from quantkit.quantize import quantize
from quantkit.quantize.vectors import dequantize_vectors, head_rotation, quantize_vectors
from quantkit.schemes import SCHEMES
from tests.kernels.cases import DEVICE

DTYPES = [torch.bfloat16, torch.float16]
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # relative, to nearest
POSITIONS = 300
B, HEADS, KV_HEADS = 3, 6, 2
# head_dim, bits, group of a scale
CACHES = [
    (32, 16, 0), (128, 16, 0), (80, 16, 0), (20, 16, 0), (128, 8, 0), (64, 8, 16), (80, 8, 0), (128, 4, 0),
    (96, 4, 32), (32, 4, 0), (24, 4, 0),
]  # fmt: skip


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def added(parts: Parts, dtype: torch.dtype) -> torch.Tensor:
    """Return (R, N) as an operator gives it: added in float32 in the order of the splits, rounded once."""
    total = parts.sums[0].float()
    for split in range(1, len(parts.sums)):
        total = total + parts.sums[split].float()
    return (total if parts.bias is None else total + parts.bias.float()).to(dtype)


def make_step(
    head_dim: int, bits: int, group: int, dtype: torch.dtype, slots: int, position: int, batch: int = B
) -> Step:
    angles = [randn(POSITIONS, head_dim // 2, seed=seed).to(dtype) for seed in (5, 6)]
    groups = 0 if bits == 16 else head_dim // (group or head_dim)
    return Step(
        batch, HEADS, KV_HEADS, head_dim, slots, bits, groups, dtype, *angles,
        torch.tensor([position], device=DEVICE),
    )  # fmt: skip


def make_slab(head_dim: int, bits: int, group: int, dtype: torch.dtype, slots: int, batch: int = B) -> Slab:
    """Return a cache of random vectors, full to the last slot."""
    vectors = randn(2, batch, KV_HEADS, slots, head_dim, seed=1).to(dtype)
    if bits == 16:
        return Slab(vectors[0], vectors[1], None, None, bits)
    codes, scales = quantize_vectors(vectors, bits, group, torch.float16)
    return Slab(codes[0], codes[1], scales[0], scales[1], bits)


def exact(slab: Slab, head_dim: int) -> list[torch.Tensor]:
    """Return keys and values in float64."""
    if slab.key_scales is None or slab.value_scales is None:
        return [slab.keys.double(), slab.values.double()]
    out = torch.empty(*slab.keys.shape[:3], head_dim, device=DEVICE, dtype=torch.float64)
    pairs = (slab.keys, slab.key_scales), (slab.values, slab.value_scales)
    return [dequantize_vectors(codes, scales, slab.bits, out.clone()) for codes, scales in pairs]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "splits", "bias"), [(96, 1, False), (100, 4, True), (4096, 3, False)])
def test_a_linear_is_added_and_normed(width: int, splits: int, bias: bool, dtype: torch.dtype) -> None:
    x, weight = randn(B, width).to(dtype), randn(width, seed=1).to(dtype)
    parts = Parts(randn(splits, B, width, seed=2), randn(width, seed=3).to(dtype) if bias else None)
    if splits == 1:
        parts = Parts(parts.sums.to(dtype), parts.bias)
    expected = x + added(parts, dtype)
    found = step.norm(x, parts, weight, 1e-5)
    assert torch.equal(x, expected)
    wide = expected.float()
    normed = (wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt()).to(dtype) * weight
    # the mean of squares is added in another order, which may turn one rounding, and the product's with it
    torch.testing.assert_close(found, normed, rtol=4 * ROUNDING[dtype], atol=0)
    assert torch.equal(step.norm(x, None, weight, 1e-5), found)
    assert torch.equal(x, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swiglu_of_parts_that_are_views(dtype: torch.dtype) -> None:
    whole = randn(3, B, 2 * 300)
    gate, up = (Parts(sums) for sums in whole.split(300, dim=2))
    biased = Parts(randn(1, B, 300, seed=4).to(dtype), randn(300, seed=5).to(dtype))
    for other in (up, biased):
        expected = F.silu(added(gate, dtype)) * added(other, dtype)
        found = step.swiglu(gate, other, dtype)
        # exp differs in its last bit, which may turn one rounding, and the product's with it
        torch.testing.assert_close(found, expected, rtol=4 * ROUNDING[dtype], atol=1e-6)


@pytest.mark.parametrize(
    ("head_dim", "bits", "group", "dtype", "tokens"),
    [(*cache, dtype, 1) for cache in CACHES for dtype in DTYPES]
    + [(*cache, torch.bfloat16, 3) for cache in CACHES[3::3]],
    ids=str,
)
def test_heads_are_rotated_and_stored(
    head_dim: int, bits: int, group: int, dtype: torch.dtype, tokens: int
) -> None:
    slots, position = 7, 208  # rolled over, and over once more within three tokens
    made = make_step(head_dim, bits, group, dtype, slots, position)
    slab, before = (make_slab(head_dim, bits, group, dtype, slots) for _ in range(2))
    rows = [HEADS * head_dim, KV_HEADS * head_dim, KV_HEADS * head_dim]
    bias = randn(sum(rows), seed=7).to(dtype)
    q, k, v = map(Parts, randn(2, B * tokens, sum(rows), seed=2).split(rows, dim=2), bias.split(rows))
    queries = made.heads(q, k, v, slab)

    heads = [added(parts, dtype).view(B, tokens, -1, head_dim) for parts in (q, k, v)]
    new = slice(position, position + tokens)
    cos, sin = (table[new].repeat(1, 2)[:, None] for table in (made.cosines, made.sines))
    turned = [rotate(each.clone(), cos, sin) for each in heads[:2]]
    if bits < 16:
        rotations = head_rotation(head_dim, dtype, DEVICE)
        turned = [each @ rotation for each, rotation in zip(turned, rotations, strict=True)]
    # the Hadamard transform's sums are added in another order, which may turn a rounding
    rtol, atol = (0.0, 0.0) if bits == 16 else (2 * ROUNDING[dtype], 2 * ROUNDING[dtype])
    torch.testing.assert_close(queries, turned[0].flatten(0, 1), rtol=rtol, atol=atol)
    written = [at % slots for at in range(position, position + tokens)]
    others = [at for at in range(slots) if at not in written]
    stored = [(slab.keys, slab.key_scales), (slab.values, slab.value_scales)]
    for vectors, (codes, scales), old in zip(
        (turned[1].transpose(1, 2), heads[2].transpose(1, 2)),
        stored,
        (before.keys, before.values),
        strict=True,
    ):
        assert torch.equal(codes[:, :, others], old[:, :, others])
        if scales is None:
            assert torch.equal(codes[:, :, written], vectors)
        else:
            check_codes(codes[:, :, written], scales[:, :, written], vectors, bits, group)


def check_codes(
    codes: torch.Tensor, scales: torch.Tensor, vectors: torch.Tensor, bits: int, group: int
) -> None:
    """The operators' codes and scales, but where a rounding of the transform, or two equal scales, decide."""
    wanted = quantize_vectors(vectors, bits, group, torch.float16)
    differing = (scales != wanted[1]).any(dim=-1) | (codes != wanted[0]).any(dim=-1)
    assert differing.float().mean() <= 0.2
    out = torch.empty(vectors.shape, device=DEVICE)
    values, expected = (
        dequantize_vectors(each, scale, bits, out.clone())
        for each, scale in ((codes, scales), (wanted[0], wanted[1]))
    )
    lost, allowed = ((each - vectors.float()).norm() for each in (values, expected))
    assert lost <= 1.02 * allowed


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of what is tested
@pytest.mark.parametrize("bits", [8, 4])
def test_heads_of_zeros_and_of_nan(bits: int) -> None:
    made, slab = make_step(32, bits, 0, torch.bfloat16, 4, 1), make_slab(32, bits, 0, torch.bfloat16, 4)
    sums = torch.zeros(1, B, KV_HEADS * 32, device=DEVICE)
    sums[0, 1, 5] = torch.nan
    sums[0, 2, 7] = torch.inf
    made.heads(Parts(randn(1, B, HEADS * 32)), Parts(sums), Parts(sums), slab)
    assert slab.value_scales is not None
    zero = (2 ** (bits - 1)) * (0x11 if bits == 4 else 1)
    assert (slab.values[0, 0, 1] == zero).all()
    assert slab.value_scales[0, 0, 1].isfinite().all()
    assert slab.value_scales[1:, 0, 1].isnan().all()
    assert slab.value_scales[1:, 1, 1].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "bits", "group"), CACHES)
def test_attention_over_every_split(head_dim: int, bits: int, group: int, dtype: torch.dtype) -> None:
    slots = 150
    slab = make_slab(head_dim, bits, group, dtype, slots, batch=1)
    keys, values = exact(slab, head_dim)
    for position in (0, 63, 140, 230):  # one key, a whole block, a short last one, a rolled cache
        made = make_step(head_dim, bits, group, dtype, slots, position, batch=1)
        assert made.splits > 1
        queries = randn(1, HEADS, head_dim, seed=position).to(dtype)
        found = made.attention(queries, slab)
        count = min(position + 1, slots)
        grouped = queries.double().view(1, KV_HEADS, -1, head_dim)
        expected = F.scaled_dot_product_attention(grouped, keys[:, :, :count], values[:, :, :count])
        # weights, values of 8 and 4 bits with several scales, and the result are rounded
        torch.testing.assert_close(
            found.double(), expected.view(1, -1), rtol=0, atol=3 * ROUNDING[dtype] * values.abs().max().item()
        )
        assert torch.equal(made.attention(queries, slab), found)


def test_attention_of_many_heads_to_one() -> None:
    made = replace(make_step(16, 16, 0, torch.bfloat16, 70, 68, batch=2), n_heads=20, n_kv_heads=1)
    vectors = randn(2, 2, 1, 70, 16).to(torch.bfloat16)
    queries = randn(2, 20, 16, seed=3).to(torch.bfloat16)
    found = made.attention(queries, Slab(vectors[0], vectors[1], None, None, 16))
    keys, values = vectors[:, :, :, :69].double()
    expected = F.scaled_dot_product_attention(queries.double().view(2, 1, 20, 16), keys, values)
    torch.testing.assert_close(found.double(), expected.view(2, -1), rtol=0, atol=3e-2)


def test_splits_fill_a_gpu_and_have_work() -> None:
    short = make_step(128, 16, 0, torch.bfloat16, 64, 1)
    assert short.splits == 1
    for batch in (1, 2, 4, 8, 16, 32, 64):
        made = replace(short, batch=batch, n_kv_heads=8, slots=32768)
        assert 370 <= made.splits * batch * 8 <= 1600


def test_a_compiled_module_gives_the_same() -> None:
    weight = quantize(randn(48, 64).cpu(), SCHEMES["int4-g32"], torch.bfloat16).to(DEVICE)
    packed = ops.prepare(weight, "triton")

    def users(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(ops.linear(x, packed)) * 2

    x = randn(3, 64).to(torch.bfloat16)
    assert torch.equal(torch.compile(users, backend="eager", fullgraph=True)(x), users(x))
