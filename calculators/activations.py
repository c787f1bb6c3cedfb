"""What the forward pass asks of the device's memory, request by request, beside weights and KV cache.

This is `quantkit/models/decoder.py` on a GPU with sizes in place of tensors: each function mirrors the
one of its name there, in `models/attention.py`, `models/kv_cache.py`, `kernels/reference.py` or
`quantize/vectors.py`, and takes and drops the same tensors in the same order. Played on an allocator it
gives peaks; `quantkit measure --trace` holds it to the real decoder.

Shapes are written in the letters of `calculators/tape.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

from calculators.allocator import Block
from calculators.tape import Layer, Matrix, Tape
from calculators.units import ceil_div
from calculators.weights import Packing, groups_per_row

FP32 = 4  # bytes
INT32 = 4
INT64 = 8  # of token ids and positions
BOOL = 1
HALF = 2

PIECE_ELEMENTS = 1 << 22  # a matrix, or a layer's cache, is dequantized so many elements at a time
SCORE_ELEMENTS = 1 << 24  # plain attention holds so many scores at a time
KV_SCALES_TRIED = 8  # for each group of a quantized key or value
_ZEROS_PER_WORD = 8
_NF4_TABLE_BYTES = 256 * 2 * FP32  # both values of each byte
_NESTED_TABLE_BYTES = 256 * FP32


def piece_rows(cols: int) -> int:
    """Return the rows of a matrix that are dequantized at once."""
    return max(1, PIECE_ELEMENTS // cols)


def piece_tokens(elements: int) -> int:
    """Return the cached tokens that are dequantized at once, each of `elements` in one layer."""
    return max(1, PIECE_ELEMENTS // elements)


def score_rows(heads: int, keys: int) -> int:
    """Return the queries whose plain attention scores are held at once; `heads` is of all sequences."""
    return max(1, SCORE_ELEMENTS // (heads * keys))


def flash_runs(element_bytes: int, head_dim: int) -> bool:
    """Tell whether FlashAttention-2 takes this dtype and head."""
    return element_bytes == HALF and head_dim % 8 == 0 and head_dim <= 256


def fixtures(tape: Tape, cache_parts: Sequence[int]) -> None:
    """Play what is made before the first token and stays: rotations, the cache, its scratch, token ids."""
    letters = tape.letters
    tape.take("rope frequencies", letters["D"] // 2, FP32)
    for nbytes in cache_parts:
        tape.take("KV cache", nbytes)
    if tape.converts:
        vectors = 2, letters["B"], letters["N"], tape.slots
        tape.take("one layer's keys and values", *vectors, letters["D"], tape.element_bytes)
    if tape.cache.bits < 16:
        for name in ("queries' rotation", "keys' rotation"):
            tape.new(name, "D D", tape.element_bytes)
    tape.take("token ids", letters["B"], tape.cache.max_tokens, INT64)


def prefill(tape: Tape, calls: Sequence[tuple[int, int]]) -> None:
    """Play a prompt in chunks of (tokens, tokens before), and its last token's logits.

    Where a chunk leaves the allocator as an earlier one of its sizes did, what lies between comes again and
    again until the sizes change: as many whole rounds as there are left are passed over.
    """
    states = None
    for _, alike in groupby(calls, key=lambda call: _sizes(tape, *call)):
        left = list(alike)
        seen: dict[object, int] = {}
        while left:
            following = forward(tape, *left[0])
            tape.drop(states)
            states, left = following, left[1:]
            state = tape.allocator.state()
            if state in seen:
                left = left[: len(left) % (seen[state] - len(left))]
                seen.clear()
            seen[state] = len(left)
    scores = logits(tape)
    tape.drop(states)
    tape.drop(scores)


def decode(tape: Tape, length: int) -> None:
    """Play one token after `length` others, and its logits."""
    states = forward(tape, 1, length)
    scores = logits(tape)
    tape.drop(states, scores)


def _sizes(tape: Tape, tokens: int, length: int) -> tuple[int, ...]:
    """Return all that the sizes of a chunk's requests hang on."""
    keys = _keys(tape, tokens, length)
    if tape.model.attention == "math" or tape.rolls:
        return (tokens, keys, min(length, 1))
    if tape.cache.bits >= 16:
        return (tokens,)
    step = piece_tokens(_token_elements(tape))
    return tokens, min(keys, step), keys % step


