"""A model of torch's caching allocator: what it reserves for the tensors that are held.

The rules are those of c10/cuda/CUDACachingAllocator.cpp. Sizes are multiples of 512 bytes; blocks of up to 1 MiB come
from a pool of their own; the best fit is taken; a block is split where the rest is worth it, and freed neighbours are
joined. Without `expandable_segments`, small blocks share segments of 2 MiB, blocks up to 10 MiB segments of 20 MiB, and
larger ones have segments in multiples of 2 MiB. With it, each pool is one segment that grows at its end, by pages of 2
MiB (small blocks) and 20 MiB. Segments and pages go back to the device only when memory runs out, which this model does
not play.
"""

from bisect import bisect_left, insort

MIB = 1 << 20
UNIT = 512
Pool = tuple[str, bool]  # (graph's or not, small blocks)


class Block:
    """Bytes within a segment; `before` and `after` are its neighbours there."""

    __slots__ = ("after", "before", "free", "pool", "size")

    def __init__(self, size: int, pool: Pool):
        self.size, self.pool, self.free = size, pool, False
        self.before: Block | None = None
        self.after: Block | None = None


class Allocator:
    """`pool` is where new blocks come from: a CUDA graph that is captured has one of its own."""

    def __init__(self, expandable: bool = False):
        self.expandable = expandable
        self.pool = ""
        self.reserved = 0
        self.peak = 0
        self._free: dict[Pool, list[tuple[int, int, Block]]] = {}
        self._last: dict[Pool, Block] = {}  # where an expandable segment ends

    def allocate(self, size: int) -> Block:
        size = max(UNIT, round_up(size, UNIT))
        small = size <= MIB
        pool = (self.pool, small)
        free = self._free.setdefault(pool, [])
        at = bisect_left(free, (size, 0))
        last = self._last.get(pool)
        # the end of a segment that can grow counts as endless: any other block fits better
        if self.expandable and at < len(free) and free[at][2] is last:
            at += 1
        if at < len(free):
            block = free.pop(at)[2]
        else:
            block = self._grown(size, pool) if self.expandable else self._segment(size, pool)
        block.free = False
        rest = block.size - size
        if rest >= UNIT if small or self.expandable else rest > MIB:
            other = Block(rest, pool)
            self._behind(block, other)
            block.size = size
            self._give(other)
        return block

    def free(self, block: Block) -> None:
        for other in (block.before, block.after):
            if other is not None and other.free:
                self._take(other)
                first, second = (other, block) if other is block.before else (block, other)
                first.size += second.size
                first.after = second.after
                if second.after is not None:
                    second.after.before = first
                elif self.expandable:
                    self._last[block.pool] = first
                block = first
        self._give(block)

    def empty_cache(self) -> None:
        """Give back the segments that hold nothing, and let the peak begin here. A segment that grows gives back the
        whole pages at its end; torch also unmaps those in its middle, which this model keeps."""
        for pool, free in self._free.items():
            if self.expandable:
                last = self._last.get(pool)
                if last is not None and last.free:
                    page = page_size(pool)
                    self._take(last)
                    gone = last.size // page * page
                    last.size -= gone
                    self.reserved -= gone
                    if last.size:
                        self._give(last)
                    elif last.before is None:
                        del self._last[pool]
                    else:
                        last.before.after, self._last[pool] = None, last.before
            else:
                self.reserved -= sum(block.size for _, _, block in free if block.before is None and block.after is None)
                self._free[pool] = [each for each in free if each[2].before is not None or each[2].after is not None]
        self.peak = self.reserved

    def _segment(self, size: int, pool: Pool) -> Block:
        large = 20 * MIB if size < 10 * MIB else round_up(size, 2 * MIB)
        block = Block(2 * MIB if pool[1] else large, pool)
        self._reserve(block.size)
        return block

    def _grown(self, size: int, pool: Pool) -> Block:
        """A block at the end of the pool's segment, which grows by whole pages."""
        last = self._last.get(pool)
        if last is not None and last.free:
            self._take(last)
            block = last
        else:
            block = Block(0, pool)
            if last is not None:
                self._behind(last, block)
            self._last[pool] = block
        if block.size < size:
            more = round_up(size - block.size, page_size(pool))
            block.size += more
            self._reserve(more)
        return block

    def _reserve(self, size: int) -> None:
        self.reserved += size
        self.peak = max(self.peak, self.reserved)

    def _behind(self, block: Block, other: Block) -> None:
        """Put `other` after `block`."""
        other.before, other.after = block, block.after
        if block.after is not None:
            block.after.before = other
        elif self.expandable:
            self._last[block.pool] = other
        block.after = other

    def _give(self, block: Block) -> None:
        block.free = True
        insort(self._free[block.pool], (block.size, id(block), block))

    def _take(self, block: Block) -> None:
        self._free[block.pool].remove((block.size, id(block), block))


def page_size(pool: Pool) -> int:
    """Bytes that a segment of this pool grows by."""
    return (2 if pool[1] else 20) * MIB


def round_up(size: int, unit: int) -> int:
    """The next multiple of `unit`, bytes."""
    return -(-size // unit) * unit
