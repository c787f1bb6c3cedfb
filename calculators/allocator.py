"""PyTorch's CUDA caching allocator: requests in, allocated and reserved bytes out.

The rules of `c10/cuda/CUDACachingAllocator.cpp` and `c10/core/AllocatorConfig.h` for one stream with the
default settings, or with `expandable_segments:True`. Addresses are taken to grow from segment to segment;
on a device they may not, which only matters between free blocks of one size.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from calculators.units import MIB, ceil_div

ROUND = 512  # every request is rounded up to a multiple of this
SMALL = MIB  # requests up to this come from the small pool
SMALL_SEGMENT = 2 * MIB
LARGE_SEGMENT = 20 * MIB
OWN_SEGMENT_FROM = 10 * MIB  # from here on a request gets a segment of its own,
OWN_SEGMENT_ROUND = 2 * MIB  # rounded up to a multiple of this
_ADDRESS_BITS = 48


class Block:
    """A piece of a segment; `before` and `after` are its neighbours there."""

    __slots__ = ("address", "after", "before", "free", "pool", "requested", "size")

    def __init__(self, pool: Pool, address: int, size: int) -> None:
        self.pool, self.address, self.size = pool, address, size
        self.requested = 0
        self.free = False
        self.before: Block | None = None
        self.after: Block | None = None


class Pool:
    """Free blocks of the small or the large pool, by size, then address: both in one integer."""

    __slots__ = ("blocks", "end", "growing", "order", "small")

    def __init__(self, small: bool) -> None:
        self.small = small
        self.end = 0  # the next segment's address
        self.order: list[int] = []
        self.blocks: dict[int, Block] = {}
        self.growing: Block | None = None  # the last block of the expandable segment

    def add(self, block: Block) -> None:
        """Note a block as free."""
        block.free = True
        key = block.size << _ADDRESS_BITS | block.address
        self.blocks[key] = block
        insort(self.order, key)

    def take(self, block: Block) -> None:
        """Strike a block off the free ones."""
        block.free = False
        key = block.size << _ADDRESS_BITS | block.address
        del self.blocks[key]
        del self.order[bisect_left(self.order, key)]

    def take_best(self, size: int) -> Block | None:
        """Take the smallest free block of at least `size`; the one that can grow comes last."""
        order = self.order
        index = bisect_left(order, size << _ADDRESS_BITS)
        if index == len(order):
            return None
        if self.growing is not None and self.blocks[order[index]] is self.growing and index + 1 < len(order):
            index += 1
        block = self.blocks.pop(order.pop(index))
        block.free = False
        return block


class CachingAllocator:
    """One device's allocator from its first request on; sizes in bytes.

    Args:
        expandable_segments: as PYTORCH_ALLOC_CONF sets it.

    Attributes:
        requested: what is alive, as it was asked for.
        allocated: bytes of the blocks in use, `torch.cuda.memory_allocated`.
        reserved: bytes of all segments, `torch.cuda.memory_reserved`.
        peak_requested, peak_allocated, peak_reserved: their maxima.
    """

    def __init__(self, expandable_segments: bool = False) -> None:
        self.expandable_segments = expandable_segments
        self._small, self._large = Pool(small=True), Pool(small=False)
        self.requested = self.allocated = self.reserved = 0
        self.peak_requested = self.peak_allocated = self.peak_reserved = 0

    def fork(self) -> CachingAllocator:
        """Return a copy to go on from, its peaks begun anew; blocks in use stay so in it for good."""
        copy = CachingAllocator(self.expandable_segments)
        copy.requested, copy.allocated, copy.reserved = self.requested, self.allocated, self.reserved
        for ours, theirs in ((self._small, copy._small), (self._large, copy._large)):
            theirs.end = ours.end
            for block in ours.blocks.values():
                theirs.add(Block(theirs, block.address, block.size))
                if block is ours.growing:
                    theirs.growing = theirs.blocks[block.size << _ADDRESS_BITS | block.address]
            if theirs.growing is None and ours.growing is not None:
                theirs.growing = Block(theirs, ours.growing.address, ours.growing.size)
        copy.peak_requested, copy.peak_allocated = copy.requested, copy.allocated
        copy.peak_reserved = copy.reserved
        return copy

    def state(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return what is free where: all that later requests hang on."""
        return tuple(self._small.order), tuple(self._large.order)

    def malloc(self, nbytes: int) -> Block | None:
        """Serve a request; one of 0 bytes takes nothing and returns None."""
        if nbytes <= 0:
            return None
        size = -(-nbytes // ROUND) * ROUND
        pool = self._small if size <= SMALL else self._large
        block = pool.take_best(size)
        if block is None:
            block = self._grow(pool, size) if self.expandable_segments else self._new_segment(pool, size)
        remainder = block.size - size
        if remainder > SMALL or (remainder and (pool.small or self.expandable_segments)):
            self._split(block, size)
        block.requested = nbytes
        self.requested += nbytes
        self.allocated += block.size
        if self.requested > self.peak_requested:
            self.peak_requested = self.requested
        if self.allocated > self.peak_allocated:
            self.peak_allocated = self.allocated
        return block

    def free(self, block: Block | None) -> None:
        """Give a block back; free neighbours become one."""
        if block is None:
            return
        pool = block.pool
        self.requested -= block.requested
        self.allocated -= block.size
        before, after = block.before, block.after
        if before is not None and before.free:
            pool.take(before)
            block.address, block.size = before.address, before.size + block.size
            block.before = before.before
            if block.before is not None:
                block.before.after = block
        if after is not None and after.free:
            pool.take(after)
            block.size += after.size
            block.after = after.after
            if block.after is not None:
                block.after.before = block
            if pool.growing is after:
                pool.growing = block
        pool.add(block)

    def _new_segment(self, pool: Pool, size: int) -> Block:
        if pool.small:
            segment = SMALL_SEGMENT
        elif size < OWN_SEGMENT_FROM:
            segment = LARGE_SEGMENT
        else:
            segment = ceil_div(size, OWN_SEGMENT_ROUND) * OWN_SEGMENT_ROUND
        return self._reserve(pool, segment)

    def _reserve(self, pool: Pool, nbytes: int) -> Block:
        block = Block(pool, pool.end, nbytes)
        pool.end += nbytes
        self.reserved += nbytes
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return block

    def _grow(self, pool: Pool, size: int) -> Block:
        """Map more pages behind the pool's expandable segment, so that its end holds `size`."""
        page = SMALL_SEGMENT if pool.small else LARGE_SEGMENT
        last = pool.growing
        if last is not None and last.free:
            pool.take(last)
            last.size += self._reserve(pool, ceil_div(size - last.size, page) * page).size
            return last
        block = self._reserve(pool, ceil_div(size, page) * page)
        if last is not None:
            block.before, last.after = last, block
        pool.growing = block
        return block

    def _split(self, block: Block, size: int) -> None:
        """Cut a block in use to `size` and free the rest."""
        pool = block.pool
        rest = Block(pool, block.address + size, block.size - size)
        block.size = size
        rest.before = block
        after = rest.after = block.after
        if after is not None:
            after.before = rest
        block.after = rest
        if pool.growing is block:
            pool.growing = rest
        pool.add(rest)
