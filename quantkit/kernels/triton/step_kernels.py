"""What a decoded token needs beside its linears, for CUDA and for Triton's interpreter. Importing this imports Triton.

B sequences with one new token each; D elements of a head. Every linear comes as parts (splits, B, N), which are added
in the order of the splits, with its bias, and rounded to the compute dtype: what the operators of
`models/decoder.py` round, these kernels round at the same places. Attention alone keeps float32 until its result.

Where the token stands is read from device memory, so that one CUDA graph serves every position.

The interpreter cuts a float32 off where it should round it to bfloat16, and has no product of bfloat16: INTERPRET
rounds by integers, and multiplies in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from calculators.caching import KV_SCALES_TRIED
from quantkit.quantize.vectors import MOST_STEPS, STEPS_APART

_TRIED = tl.constexpr(KV_SCALES_TRIED)
_MOST_STEPS_8, _MOST_STEPS_4 = tl.constexpr(MOST_STEPS[8]), tl.constexpr(MOST_STEPS[4])
_STEPS_APART_8, _STEPS_APART_4 = tl.constexpr(STEPS_APART[8]), tl.constexpr(STEPS_APART[4])
_LEAST_SCALE = tl.constexpr(2.0**-24)  # float16's
_GREATEST_SCALE = tl.constexpr(65504.0)
_TO_WHOLE = tl.constexpr(1.5 * 2.0**23)  # added and taken off again, it rounds to the nearest even integer
_POWER = tl.constexpr(2.0**23)  # its mantissa holds whole numbers as they are
_POWER_BITS = tl.constexpr((127 + 23) << 23)
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _rounded(x: tl.tensor, dtype: tl.constexpr, INTERPRET: tl.constexpr) -> tl.tensor:
    """Return float32 x as `dtype` holds it, in float32."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        kept = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        rounded = kept.to(tl.float32, bitcast=True)
    else:
        rounded = x.to(dtype).to(tl.float32)
    return rounded


@triton.jit
def _product(a: tl.tensor, b: tl.tensor, dtype: tl.constexpr, INTERPRET: tl.constexpr) -> tl.tensor:
    """Return a @ b in float32, for factors that `dtype` holds."""
    if INTERPRET:
        product = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        product = tl.dot(a.to(dtype), b.to(dtype))
    return product