def forward(tape: Tape, tokens: int, length: int) -> Block | None:
    """Play one call of the decoder's `forward` after `length` cached tokens; return its final states."""
    model, e = tape.model, tape.element_bytes
    tape.size(tokens, _keys(tape, tokens, length))
    batch = tape.letters["B"]
    ids = tape.new("chunk's token ids", "B T", INT64) if batch > 1 and tape.cache.max_tokens > 1 else None
    x = tape.new("residual", "B T H", e)
    tape.drop(ids)
    rope = _rope(tape)
    settled: Layer | None = None
    for layer in model.layers:
        if layer is not settled:
            before = tape.allocator.reserved
            tape.drop(_attention(tape, layer, length))
            tape.drop(_ffn(tape, layer))
            # a layer that found all it needs in what is reserved leaves all as it was: so would its like
            settled = layer if tape.allocator.reserved == before else None
    states = _rms_norm(tape, "final states")
    tape.drop(x, *rope)
    return states


def logits(tape: Tape) -> Block | None:
    """Play the output head on each sequence's last position; return float32 logits."""
    narrow = _linear(tape, tape.model.head, "logits", "B V")
    if tape.element_bytes == FP32:
        return narrow
    wide = tape.new("float32 logits", "B V", FP32)
    tape.drop(narrow)
    return wide


