"""Events of the index by hand; `test_mempool` and `test_tiers` compare them with the index itself."""

from array import array

import pytest

from memserve.pool.events import Cleared, IndexEvent, Inserted, Moved, Removed
from memserve.pool.mempool import MemPool
from memserve.pool.refs import Kind, Tier
from tests.pool.replica import Replica
from tests.pool.test_mempool import BLOCK, cached_prompt, new_pool
from tests.pool.test_tiers import NUM_HBM, Instance


def packed(*tokens: int) -> bytes:
    return array("i", tokens).tobytes()


def heard(pool: MemPool) -> list[IndexEvent]:
    events: list[IndexEvent] = []
    pool.listen(events.append)
    return events


def test_a_continuation_names_the_block_that_it_continues() -> None:
    pool = new_pool()
    events = heard(pool)
    first, second = cached_prompt(pool, [1, 1, 2, 2], salt="a")
    with pool.match([1, 1, 2, 2], salt="a") as match:
        pool.insert([1, 1, 2, 2, 3, 3], [*match.blocks, third := pool.alloc_mem(1)[0]], "a")
    pool.insert([1, 1, 2, 2, 3, 3], [first, second, third], "a")
    assert events == [
        Inserted("a", None, packed(1, 1, 2, 2), 0, [first, second], [0, 0]),
        Inserted("a", (0, second), packed(3, 3), 0, [third], [0]),
    ]


def test_eviction_is_told_before_the_blocks_are_used_again() -> None:
    pool = new_pool(num_blocks=2)
    blocks = cached_prompt(pool, [1, 1, 2, 2])
    events = heard(pool)
    pool.alloc_mem(2)
    (event,) = events
    assert isinstance(event, Removed)
    assert sorted(event.blocks) == sorted(blocks)


@pytest.mark.parametrize("num_moved", [1, 2])
def test_blocks_that_change_the_tier_keep_their_place_in_the_index(num_moved: int) -> None:
    instance = Instance(0)
    try:
        pool = instance.pool
        blocks = cached_prompt(pool, [1, 1, 2, 2])
        events = heard(pool)
        swap = pool.swap_out(num_moved)
        assert swap is not None
        swap.commit()
        (event,) = events
        assert isinstance(event, Moved)
        assert (event.source_tier, event.tier) == (Tier.HBM, Tier.DRAM)
        assert set(event.sources) == set(blocks[2 - num_moved :])
        replica = Replica(BLOCK)
        replica.apply_all(pool.index_events())
        tiers = [replica.holds()["", packed(*t)].tier for t in ([1, 1], [1, 1, 2, 2])]
        assert tiers == [Tier.HBM] * (2 - num_moved) + [Tier.DRAM] * num_moved
    finally:
        for arena in instance.arenas.values():
            arena.close()


def test_all_of_an_index_is_told_after_a_word_that_clears_it() -> None:
    pool = new_pool()
    cached_prompt(pool, [1, 1, 2, 2])
    cached_prompt(pool, [1, 1, 3, 3])
    first, *others = pool.index_events()
    assert isinstance(first, Cleared)
    replica = Replica(BLOCK)
    replica.apply_all(others)
    assert {key[1] for key in replica.holds()} == {
        packed(1, 1),
        packed(1, 1, 2, 2),
        packed(1, 1, 3, 3),
    }


def test_a_pool_that_nobody_listens_to_works_the_same() -> None:
    pool = new_pool()
    assert len(cached_prompt(pool, [1, 1])) == pool.delete([1, 1]) == 1


def test_blocks_of_dram_are_numbered_within_their_arena() -> None:
    instance = Instance(0)
    try:
        events = heard(instance.pool)
        (block,) = instance.pool.alloc_mem(1, Kind.DRAM)
        instance.pool.insert([1, 1], [block])
        assert block >= NUM_HBM
        assert events == [Inserted("", None, packed(1, 1), 1, [block - NUM_HBM], [0])]
    finally:
        for arena in instance.arenas.values():
            arena.close()