@triton.jit
def _total(
    parts: tl.tensor, bias: tl.tensor, at: tl.tensor, columns: tl.tensor, mask: tl.tensor, count: tl.tensor,
    dtype: tl.constexpr, SPLITS: tl.constexpr, INTERPRET: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Add SPLITS parts of `count` elements each, and the bias of `columns`; rounded, in float32."""
    total = tl.load(parts + at, mask=mask, other=0.0).to(tl.float32)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(parts + split * count + at, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        total += tl.load(bias + columns, mask=mask, other=0.0).to(tl.float32)
    return _rounded(total, dtype, INTERPRET)


@triton.jit
def norm_kernel(
    x: tl.tensor, parts: tl.tensor, bias: tl.tensor, weight: tl.tensor, out: tl.tensor, eps: tl.tensor,
    SPLITS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
) -> None:  # fmt: skip
    """Add a linear to a row of x (B, WIDTH) in place, and write its RMSNorm. SPLITS is 0 where there is none to add."""
    dtype: tl.constexpr = x.dtype.element_ty
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    mask = columns < WIDTH
    at = row * WIDTH + columns
    values = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if SPLITS > 0:
        count = tl.num_programs(0) * WIDTH
        added = _total(parts, bias, at, columns, mask, count, dtype, SPLITS, INTERPRET)
        values = _rounded(values + added, dtype, INTERPRET)
        tl.store(x + at, values, mask=mask)
    scale = tl.rsqrt(tl.sum(values * values, axis=0) / WIDTH + eps)
    normed = _rounded(values * scale, dtype, INTERPRET)
    normed *= tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, _rounded(normed, dtype, INTERPRET), mask=mask)


@triton.jit
def swiglu_kernel(
    gate: tl.tensor, up: tl.tensor, gate_bias: tl.tensor, up_bias: tl.tensor, out: tl.tensor,
    gate_stride: tl.tensor, up_stride: tl.tensor, width: tl.tensor,
    GATE_SPLITS: tl.constexpr, UP_SPLITS: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
) -> None:  # fmt: skip
    """Write silu(gate) * up (B, width) of parts whose rows lie so many elements apart. Program (block, row)."""
    dtype: tl.constexpr = out.dtype.element_ty
    row, rows = tl.program_id(1), tl.num_programs(1)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    gates = _total(
        gate, gate_bias, row * gate_stride + columns, columns, mask, rows * gate_stride,
        dtype, GATE_SPLITS, INTERPRET,
    )  # fmt: skip
    ups = _total(
        up, up_bias, row * up_stride + columns, columns, mask, rows * up_stride, dtype, UP_SPLITS, INTERPRET
    )
    activated = _rounded(gates / (1.0 + tl.exp(-gates)), dtype, INTERPRET)
    tl.store(out + row * width + columns, _rounded(activated * ups, dtype, INTERPRET), mask=mask)


@triton.jit
def _rotated(
    first: tl.tensor, second: tl.tensor, cosines: tl.tensor, sines: tl.tensor,
    dtype: tl.constexpr, INTERPRET: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return both halves of heads after half-split RoPE, each product and the sum rounded."""
    ahead = _rounded(first * cosines, dtype, INTERPRET) + _rounded(-second * sines, dtype, INTERPRET)
    behind = _rounded(second * cosines, dtype, INTERPRET) + _rounded(first * sines, dtype, INTERPRET)
    return _rounded(ahead, dtype, INTERPRET), _rounded(behind, dtype, INTERPRET)


@triton.jit
def _whole(x: tl.tensor) -> tl.tensor:
    """Round |x| < 2**22 to the nearest integer, halves to the even one."""
    return (x + _TO_WHOLE) - _TO_WHOLE


@triton.jit
def _store_codes(
    values: tl.tensor, codes: tl.tensor, scales: tl.tensor, at: tl.tensor, mask: tl.tensor,
    BITS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Quantize rows (ROWS, BLOCK), of which WIDTH elements count, as `quantize/vectors.py` does, to places `at`."""
    GROUPS: tl.constexpr = BLOCK // GROUP
    ROWS: tl.constexpr = values.shape[0]
    low: tl.constexpr = -(2.0 ** (BITS - 1))
    high: tl.constexpr = 2.0 ** (BITS - 1) - 1
    MOST: tl.constexpr = _MOST_STEPS_8 if BITS == 8 else _MOST_STEPS_4
    APART: tl.constexpr = _STEPS_APART_8 if BITS == 8 else _STEPS_APART_4
    groups = tl.reshape(values, (ROWS, GROUPS, GROUP))
    least, most = tl.min(groups, axis=2), tl.max(groups, axis=2)  # (ROWS, GROUPS)
    peak = tl.maximum(most, -least)
    best = tl.zeros_like(peak)
    best_error = tl.full((ROWS, GROUPS), float("inf"), tl.float32)
    for number in tl.static_range(_TRIED):
        scale = tl.div_rn(peak, tl.full(peak.shape, MOST - number * APART, tl.float32))
        scale = tl.minimum(tl.maximum(scale, _LEAST_SCALE), _GREATEST_SCALE).to(tl.float16).to(tl.float32)
        scale = tl.where(least + most >= 0, -scale, scale)
        exact = groups * tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)[:, :, None]
        lost = _whole(tl.minimum(tl.maximum(exact, low), high)) - exact
        error = tl.sqrt_rn(tl.sum(lost * lost, axis=2)) * tl.abs(scale)
        better = error < best_error
        if number == 0:
            better = error == error
        best = tl.where(better, scale, best)
        best_error = tl.where(better, error, best_error)
    best += tl.sum(groups * 0.0, axis=2)  # adds 0, or NaN where the group is not finite
    exact = groups * tl.div_rn(tl.full(best.shape, 1.0, tl.float32), best)[:, :, None]
    found = (_whole(tl.minimum(tl.maximum(exact, low), high)) - low).to(tl.int32)
    found = tl.reshape(found, (ROWS, BLOCK))
    if BITS == 4:
        even, odd = tl.split(tl.reshape(found, (ROWS, BLOCK // 2, 2)))
        found = even | (odd << 4)
    BYTES: tl.constexpr = BLOCK * BITS // 8
    WIDTH_BYTES: tl.constexpr = WIDTH * BITS // 8
    places = tl.arange(0, BYTES)[None, :]
    tl.store(
        codes + at[:, None] * WIDTH_BYTES + places, found.to(tl.uint8),
        mask=mask[:, None] & (places < WIDTH_BYTES),
    )  # fmt: skip
    KEPT: tl.constexpr = (WIDTH + GROUP - 1) // GROUP
    numbers = tl.arange(0, GROUPS)[None, :]
    tl.store(
        scales + at[:, None] * KEPT + numbers, best.to(tl.float16), mask=mask[:, None] & (numbers < KEPT)
    )


@triton.jit
def _heads(
    parts: tl.tensor, bias: tl.tensor, stride: tl.tensor, cosines: tl.tensor, sines: tl.tensor,
    position: tl.tensor, rotation: tl.tensor, out: tl.tensor, scales: tl.tensor, slot: tl.tensor,
    slots: tl.tensor, batch: tl.tensor,
    dtype: tl.constexpr, SPLITS: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, ROPE: tl.constexpr,
    INTERPRET: tl.constexpr,
) -> None:  # fmt: skip
    """Finish ROWS of the B * HEADS heads that a linear gave, and write each to its slot in `out`.

    RoPE where ROPE, then `rotation` (WIDTH, WIDTH) where there is one, then codes of BITS where that is less than 16.
    """
    HALF: tl.constexpr = WIDTH // 2
    heads = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = heads < batch * HEADS
    first_column = (heads % HEADS) * WIDTH
    start = (heads // HEADS) * stride
    count = batch * stride
    at = heads.to(tl.int64) * slots + slot
    if ROPE:
        places = tl.arange(0, BLOCK // 2)
        inside = places < HALF
        both = mask[:, None] & inside[None, :]
        columns = first_column[:, None] + places[None, :]
        first = _total(parts, bias, start[:, None] + columns, columns, both, count, dtype, SPLITS, INTERPRET)
        columns += HALF
        second = _total(parts, bias, start[:, None] + columns, columns, both, count, dtype, SPLITS, INTERPRET)
        angle = position * HALF + places
        cosine = tl.load(cosines + angle, mask=inside, other=0.0).to(tl.float32)[None, :]
        sine = tl.load(sines + angle, mask=inside, other=0.0).to(tl.float32)[None, :]
        first, second = _rotated(first, second, cosine, sine, dtype, INTERPRET)
        if rotation is None:
            place = out + at[:, None] * WIDTH + places[None, :]
            tl.store(place, first, mask=both)
            tl.store(place + HALF, second, mask=both)
        else:
            whole = tl.arange(0, BLOCK)[None, :]
            entry = rotation + places[:, None] * WIDTH + whole
            there = inside[:, None] & (whole < WIDTH)
            values = _product(first, tl.load(entry, mask=there, other=0.0), dtype, INTERPRET)
            entry += HALF * WIDTH
            values += _product(second, tl.load(entry, mask=there, other=0.0), dtype, INTERPRET)
            values = _rounded(values, dtype, INTERPRET)
            if BITS < 16:
                _store_codes(values, out, scales, at, mask, BITS, GROUP, WIDTH, BLOCK)
            else:
                tl.store(out + at[:, None] * WIDTH + whole, values, mask=mask[:, None] & (whole < WIDTH))
    else:
        whole = tl.arange(0, BLOCK)[None, :]
        columns = first_column[:, None] + whole
        both = mask[:, None] & (whole < WIDTH)
        values = _total(parts, bias, start[:, None] + columns, columns, both, count, dtype, SPLITS, INTERPRET)
        if BITS < 16:
            _store_codes(values, out, scales, at, mask, BITS, GROUP, WIDTH, BLOCK)
        else:
            tl.store(out + at[:, None] * WIDTH + whole, values, mask=both)


@triton.jit
def heads_kernel(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, q_bias: tl.tensor, k_bias: tl.tensor, v_bias: tl.tensor,
    q_stride: tl.tensor, k_stride: tl.tensor, v_stride: tl.tensor, cosines: tl.tensor, sines: tl.tensor,
    position: tl.tensor, q_rotation: tl.tensor, k_rotation: tl.tensor, queries: tl.tensor, keys: tl.tensor,
    values: tl.tensor, key_scales: tl.tensor, value_scales: tl.tensor, slots: tl.tensor, batch: tl.tensor,
    Q_SPLITS: tl.constexpr, K_SPLITS: tl.constexpr, V_SPLITS: tl.constexpr, HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, INTERPRET: tl.constexpr,
) -> None:  # fmt: skip
    """Write queries (B, HEADS, WIDTH), and keys and values to the token's slot. Program (ROWS heads, q, k or v).

    A head's elements are `WIDTH`; `BLOCK` is the next power of two, GROUP what shares a scale, padded likewise.
    """
    dtype: tl.constexpr = queries.dtype.element_ty
    kind = tl.program_id(1)
    here = tl.load(position).to(tl.int32)
    slot = here % slots
    if kind == 0:
        _heads(
            q, q_bias, q_stride, cosines, sines, here, q_rotation, queries, key_scales, 0, 1, batch,
            dtype, Q_SPLITS, HEADS, WIDTH, BLOCK, ROWS, 16, GROUP, True, INTERPRET,
        )  # fmt: skip
    elif kind == 1:
        _heads(
            k, k_bias, k_stride, cosines, sines, here, k_rotation, keys, key_scales, slot, slots, batch,
            dtype, K_SPLITS, KV_HEADS, WIDTH, BLOCK, ROWS, BITS, GROUP, True, INTERPRET,
        )  # fmt: skip
    else:
        _heads(
            v, v_bias, v_stride, cosines, sines, here, None, values, value_scales, slot, slots, batch,
            dtype, V_SPLITS, KV_HEADS, WIDTH, BLOCK, ROWS, BITS, GROUP, False, INTERPRET,
        )  # fmt: skip