def _rope(tape: Tape) -> tuple[Block | None, ...]:
    """Cosines and sines, made in float32."""
    e, new, drop = tape.element_bytes, tape.new, tape.drop
    positions = new("positions", "T", FP32)
    half = tape.take("angles", tape.letters["T"], tape.letters["D"] // 2, FP32)
    angles = new("angles", "T D", FP32)
    drop(half)
    tables = []
    for name in ("cosines", "sines"):
        table = new(name, "T D", FP32)
        if e < FP32:
            wide, table = table, new(name, "T D", e)
            drop(wide)
        tables.append(table)
    drop(positions, angles)
    return tuple(tables)


def _rms_norm(tape: Tape, name: str = "normed states") -> Block | None:
    e, new, drop = tape.element_bytes, tape.new, tape.drop
    wide = new("states in float32", "B T H", FP32) if e < FP32 else None
    squares = new("squares", "B T H", FP32)
    scale = new("norms", "B T", FP32)
    drop(squares)
    normed = new(name, "B T H", FP32)
    if e < FP32:
        product, normed = normed, new(name, "B T H", e)
        drop(product)
    drop(wide, scale)
    return normed


def _attention(tape: Tape, layer: Layer, length: int) -> Block | None:
    h = _rms_norm(tape)
    q = _rotate(tape, _linear(tape, layer.q, "queries", "B T A D"), "A")
    k = _rotate(tape, _linear(tape, layer.k, "keys", "B T N D"), "N")
    v = _linear(tape, layer.v, "values", "B T N D")
    tape.drop(h)
    if tape.cache.bits < 16:
        q = _replaced(tape, q, "rotated queries", "B T A D")
        k = _replaced(tape, k, "rotated keys", "B T N D")
    joined = _extend(tape, length)
    viewed = tape.rolls and length == 0 and tape.letters["T"] > 1  # these keys are attended to as they are
    if not viewed:
        tape.drop(k, v)
    out = _flash(tape) if tape.model.attention == "flash" else _math(tape, viewed)
    tape.drop(q, *joined)
    if viewed:
        tape.drop(k, v)
    projected = _linear(tape, layer.o, "attention's projection", "B T H")
    tape.drop(out)
    return projected


def _rotate(tape: Tape, x: Block | None, heads: str) -> Block | None:
    """In place, beside the swapped halves."""
    letters = tape.letters
    vectors = letters["B"], letters["T"], letters[heads]
    negated = tape.take("negated half", *vectors, letters["D"] // 2, tape.element_bytes)
    swapped = tape.take("swapped halves", *vectors, letters["D"], tape.element_bytes)
    tape.drop(negated)
    tape.drop(swapped)
    return x


def _replaced(tape: Tape, old: Block | None, name: str, shape: str) -> Block | None:
    new = tape.new(name, shape, tape.element_bytes)
    tape.drop(old)
    return new


def _flash(tape: Tape) -> Block | None:
    """The output, float32 log-sum-exp, and the state of a random generator that is not used."""
    out = tape.new("attention", "B T A D", tape.element_bytes)
    beside = tape.new("log-sum-exp", "B A T", FP32), tape.take("seed", 16), tape.take("offset", 8)
    tape.drop(*beside)
    return out


def _math(tape: Tape, strided: bool) -> Block | None:
    """Plain scores, some queries at a time; `strided` keys and values of several sequences are copied first."""
    e, letters = tape.element_bytes, tape.letters
    copied = strided and letters["B"] > 1 and letters["N"] > 1
    keys = tape.new("keys by head", "B S N D", e) if copied else None
    values = tape.new("values by head", "B S N D", e) if copied else None
    out = tape.new("attention", "B T A D", e)
    rows = score_rows(letters["B"] * letters["A"], letters["S"])
    _in_pieces(tape, letters["T"], rows, lambda queries: _math_rows(tape, queries))
    tape.drop(keys, values)
    return out


def _math_rows(tape: Tape, queries: int) -> None:
    e, take, drop, letters = tape.element_bytes, tape.take, tape.drop, tape.letters
    shape = letters["B"], letters["A"], queries, letters["S"]
    vectors = letters["B"], letters["A"], queries, letters["D"]
    many, batched = letters["T"] > 1, letters["B"] > 1
    grouped = None
    if (queries > 1 and letters["A"] > letters["N"]) or (many and batched and letters["N"] > 1):
        grouped = take("queries by group", *vectors, e)
    scores = take("scores", *shape, e)
    tape.workspace()
    if e < FP32:
        narrow, scores = scores, take("float32 scores", *shape, FP32)
        drop(narrow)
    drop(grouped)
    if many:
        _hidden(tape, queries)
    wide, probabilities = scores, take("softmax", *shape, FP32)
    if e < FP32:
        exact, probabilities = probabilities, take("probabilities", *shape, e)
        drop(exact)
    drop(wide)
    drop(take("attention by head", *vectors, e))
    drop(probabilities)


def _hidden(tape: Tape, queries: int) -> None:
    """The mask of some queries, and what it is made from."""
    take, keys = tape.take, tape.letters["S"]
    columns, rows = take("key positions", keys, INT64), take("query positions", queries, INT64)
    mask = take("mask", queries, keys, BOOL)
    if tape.rolls:
        first = take("first visible keys", queries, INT64)
        tape.drop(first, take("keys outside the window", queries, keys, BOOL))
    tape.drop(columns, rows, mask)


def _ffn(tape: Tape, layer: Layer) -> Block | None:
    h = _rms_norm(tape)
    gate = _linear(tape, layer.gate, "gate", "B T F")
    up = _linear(tape, layer.up, "up", "B T F")
    tape.drop(h)
    tape.drop(up)
    down = _linear(tape, layer.down, "FFN's projection", "B T H")
    tape.drop(gate)
    return down


def _linear(tape: Tape, matrix: Matrix, name: str, shape: str) -> Block | None:
    dequantized = _dequantize(tape, matrix) if matrix.quantized else None
    out = tape.new(name, shape, tape.element_bytes)
    tape.workspace()
    tape.drop(dequantized)
    return out


def _dequantize(tape: Tape, matrix: Matrix) -> Block | None:
    """A matrix in the compute dtype, filled piece by piece."""
    packing = matrix.packing
    out = tape.take("dequantized matrix", matrix.rows, matrix.cols, tape.element_bytes)
    if packing.flat:
        elements = matrix.rows * matrix.cols
        _in_pieces(tape, elements, PIECE_ELEMENTS, lambda count: _nf4_piece(tape, packing, count))
        return out
    groups = groups_per_row(matrix.cols, packing)
    scales = None
    if packing.scale_bits < 32:
        scales = tape.take("scales in float32", matrix.rows, groups, FP32)
    zeros = _zeros(tape, matrix.rows, groups) if packing.zero_bits else None
    _in_pieces(tape, matrix.rows, piece_rows(matrix.cols), lambda rows: _integer_rows(tape, matrix, rows))
    tape.drop(scales, zeros)
    return out


def _integer_rows(tape: Tape, matrix: Matrix, rows: int) -> None:
    values = tape.take("codes in float32", rows, matrix.cols, FP32)
    if matrix.packing.code_bits < 8:
        tape.drop(tape.take("low nibbles", rows, ceil_div(matrix.cols, 2)))
        tape.drop(tape.take("high nibbles", rows, matrix.cols // 2))
    tape.drop(values)


def _zeros(tape: Tape, rows: int, groups: int) -> Block | None:
    """The zero points of a matrix, unpacked and in float32."""
    take, drop = tape.take, tape.drop
    words = ceil_div(rows, _ZEROS_PER_WORD)
    packed = words, groups, INT32
    columns = take("zero points by column", *packed) if groups > 1 and words > 1 else None
    low, high = take("low zero points", *packed), take("high zero points", *packed)
    unpacked = take("zero points", 2, *packed)
    drop(low, high)
    turned = unpacked
    if groups > 1:
        turned = take("zero points by row", rows, groups)
        drop(columns, unpacked)
    zeros = take("zero points in float32", rows, groups, FP32)
    drop(turned)
    return zeros


def _nf4_piece(tape: Tape, packing: Packing, count: int) -> None:
    take, drop = tape.take, tape.drop
    blocks, pairs = ceil_div(count, packing.group), ceil_div(count, 2)
    absmax = None
    if packing.nested_group:
        codes = take("codes of scales", blocks, INT32)
        tape.keep("table of nested scales", _NESTED_TABLE_BYTES)
        absmax = take("scales in float32", blocks, FP32)
        drop(codes)
    indices = take("bytes as indices", pairs, INT32)
    tape.keep("table of NF4 pairs", _NF4_TABLE_BYTES)
    values = take("values in float32", pairs, 2, FP32)
    drop(indices)
    drop(absmax, values)


def _extend(tape: Tape, length: int) -> tuple[Block | None, ...]:
    """Store this chunk's keys and values; return what was joined to attend to."""
    tokens, rolls = tape.letters["T"], tape.rolls
    joined: tuple[Block | None, ...] = ()
    if rolls and tokens > 1 and length:
        _load(tape, min(length, tape.slots))
        joined = (
            tape.new("joined keys", "B S N D", tape.element_bytes),
            tape.new("joined values", "B S N D", tape.element_bytes),
        )
    _store(tape)
    if not (rolls and tokens > 1):
        _load(tape, tape.letters["S"])
    return joined


def _store(tape: Tape) -> None:
    """Quantize this chunk's keys, then its values; plain ones are copied into the slab."""
    if tape.cache.bits < 16:
        for _ in range(2):
            _quantize_vectors(tape, min(tape.letters["T"], tape.slots))


def _quantize_vectors(tape: Tape, tokens: int) -> None:
    """Codes and scales of some tokens' vectors."""
    cache, letters = tape.cache, tape.letters
    heads, head_dim = letters["B"] * letters["N"], letters["D"]
    groups = heads * tokens * (head_dim // (cache.group or head_dim))
    best = _best_scales(tape, groups, heads * head_dim, tokens)
    codes = tape.take("new codes", heads, tokens, head_dim * cache.bits // 8)
    step = piece_tokens(heads * head_dim)
    _in_pieces(tape, tokens, step, lambda piece: _write_codes(tape, groups // tokens * piece, heads * piece))
    scales = tape.take("new scales", groups, HALF)
    tape.drop(best)
    tape.drop(codes, scales)


def _best_scales(tape: Tape, groups: int, token: int, tokens: int) -> Block | None:
    """The scale that loses least of each group, among several; `token` is the elements of a token."""
    e, take, drop, tried = tape.element_bytes, tape.take, tape.drop, KV_SCALES_TRIED
    extremes = [take(name, groups, e) for name in ("minima", "maxima", "signs", "peaks")]
    steps = take("steps", tried, FP32)
    wide = take("scales in float32", tried, groups, FP32)
    stored = take("scales as stored", tried, groups, HALF)
    scales = take("scales in float32", tried, groups, FP32)
    drop(stored)
    drop(wide)
    inverse, errors = take("inverse scales", tried, groups, FP32), take("errors", tried, groups, FP32)
    longest = min(tokens, piece_tokens(2 * tried * token))
    drop(take("vectors in steps, and what rounding loses", 2, tried, longest, token, FP32))
    drop(inverse)
    index = take("best of those tried", groups, INT64)
    drop(errors)
    best = take("best scales", groups, FP32)
    drop(*extremes, steps, scales, index)
    return best


def _write_codes(tape: Tape, groups: int, vectors: int) -> None:
    inverse = tape.take("inverse scales", groups, FP32)
    codes = tape.take("codes in float32", vectors, tape.letters["D"], FP32)
    tape.drop(inverse)
    tape.drop(codes)


def _load(tape: Tape, count: int) -> None:
    """Dequantize a layer's cache into the scratch, piece by piece."""
    if tape.cache.bits < 16:
        token = _token_elements(tape)
        step = piece_tokens(token)
        _in_pieces(tape, count, step, lambda tokens: _dequantize_vectors(tape, tokens * token))


def _token_elements(tape: Tape) -> int:
    """Return the elements of one token's keys and values in one layer."""
    letters = tape.letters
    return 2 * letters["B"] * letters["N"] * letters["D"]


def _dequantize_vectors(tape: Tape, elements: int) -> None:
    """Nibbles are taken out of their bytes, the low ones first; whole bytes are converted in place."""
    if tape.cache.bits < 8:
        tape.drop(tape.take("low nibbles", elements // 2))
        tape.drop(tape.take("high nibbles", elements // 2))


def _keys(tape: Tape, tokens: int, length: int) -> int:
    if tape.rolls and tokens == 1:
        return min(length + 1, tape.slots)
    return min(length, tape.slots) + tokens


def _in_pieces(tape: Tape, total: int, step: int, play: Callable[[int], None]) -> None:
    """Play `total` in steps, with a shorter last one; whole steps only until one needs nothing new."""
    for _ in range(total // step):
        before = tape.allocator.reserved
        play(step)
        if tape.allocator.reserved == before:
            break
    if total % step:
        play(total % step)
