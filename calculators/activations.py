"""What the forward pass asks of the device's memory, request by request, beside weights and KV cache.

This is `quantkit/models/decoder.py` on a GPU with sizes in place of tensors: each function mirrors the
one of its name there or in `models/attention.py`, and takes and drops the same tensors in the same order;
linear layers are in `linear.py`, the KV cache in `caching.py`. Played on an allocator it gives peaks;
`quantkit measure --trace` holds it to the real decoder.

Shapes are written in the letters of `calculators/tape.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from calculators.allocator import Block
from calculators.caching import attended, extend, piece_tokens, token_elements
from calculators.flash import Call, accumulators, splits
from calculators.linear import linear
from calculators.tape import BOOL, FP32, INT64, Layer, Tape

SCORE_ELEMENTS = 1 << 24  # plain attention holds so many scores at a time


def score_rows(heads: int, keys: int) -> int:
    """Return the queries whose plain attention scores are held at once; `heads` is of all sequences."""
    return max(1, SCORE_ELEMENTS // (heads * keys))


def frequency_bytes(head_dim: int) -> int:
    """Return the bytes of a decoder's rotary frequencies, which it makes after its weights."""
    return head_dim // 2 * FP32


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
    keys = attended(tape, tokens, length)
    if tape.model.attention == "math" or tape.rolls:
        return (tokens, keys, min(length, 1))
    count = splits(_call(tape, tokens, keys), tape.model.sm_count)
    if tape.cache.bits >= 16:
        return tokens, count
    step = piece_tokens(token_elements(tape))
    return tokens, count, min(keys, step), keys % step


def forward(tape: Tape, tokens: int, length: int) -> Block | None:
    """Play one call of the decoder's `forward` after `length` cached tokens; return its final states."""
    model, e = tape.model, tape.element_bytes
    tape.size(tokens, attended(tape, tokens, length))
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
    narrow = linear(tape, tape.model.head, "logits", "B V")
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
    q = _rotate(tape, linear(tape, layer.q, "queries", "B T A D"), "A")
    k = _rotate(tape, linear(tape, layer.k, "keys", "B T N D"), "N")
    v = linear(tape, layer.v, "values", "B T N D")
    tape.drop(h)
    if tape.cache.bits < 16:
        q = _replaced(tape, q, "rotated queries", "B T A D")
        k = _replaced(tape, k, "rotated keys", "B T N D")
    joined = extend(tape, length)
    viewed = tape.rolls and length == 0 and tape.letters["T"] > 1  # these keys are attended to as they are
    if not viewed:
        tape.drop(k, v)
    out = _flash(tape) if tape.model.attention == "flash" else _math(tape, viewed)
    tape.drop(q, *joined)
    if viewed:
        tape.drop(k, v)
    projected = linear(tape, layer.o, "attention's projection", "B T H")
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
    """The output, float32 log-sum-exp, those of splits, and the state of a random generator that is not used."""
    take, call = tape.take, _call(tape, tape.letters["T"], tape.letters["S"])
    out = tape.new("attention", "B T A D", tape.element_bytes)
    norms = tape.new("log-sum-exp", "B A T", FP32)
    parts = [take(name, *factors) for name, factors in accumulators(call, tape.model.sm_count)]
    tape.drop(norms, *parts, take("seed", 16), take("offset", 8))
    return out


def _call(tape: Tape, tokens: int, keys: int) -> Call:
    letters = tape.letters
    return Call(letters["B"], tokens, keys, letters["A"], letters["N"], letters["D"])


def _math(tape: Tape, strided: bool) -> Block | None:
    """Plain scores, some queries at a time; `strided` keys and values of several sequences are copied first."""
    e, letters = tape.element_bytes, tape.letters
    copied = strided and letters["B"] > 1 and letters["N"] > 1
    keys = tape.new("keys by head", "B S N D", e) if copied else None
    values = tape.new("values by head", "B S N D", e) if copied else None
    out = tape.new("attention", "B T A D", e)
    rows = score_rows(letters["B"] * letters["A"], letters["S"])
    tape.in_pieces(letters["T"], rows, lambda queries: _math_rows(tape, queries))
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
    gate = linear(tape, layer.gate, "gate", "B T F")
    up = linear(tape, layer.up, "up", "B T F")
    tape.drop(h)
    tape.drop(up)
    down = linear(tape, layer.down, "FFN's projection", "B T H")
    tape.drop(gate)
    return down
