"""What lives at the peak by hand, what grows with what, and that the shortcuts change nothing."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from calculators.caching import piece_tokens
from calculators.kv_cache import KVLayout
from calculators.linear import piece_rows
from calculators.peak import Run, at_peak, chunks, play
from calculators.tape import Layer, Matrix, Model
from calculators.units import MIB
from calculators.weights import Packing

INT4 = Packing(4, 128, scale_bits=16)


def model(packing: Packing = Packing(16), layers: int = 2, **fields: object) -> Model:  # noqa: B008
    """Mistral-7B's widths, its linears in `packing`."""
    square, narrow = Matrix(4096, 4096, packing), Matrix(1024, 4096, packing)
    up, down = Matrix(14336, 4096, packing), Matrix(4096, 14336, packing)
    layer = Layer(q=square, k=narrow, v=narrow, o=square, gate=up, up=up, down=down)
    made = Model(
        hidden=4096, ffn=14336, n_heads=32, n_kv_heads=8, head_dim=128, vocab=32000, element_bytes=2,
        layers=(layer,) * layers, head=Matrix(32000, 4096, Packing(16)), attention="flash", sm_count=132,
    )  # fmt: skip
    return replace(made, **fields)


def layout(bits: int = 16, group: int = 0) -> KVLayout:
    return KVLayout(2, 8, 128, bits, group)


def terms(decoder: Model, cache: KVLayout, context: int, chunk: int, batch: int = 1) -> dict[str, int]:
    """Return the bytes of what lives at the peak, by name, without weights and cache."""
    found: dict[str, int] = {}
    for term in at_peak([100 * MIB], decoder, cache, Run(context, batch, chunk, 32 * MIB)):
        found[term.name] = found.get(term.name, 0) + term.nbytes
    return found


def test_the_peak_of_a_chunk_is_the_ffn() -> None:
    found = terms(model(), layout(), 8193, 2048)
    kv, workspace, small = 8193 * 2 * 8 * 128 * 2 * 2, 32 * MIB, 64 * 4
    assert found == {
        "rope frequencies": small,
        "KV cache": kv,
        "token ids": 8193 * 8,
        "cuBLAS workspace": workspace,
        "final states": 16 * MIB,  # of the chunk before
        "residual": 16 * MIB,
        "cosines": MIB // 2,
        "sines": MIB // 2,
        "normed states": 16 * MIB,
        "gate": 56 * MIB,
        "up": 56 * MIB,
    }


def test_known_transients_of_mistral() -> None:
    whole = terms(model(), layout(), 32769, 1 << 20)
    assert whole["gate"] == whole["up"] == 896 * MIB
    assert "final states" not in whole  # there was no chunk before
    quantized = terms(model(INT4), layout(8), 32769, 2048)
    assert quantized["dequantized matrix"] == 112 * MIB
    assert quantized["one layer's keys and values"] == 128 * MIB + 4096
    narrow = model(attention="math", ffn=64)
    scores = terms(narrow, layout(), 32769, 2048)
    assert scores["float32 scores"] == scores["softmax"] <= 64 * MIB  # in full they would take 8 GiB
    decoding = terms(model(INT4), layout(), 2, 1)
    assert decoding["dequantized matrix"] == 112 * MIB
    logits = terms(model(vocab=1 << 24), layout(), 65, 64)
    assert logits["float32 logits"] == 64 * MIB  # of the last position alone


def test_the_formulas_give_the_bytes() -> None:
    for term in at_peak([1], model(INT4), layout(4), Run(4096, 3, 512, 32 * MIB)):
        factors = [part.split()[-1] for part in term.formula.removesuffix(" B").split(" x ")]
        product = 1
        for factor in factors:
            product *= int(factor.replace(",", ""))
        assert product == term.nbytes


@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("kv_bits", [16, 8, 4])
@pytest.mark.parametrize("attention", ["flash", "math"])
@pytest.mark.parametrize("packing", [Packing(16), INT4], ids=["plain", "int4"])
def test_more_context_batch_or_chunk_never_takes_less(
    packing: Packing, attention: str, kv_bits: int, window: int | None
) -> None:
    decoder = model(packing, attention=attention, window=window)

    def requested(context: int, batch: int, chunk: int) -> int:
        return play([MIB], decoder, layout(kv_bits), Run(context, batch, chunk, 0)).requested

    contexts, batches, chunk_sizes = (2, 31, 257, 300, 301, 1000, 3000), (1, 3), (100, 2048)
    for batch, chunk in itertools.product(batches, chunk_sizes):
        by_context = [requested(context, batch, chunk) for context in contexts]
        assert by_context == sorted(by_context)
    for context in contexts:
        by_batch = [requested(context, batch, 640) for batch in (1, 2, 7)]
        assert by_batch == sorted(by_batch)
        by_chunk = [requested(context, 2, chunk) for chunk in (60, 512, 4096)]
        assert by_chunk == sorted(by_chunk)


@pytest.mark.parametrize("expandable", [False, True])
@pytest.mark.parametrize(("kv_bits", "batch", "chunk"), [(16, 1, 256), (4, 3, 100), (8, 1, 5000)])
@pytest.mark.parametrize("attention", ["flash", "math"])
def test_a_settled_layer_is_passed_over_for_nothing(
    attention: str, kv_bits: int, batch: int, chunk: int, expandable: bool
) -> None:
    once = model(INT4, layers=12, attention=attention)
    [kind] = set(once.layers)
    each = replace(once, layers=tuple(replace(kind) for _ in once.layers))  # equal, but not one object
    run = Run(2000, batch, chunk, 32 * MIB, expandable)
    assert play([MIB, 7 * MIB], once, layout(kv_bits), run) == play(
        [MIB, 7 * MIB], each, layout(kv_bits), run
    )


def test_chunks_cover_the_prompt() -> None:
    assert chunks(10, 4) == [(4, 0), (4, 4), (2, 8)]
    assert chunks(8, 4) == [(4, 0), (4, 4)]
    assert chunks(3, 4) == [(3, 0)]
    assert chunks(1000, 100, sampled=True) == [(100, 0), (100, 100), (100, 900)]


def test_pieces_are_never_empty() -> None:
    assert piece_rows(1 << 30) == 1
    assert piece_tokens(1 << 30) == 1
    assert piece_rows(4096) * 4096 == 1 << 22
