"""What tokens need beside their linears, for CUDA and for Triton's interpreter. Importing this imports Triton.

B sequences with T new tokens each, R = B T rows. Every linear comes as parts (splits, R, N), which are added in the
order of the splits, with its bias, and rounded to the compute dtype: what the operators of `models/decoder.py` round,
these kernels round at the same places. Attention alone keeps float32 until its result.

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
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _follow(EARLY: tl.constexpr) -> None:
    """Wait until the kernel ahead has written all it writes, where this one began EARLY; then let the next one begin.

    Whatever begins early waits before it reads or writes what others do: what waits for the kernel ahead has then
    waited for all before.
    """
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


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
    """Add a linear to a row of x (R, WIDTH) in place, and write its RMSNorm. SPLITS is 0 where there is none to add."""
    dtype: tl.constexpr = x.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < WIDTH
    at = row * WIDTH + columns
    values = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    weights = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    if SPLITS > 0:
        count = tl.num_programs(0).to(tl.int64) * WIDTH
        added = _total(parts, bias, at, columns, mask, count, dtype, SPLITS, INTERPRET)
        values = _rounded(values + added, dtype, INTERPRET)
        tl.store(x + at, values, mask=mask)
    scale = tl.rsqrt(tl.sum(values * values, axis=0) / WIDTH + eps)
    normed = _rounded(values * scale, dtype, INTERPRET)
    tl.store(out + at, _rounded(normed * weights, dtype, INTERPRET), mask=mask)


@triton.jit
def _silu_times(gate: tl.tensor, up: tl.tensor, dtype: tl.constexpr, INTERPRET: tl.constexpr) -> tl.tensor:
    """Return silu(gate) * up in float32, both products rounded to `dtype`."""
    activated = _rounded(gate / (1.0 + tl.exp(-gate)), dtype, INTERPRET)
    return _rounded(activated * up, dtype, INTERPRET)


@triton.jit
def swiglu_kernel(
    gate: tl.tensor, up: tl.tensor, gate_bias: tl.tensor, up_bias: tl.tensor, out: tl.tensor,
    gate_stride: tl.tensor, up_stride: tl.tensor, width: tl.tensor,
    GATE_SPLITS: tl.constexpr, UP_SPLITS: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
) -> None:  # fmt: skip
    """Write silu(gate) * up (R, width) of parts whose rows lie so many elements apart. Program (row, block)."""
    dtype: tl.constexpr = out.dtype.element_ty
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    gates = _total(
        gate, gate_bias, row * gate_stride + columns, columns, mask, rows * gate_stride,
        dtype, GATE_SPLITS, INTERPRET,
    )  # fmt: skip
    ups = _total(
        up, up_bias, row * up_stride + columns, columns, mask, rows * up_stride, dtype, UP_SPLITS, INTERPRET
    )
    tl.store(out + row * width + columns, _silu_times(gates, ups, dtype, INTERPRET), mask=mask)


@triton.jit
def _hadamard(x: tl.tensor, BLOCK: tl.constexpr, ORDER: tl.constexpr, STAGES: tl.constexpr) -> tl.tensor:
    """Multiply each ORDER = 2**STAGES elements of x (BLOCK,) by the Hadamard matrix.

    A stage takes the last bit of an element's place, adds and subtracts, and puts it first: once all bits went round
    they stand as before.
    """
    y = tl.reshape(x, (BLOCK // ORDER, ORDER))
    for _ in tl.static_range(STAGES):
        even, odd = tl.split(tl.reshape(y, (BLOCK // ORDER, ORDER // 2, 2)))
        y = tl.reshape(tl.permute(tl.join(even + odd, even - odd), (0, 2, 1)), (BLOCK // ORDER, ORDER))
    return tl.reshape(y, (BLOCK,))


@triton.jit
def _whole(x: tl.tensor) -> tl.tensor:
    """Round |x| < 2**22 to the nearest integer, halves to the even one."""
    return (x + _TO_WHOLE) - _TO_WHOLE


@triton.jit
def _store_codes(
    values: tl.tensor, codes: tl.tensor, scales: tl.tensor, at: tl.tensor,
    BITS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Quantize a vector (BLOCK,), of which WIDTH elements count, as `quantize/vectors.py` does, to place `at`."""
    GROUPS: tl.constexpr = BLOCK // GROUP
    low: tl.constexpr = -(2.0 ** (BITS - 1))
    high: tl.constexpr = 2.0 ** (BITS - 1) - 1
    MOST: tl.constexpr = _MOST_STEPS_8 if BITS == 8 else _MOST_STEPS_4
    APART: tl.constexpr = _STEPS_APART_8 if BITS == 8 else _STEPS_APART_4
    groups = tl.reshape(values, (GROUPS, GROUP))
    least, most = tl.min(groups, axis=1), tl.max(groups, axis=1)  # (GROUPS,)
    peak = tl.maximum(most, -least)
    ones = tl.full((GROUPS,), 1.0, tl.float32)
    best = tl.zeros((GROUPS,), tl.float32)
    best_error = tl.full((GROUPS,), float("inf"), tl.float32)
    for number in tl.static_range(_TRIED):
        scale = tl.div_rn(peak, (MOST - number * APART) * ones)
        scale = tl.minimum(tl.maximum(scale, _LEAST_SCALE), _GREATEST_SCALE).to(tl.float16).to(tl.float32)
        scale = tl.where(least + most >= 0, -scale, scale)
        exact = groups * tl.div_rn(ones, scale)[:, None]
        lost = _whole(tl.minimum(tl.maximum(exact, low), high)) - exact
        error = tl.sqrt_rn(tl.sum(lost * lost, axis=1)) * tl.abs(scale)
        better = error < best_error
        best = tl.where(better, scale, best)
        best_error = tl.where(better, error, best_error)
    best += tl.sum(groups * 0.0, axis=1)  # adds 0, or NaN where the group is not finite
    exact = groups * tl.div_rn(ones, best)[:, None]
    found = tl.reshape((_whole(tl.minimum(tl.maximum(exact, low), high)) - low).to(tl.int32), (BLOCK,))
    if BITS == 4:
        even, odd = tl.split(tl.reshape(found, (BLOCK // 2, 2)))
        found = even | (odd << 4)
    WIDTH_BYTES: tl.constexpr = WIDTH * BITS // 8
    KEPT: tl.constexpr = (WIDTH + GROUP - 1) // GROUP
    places, numbers = tl.arange(0, BLOCK * BITS // 8), tl.arange(0, GROUPS)
    tl.store(codes + at * WIDTH_BYTES + places, found.to(tl.uint8), mask=places < WIDTH_BYTES)
    tl.store(scales + at * KEPT + numbers, best.to(tl.float16), mask=numbers < KEPT)


@triton.jit
def _head(
    parts: tl.tensor, bias: tl.tensor, stride: tl.tensor, head: tl.tensor, row: tl.tensor, rows: tl.tensor,
    cosines: tl.tensor, sines: tl.tensor, position: tl.tensor, out: tl.tensor, scales: tl.tensor, at: tl.tensor,
    dtype: tl.constexpr, SPLITS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROPE: tl.constexpr,
    ORDER: tl.constexpr, STAGES: tl.constexpr, FACTOR: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    INTERPRET: tl.constexpr,
) -> None:  # fmt: skip
    """Finish one head of one of a linear's rows, and write it to place `at` of `out`.

    RoPE where ROPE; then the Hadamard matrix of ORDER times FACTOR; then codes of BITS where that is less than 16.
    """
    HALF: tl.constexpr = WIDTH // 2
    places = tl.arange(0, BLOCK)
    inside = places < WIDTH
    columns = head * WIDTH + places
    start = row * stride
    count = rows * stride
    x = _total(parts, bias, start + columns, columns, inside, count, dtype, SPLITS, INTERPRET)
    if ROPE:
        behind = places >= HALF
        columns += tl.where(behind, -HALF, HALF)
        other = _total(parts, bias, start + columns, columns, inside, count, dtype, SPLITS, INTERPRET)
        angle = position * HALF + tl.where(behind, places - HALF, places)
        cosine = tl.load(cosines + angle, mask=inside, other=0.0).to(tl.float32)
        sine = tl.load(sines + angle, mask=inside, other=0.0).to(tl.float32)
        turned = _rounded(tl.where(behind, other, -other) * sine, dtype, INTERPRET)
        x = _rounded(_rounded(x * cosine, dtype, INTERPRET) + turned, dtype, INTERPRET)
    if ORDER > 1:
        x = _rounded(_hadamard(x, BLOCK, ORDER, STAGES) * FACTOR, dtype, INTERPRET)
    if BITS < 16:
        _store_codes(x, out, scales, at, BITS, GROUP, WIDTH, BLOCK)
    else:
        tl.store(out + at * WIDTH + places, x, mask=inside)


@triton.jit
def heads_kernel(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, q_bias: tl.tensor, k_bias: tl.tensor, v_bias: tl.tensor,
    q_stride: tl.tensor, k_stride: tl.tensor, v_stride: tl.tensor, cosines: tl.tensor, sines: tl.tensor,
    position: tl.tensor, queries: tl.tensor, keys: tl.tensor, values: tl.tensor, key_scales: tl.tensor,
    value_scales: tl.tensor, slots: tl.tensor, tokens: tl.tensor,
    Q_SPLITS: tl.constexpr, K_SPLITS: tl.constexpr, V_SPLITS: tl.constexpr, HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ORDER: tl.constexpr,
    STAGES: tl.constexpr, Q_FACTOR: tl.constexpr, K_FACTOR: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, INTERPRET: tl.constexpr, EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """Write queries (B, T, HEADS, WIDTH), and keys and values to their tokens' slots. Program (token, head).

    The heads of a token's queries, keys and values follow each other. A head's elements are WIDTH; BLOCK is the next
    power of two, GROUP what shares a scale, padded likewise.
    """
    _follow(EARLY)
    ALL: tl.constexpr = HEADS + 2 * KV_HEADS
    dtype: tl.constexpr = queries.dtype.element_ty
    row, head = tl.program_id(0) // ALL, tl.program_id(0) % ALL
    here = tl.load(position).to(tl.int32) + row % tokens
    sequence, slot = (row // tokens).to(tl.int64), here % slots
    row, rows = row.to(tl.int64), (tl.num_programs(0) // ALL).to(tl.int64)
    if head < HEADS:
        at = row * HEADS + head
        _head(
            q, q_bias, q_stride, head, row, rows, cosines, sines, here, queries, key_scales, at, dtype,
            Q_SPLITS, WIDTH, BLOCK, True, ORDER, STAGES, Q_FACTOR, 16, GROUP, INTERPRET,
        )  # fmt: skip
    elif head < HEADS + KV_HEADS:
        head -= HEADS
        at = (sequence * KV_HEADS + head) * slots + slot
        _head(
            k, k_bias, k_stride, head, row, rows, cosines, sines, here, keys, key_scales, at, dtype, K_SPLITS,
            WIDTH, BLOCK, True, ORDER, STAGES, K_FACTOR, BITS, GROUP, INTERPRET,
        )  # fmt: skip
    else:
        head -= HEADS + KV_HEADS
        at = (sequence * KV_HEADS + head) * slots + slot
        _head(
            v, v_bias, v_stride, head, row, rows, cosines, sines, here, values, value_scales, at, dtype,
            V_SPLITS, WIDTH, BLOCK, False, 1, 0, 1.0, BITS, GROUP, INTERPRET,
        )  # fmt: skip
