"""The caching allocator: its rules one by one, Mistral's weights in load order, and a naive twin."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from calculators.allocator import CachingAllocator
from calculators.units import KIB, MIB
from quantkit.estimate import weight_parts
from quantkit.presets import PRESETS
from quantkit.schemes import SCHEMES, plan_weights

MISTRAL = PRESETS["mistral-7b-instruct-v0.2"]


@pytest.mark.parametrize(
    ("request_bytes", "allocated", "reserved"),
    [
        (1, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),
        (10 * MIB + 1, 12 * MIB - (2 * MIB - 512), 12 * MIB),  # the rest, above 1 MiB, is split off
        (11 * MIB + 1, 12 * MIB, 12 * MIB),  # the rest, below 1 MiB, is not
        (19 * MIB, 20 * MIB, 20 * MIB),  # nor is 1 MiB
    ],
)
def test_one_request(request_bytes: int, allocated: int, reserved: int) -> None:
    allocator = CachingAllocator()
    allocator.malloc(request_bytes)
    assert (allocator.requested, allocator.allocated, allocator.reserved) == (
        request_bytes,
        allocated,
        reserved,
    )


def test_nothing_takes_nothing() -> None:
    allocator = CachingAllocator()
    allocator.free(allocator.malloc(0))
    assert (allocator.allocated, allocator.reserved) == (0, 0)


@pytest.mark.parametrize(
    ("scheme", "reserved"),
    [
        ("bf16", 14_619_246_592),
        ("int8", 7_511_998_464),
        ("int4-g128", 4_125_097_984),
        ("int4-g64", 4_267_704_320),
        ("int4-g32", 4_519_362_560),
        ("nf4", 4_519_362_560),
        ("nf4-dq", 4_127_195_136),
    ],
)
def test_mistrals_weights_in_load_order(scheme: str, reserved: int) -> None:
    allocator = CachingAllocator()
    for nbytes in weight_parts(MISTRAL, SCHEMES[scheme], plan_weights(MISTRAL, SCHEMES[scheme])):
        allocator.malloc(nbytes)
    assert allocator.reserved == reserved


def test_a_cache_of_64_tensors_reserves_a_quarter_more_than_one_slab() -> None:
    many, one = CachingAllocator(), CachingAllocator()
    for _ in range(64):
        many.malloc(8 * MIB)
    one.malloc(512 * MIB)
    assert (many.reserved, one.reserved) == (640 * MIB, 512 * MIB)


def test_free_neighbours_become_one_and_are_used_again() -> None:
    allocator = CachingAllocator()
    blocks = [allocator.malloc(4 * MIB) for _ in range(5)]
    allocator.free(blocks[1])
    allocator.free(blocks[3])
    allocator.malloc(5 * MIB)  # fits neither hole of 4 MiB
    assert allocator.reserved == 40 * MIB
    allocator.free(blocks[2])  # joins both holes to 12 MiB
    allocator.malloc(9 * MIB)
    assert allocator.reserved == 40 * MIB


def test_the_smallest_hole_that_fits_is_taken() -> None:
    allocator = CachingAllocator()
    wide, _, narrow, _ = (allocator.malloc(size * MIB) for size in (30, 2, 12, 2))
    allocator.free(wide)
    allocator.free(narrow)
    allocator.malloc(12 * MIB)
    allocator.malloc(30 * MIB)
    assert allocator.reserved == (30 + 20) * MIB


def test_peaks_stay_when_all_else_goes() -> None:
    allocator = CachingAllocator()
    allocator.malloc(MIB)
    allocator.free(allocator.malloc(64 * MIB))
    assert (allocator.requested, allocator.allocated, allocator.reserved) == (MIB, MIB, 66 * MIB)
    assert (allocator.peak_requested, allocator.peak_allocated) == (65 * MIB, 65 * MIB)
    forked = allocator.fork()
    assert (forked.peak_allocated, forked.peak_reserved) == (MIB, 66 * MIB)


def test_expandable_segments_grow_by_pages_and_leave_no_holes() -> None:
    allocator = CachingAllocator(expandable_segments=True)
    first = allocator.malloc(15 * MIB)
    allocator.malloc(15 * MIB)
    assert (allocator.allocated, allocator.reserved) == (30 * MIB, 40 * MIB)
    allocator.malloc(512 * KIB)  # the small pool has a segment of its own
    assert allocator.reserved == 42 * MIB
    allocator.free(first)
    allocator.malloc(21 * MIB)  # the hole is too small: 10 MiB at the end and one page more
    assert allocator.reserved == 62 * MIB
    allocator.malloc(15 * MIB - 512)  # the hole rather than the end, and split to 512 bytes
    assert (allocator.allocated, allocator.reserved) == (51 * MIB + 512 * KIB - 512, 62 * MIB)


@dataclass
class Piece:
    """A stretch of a segment in the naive twin."""

    size: int
    used: bool = False


class Twin:
    """The same rules over plain lists: every segment is a list of pieces, searched from end to end."""

    def __init__(self) -> None:
        self.segments: dict[bool, list[list[Piece]]] = {True: [], False: []}

    def malloc(self, nbytes: int) -> Piece:
        size = -(-nbytes // 512) * 512
        small = size <= MIB
        fits = [
            (piece.size, order, index)
            for order, pieces in enumerate(self.segments[small])
            for index, piece in enumerate(pieces)
            if not piece.used and piece.size >= size
        ]
        if not fits:
            segment = 2 * MIB if small else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
            self.segments[small].append([Piece(segment)])
            fits = [(segment, len(self.segments[small]) - 1, 0)]
        _, order, index = min(fits)
        pieces = self.segments[small][order]
        piece, rest = pieces[index], pieces[index].size - size
        if rest >= 512 if small else rest > MIB:
            piece.size = size
            pieces.insert(index + 1, Piece(rest))
        piece.used = True
        return piece

    def free(self, piece: Piece) -> None:
        piece.used = False
        for pieces in (*self.segments[True], *self.segments[False]):
            for index in range(len(pieces) - 1, 0, -1):
                if not pieces[index].used and not pieces[index - 1].used:
                    pieces[index - 1].size += pieces.pop(index).size

    @property
    def allocated(self) -> int:
        every = (piece for pool in self.segments.values() for pieces in pool for piece in pieces)
        return sum(piece.size for piece in every if piece.used)

    @property
    def reserved(self) -> int:
        return sum(piece.size for pool in self.segments.values() for pieces in pool for piece in pieces)


@pytest.mark.parametrize("seed", range(20))
def test_random_histories_equal_the_naive_twin(seed: int) -> None:
    source = random.Random(seed)
    ours, twin = CachingAllocator(), Twin()
    alive = []
    for step in range(400):
        if alive and source.random() < 0.48:
            block, piece = alive.pop(source.randrange(len(alive)))
            ours.free(block)
            twin.free(piece)
        else:
            nbytes = int(2 ** source.uniform(6, 26))
            alive.append((ours.malloc(nbytes), twin.malloc(nbytes)))
        if step == 200:
            forked = ours.fork()
            assert (forked.allocated, forked.reserved) == (ours.allocated, ours.reserved)
            forked.malloc(3 * MIB)  # leaves the original alone
        assert (ours.allocated, ours.reserved) == (twin.allocated, twin.reserved)
    for block, _ in alive:
        ours.free(block)
    assert ours.requested == ours.allocated == 0
