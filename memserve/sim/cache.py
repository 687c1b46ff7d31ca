"""The blocks of one simulated instance: how many are in use, and which ones its index keeps.

The index is the pool's own radix tree, with its eviction: least recently used, leaves first. Only
blocks that the index keeps have numbers, since only those are spoken of to others; the blocks that a
request fills are counted. What the index gains, loses and moves is noted as the events that a worker
sends (`memserve.pool.events`).

Contract: blocks in use and blocks in the index never exceed a tier's capacity. A number gets a new
generation whenever it loses its content. History that leaves HBM goes to DRAM as far as there is room;
the move takes effect at once, its copy is charged by the caller (`num_swapped_out`).
"""

from collections.abc import Callable, Sequence

from memserve.pool.events import Cleared, IndexEvent, Inserted, Moved, Removed
from memserve.pool.index import TOKEN_BYTES, RadixIndex
from memserve.pool.refs import BlockRef, Tier

HBM, DRAM = int(Tier.HBM), int(Tier.DRAM)


class BlockCache:
    """HBM and DRAM of one instance; blocks of DRAM are numbered after those of HBM here."""

    def __init__(self, instance: int, block_size: int, num_hbm: int, num_dram: int = 0) -> None:
        self.instance = instance
        self.block_size = block_size
        self.num_blocks = (num_hbm, num_dram)
        self._index: RadixIndex[int] = RadixIndex(block_size, num_levels=2 if num_dram else 1)
        self._unused = [list(range(num_hbm - 1, -1, -1)), list(range(num_hbm, num_hbm + num_dram))]
        self._pins = [0] * (num_hbm + num_dram)
        self._generations = [0] * (num_hbm + num_dram)
        self._kept = bytearray(num_hbm + num_dram)
        self._num_idle = 0  # blocks of HBM that only the index keeps
        self.num_private = 0
        """Blocks of HBM in use that the index does not keep."""
        self.events: list[IndexEvent] = []
        """What has changed since somebody took them."""
        self.num_evicted = 0
        self.num_swapped_out = 0

    @property
    def num_free(self) -> int:
        """Blocks of HBM that can be had without dropping anything."""
        return len(self._unused[HBM]) - self.num_private

    @property
    def num_indexed(self) -> int:
        """Blocks of HBM that the index keeps."""
        return self.num_blocks[HBM] - len(self._unused[HBM])

    def tier(self, block: int) -> int:
        """Where a numbered block lies."""
        return HBM if block < self.num_blocks[HBM] else DRAM

    def match(self, packed: bytes, salt: str, *, touch: bool = True) -> list[int]:
        """The kept blocks of the longest prefix, those in HBM first; not pinned."""
        return self._index.match(packed, salt, touch=touch)

    def pin(self, blocks: Sequence[int]) -> None:
        """Somebody uses these."""
        for block in blocks:
            if not self._pins[block] and block < self.num_blocks[HBM]:
                self._num_idle -= 1
            self._pins[block] += 1

    def unpin(self, blocks: Sequence[int]) -> None:
        """That somebody uses them no more."""
        for block in blocks:
            self._pins[block] -= 1
            if not self._pins[block] and block < self.num_blocks[HBM]:
                self._num_idle += 1

    def reserve(self, num_blocks: int) -> bool:
        """Take that many blocks of HBM into use, dropping idle history if need be; or nothing."""
        missing = num_blocks - self.num_free
        if missing > 0 and (missing > self._num_idle or not self._make_room(missing)):
            return False
        self.num_private += num_blocks
        return True

    def release(self, num_blocks: int) -> None:
        """That many blocks, of which the index knows nothing, are free."""
        self.num_private -= num_blocks
        assert self.num_private >= 0

    def keep(self, packed: bytes, salt: str, num_private: int) -> list[int]:
        """Index whole blocks that somebody uses; the numbers of those that are new, pinned.

        They count as private no more; `num_private` is how many the caller has, and if it has too
        few, nothing is done. Where the index kept a block before, that one stays, except that a block
        in HBM takes the place of one in DRAM.
        """
        stride = self.block_size * TOKEN_BYTES
        known = self._index.match(packed, salt, touch=False)
        num_new = len(packed) // stride - len(known)
        in_dram: list[int] = []
        if self.num_blocks[DRAM]:
            in_dram = [block for block in known if self.tier(block) == DRAM]
        if num_new + len(in_dram) > num_private:
            return []
        new = self._promote(in_dram)
        if in_dram:
            known = self._index.match(packed, salt, touch=False)
        if num_new <= 0:
            self._index.match(packed, salt)
            return new
        fresh = [self._take(HBM) for _ in range(num_new)]
        held = self._index.insert(packed, [*known, *fresh], salt)
        parent = (HBM, held[len(known) - 1]) if known else None
        tokens = packed[len(known) * stride : (len(known) + num_new) * stride]
        generations = [self._generations[block] for block in fresh]
        self.events.append(Inserted(salt, parent, tokens, HBM, fresh, generations))
        return new + fresh

    def refs(self, blocks: Sequence[int]) -> list[BlockRef]:
        """What others call these blocks."""
        hbm = self.num_blocks[HBM]
        return [
            BlockRef(
                self.instance, 1, self.tier(b), b if b < hbm else b - hbm, self._generations[b]
            )
            for b in blocks
        ]

    def num_valid(self, refs: Sequence[BlockRef]) -> int:
        """How many references, from the first on, still name what they named when they were made."""
        for i, ref in enumerate(refs):
            block = ref.block + (ref.tier == DRAM) * self.num_blocks[HBM]
            if not self._kept[block] or self._generations[block] != ref.generation:
                return i
        return len(refs)

    def report(self) -> list[IndexEvent]:
        """All that is kept, told anew; events not yet taken are among it."""
        self.events.clear()
        found: list[IndexEvent] = [Cleared()]
        place: dict[tuple[str, bytes], tuple[int, int]] = {}
        stride = self.block_size * TOKEN_BYTES
        for salt, prefix, block in sorted(self._index, key=lambda entry: len(entry[1])):
            (ref,) = self.refs([block])
            parent = place.get((salt, prefix[:-stride]))
            place[salt, prefix] = (ref.tier, ref.block)
            found.append(
                Inserted(salt, parent, prefix[-stride:], ref.tier, [ref.block], [ref.generation])
            )
        return found

    def audit(self, num_private: int, pins: Sequence[int]) -> list[str]:
        """Recount; what is wrong, in words. `pins` holds a block as often as it is used."""
        problems = self._index.audit()
        entries = [block for _, _, block in self._index]
        if len(set(entries)) != len(entries):
            problems.append("a block stands twice in the index")
        if set(entries) != {block for block, kept in enumerate(self._kept) if kept}:
            problems.append("the index and the marks differ")
        if self.num_private != num_private or self.num_free < 0:
            problems.append(f"{self.num_private} private, {num_private} used, {self.num_free} free")
        counts = [0] * len(self._pins)
        for block in pins:
            counts[block] += 1
        if counts != self._pins:
            problems.append("pins are miscounted")
        idle = sum(1 for b in entries if b < self.num_blocks[HBM] and not self._pins[b])
        if idle != self._num_idle:
            problems.append(f"{self._num_idle} blocks counted as idle, {idle} are")
        return problems

    def _take(self, tier: int) -> int:
        """A number of a block that is in use, from now on kept by the index and pinned once."""
        block = self._unused[tier].pop()
        self._kept[block] = 1
        if tier == HBM:
            self._pins[block] = 1
            self.num_private -= 1
        return block

    def _lose(self, blocks: Sequence[int]) -> None:
        """These have left the index."""
        for block in blocks:
            self._kept[block] = 0
            self._generations[block] += 1
            tier = self.tier(block)
            self._unused[tier].append(block)
            if tier == HBM:
                self._num_idle -= not self._pins[block]

    def _promote(self, blocks: list[int]) -> list[int]:
        """Blocks in use, in HBM, take the place of these, which lie in DRAM."""
        if not blocks:
            return []
        new_by_old = {block: self._take(HBM) for block in blocks}
        moved = self._index.move(new_by_old, HBM)
        assert len(moved) == len(blocks), "a known prefix is promoted from its start on"
        self._tell_moved(blocks, DRAM, [new_by_old[block] for block in blocks], HBM)
        self._lose(blocks)
        return list(new_by_old.values())

    def _make_room(self, num_blocks: int) -> bool:
        """Move or drop that much idle history of HBM; False, and nothing done, if there isn't."""
        if self.num_blocks[DRAM]:
            num_blocks -= self._demote(num_blocks)
        return num_blocks <= 0 or self._evict(num_blocks, HBM) >= num_blocks

    def _demote(self, num_blocks: int) -> int:
        idle = self._is_idle
        sources = self._index.coldest(num_blocks, idle, HBM)
        missing = len(sources) - len(self._unused[DRAM])
        if missing > 0:
            self._evict(missing, DRAM, partial=True)
        sources = sources[: len(self._unused[DRAM])]
        new_by_old = {block: self._unused[DRAM].pop() for block in sources}
        moved = set(self._index.move(new_by_old, DRAM))
        for old, new in new_by_old.items():
            if old in moved:
                self._kept[new] = 1
            else:
                self._unused[DRAM].append(new)
        gone = [block for block in sources if block in moved]
        self._tell_moved(gone, HBM, [new_by_old[block] for block in gone], DRAM)
        self._lose(gone)
        self.num_swapped_out += len(gone)
        return len(gone)

    def _evict(self, num_blocks: int, tier: int, *, partial: bool = False) -> int:
        """Drop the coldest idle blocks of a tier; how many of that tier."""
        victims = self._index.evict(num_blocks, self._is_idle, partial=partial, level=tier)
        for level in (DRAM, HBM):
            gone = [block for block in victims if self.tier(block) == level]
            if gone:
                offset = self.num_blocks[HBM] if level == DRAM else 0
                self.events.append(Removed(level, [block - offset for block in gone]))
        self._lose(victims)
        self.num_evicted += len(victims)
        return sum(1 for block in victims if self.tier(block) == tier)

    def _is_idle(self, block: int) -> bool:
        return not self._pins[block]

    def _tell_moved(self, sources: list[int], source: int, blocks: list[int], tier: int) -> None:
        if not sources:
            return
        generations = [self._generations[block] for block in blocks]
        place = self._place
        self.events.append(
            Moved(source, [*map(place, sources)], tier, [*map(place, blocks)], generations)
        )

    @property
    def _place(self) -> Callable[[int], int]:
        hbm = self.num_blocks[HBM]
        return lambda block: block if block < hbm else block - hbm
