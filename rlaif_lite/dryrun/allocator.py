"""A model of torch's caching allocator: what it reserves for the tensors that are held.

The rules are those of c10/cuda/CUDACachingAllocator.cpp with default settings: sizes in multiples of 512 bytes; blocks
of up to 1 MiB in segments of 2 MiB, up to 10 MiB in segments of 20 MiB, larger ones in segments of their own, in
multiples of 2 MiB; best fit; a block is split where the rest is worth it, and freed neighbours are joined. Segments go
back to the device only when memory runs out, which this model does not play.
"""

from bisect import bisect_left, insort

MIB = 1 << 20
UNIT = 512


class Block:
    """Bytes within a segment; `before` and `after` are its neighbours there."""

    __slots__ = ("after", "before", "free", "pool", "size")

    def __init__(self, size: int, pool: tuple[str, bool]):
        self.size, self.pool, self.free = size, pool, False
        self.before: Block | None = None
        self.after: Block | None = None


class Allocator:
    """`pool` is where new blocks come from: a CUDA graph that is captured has one of its own."""

    def __init__(self):
        self.pool = ""
        self.reserved = 0
        self.peak = 0
        self._free: dict[tuple[str, bool], list[tuple[int, int, Block]]] = {}

    def allocate(self, size: int) -> Block:
        size = max(UNIT, round_up(size, UNIT))
        small = size <= MIB
        pool = (self.pool, small)
        free = self._free.setdefault(pool, [])
        at = bisect_left(free, (size, 0))
        block = free.pop(at)[2] if at < len(free) else self._segment(size, pool)
        block.free = False
        rest = block.size - size
        if rest >= UNIT if small else rest > MIB:
            other = Block(rest, pool)
            other.before, other.after = block, block.after
            if block.after is not None:
                block.after.before = other
            block.after, block.size = other, size
            self._give(other)
        return block

    def free(self, block: Block) -> None:
        for other in (block.before, block.after):
            if other is not None and other.free:
                self._free[block.pool].remove((other.size, id(other), other))
                first, second = (other, block) if other is block.before else (block, other)
                first.size += second.size
                first.after = second.after
                if second.after is not None:
                    second.after.before = first
                block = first
        self._give(block)

    def empty_cache(self) -> None:
        """Give back the segments that hold nothing, and let the peak begin here."""
        for pool, free in self._free.items():
            self.reserved -= sum(block.size for _, _, block in free if block.before is None and block.after is None)
            self._free[pool] = [each for each in free if each[2].before is not None or each[2].after is not None]
        self.peak = self.reserved

    def _segment(self, size: int, pool: tuple[str, bool]) -> Block:
        large = 20 * MIB if size < 10 * MIB else round_up(size, 2 * MIB)
        block = Block(2 * MIB if pool[1] else large, pool)
        self.reserved += block.size
        self.peak = max(self.peak, self.reserved)
        return block

    def _give(self, block: Block) -> None:
        block.free = True
        insort(self._free[block.pool], (block.size, id(block), block))


def round_up(size: int, unit: int) -> int:
    """The next multiple of `unit`, bytes."""
    return -(-size // unit) * unit
