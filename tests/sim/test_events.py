"""What the scheduler is told of caches is what they hold."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from memserve.pool.events import Cleared, IndexEvent, Inserted, Moved, Removed
from memserve.sim.cache import BlockCache
from memserve.sim.cluster import SimulatedCluster
from tests.sim.clusters import profile, scheduler_config, setting
from tests.sim.test_cluster import mix

STRIDE = 16 * 4
Place = tuple[int, int]


class Mirror:
    """Follows index events; what each place holds, by the whole prefix that it ends."""

    def __init__(self) -> None:
        self.prefixes: dict[Place, bytes] = {}
        self.generations: dict[Place, int] = {}

    def apply(self, events: list[IndexEvent]) -> None:
        for event in events:
            match event:
                case Cleared():
                    self.prefixes.clear()
                case Inserted(_, parent, tokens, tier, blocks, generations):
                    prefix = b"" if parent is None else self.prefixes[parent]
                    for i, block in enumerate(blocks):
                        assert (tier, block) not in self.prefixes
                        prefix += tokens[i * STRIDE : (i + 1) * STRIDE]
                        self.prefixes[tier, block] = prefix
                        self.generations[tier, block] = generations[i]
                case Removed(tier, blocks):
                    for block in blocks:
                        del self.prefixes[tier, block]
                case Moved(source_tier, sources, tier, blocks, generations):
                    moved = [self.prefixes.pop((source_tier, block)) for block in sources]
                    self.prefixes.update({(tier, b): p for b, p in zip(blocks, moved, strict=True)})
                    self.generations.update(
                        {(tier, b): g for b, g in zip(blocks, generations, strict=True)}
                    )


class Mirrored(SimulatedCluster):
    def indexed(self, instance: int, events: list[IndexEvent]) -> None:
        self.mirrors.setdefault(instance, Mirror()).apply(events)
        super().indexed(instance, events)

    mirrors: dict[int, Mirror]


def contents(cache: BlockCache) -> dict[Place, bytes]:
    mirror = Mirror()
    mirror.apply(cache.report())
    return mirror.prefixes


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    layout=st.sampled_from(["1M", "2M", "1P1D"]),
    capacity=st.sampled_from([640, 1600]),
    dram=st.sampled_from([0, 512]),
)
def test_events_give_the_caches_contents(seed: int, layout: str, capacity: int, dram: int) -> None:
    machine = profile(kv_cache_tokens=capacity, dram_cache_tokens=dram)
    cluster = Mirrored(setting(layout, machine, config=scheduler_config()), iter(mix(seed, 12)))
    cluster.mirrors = {}
    cluster.run()
    for instance in cluster.instances:
        mirror = cluster.mirrors.get(instance.number, Mirror())
        assert instance.cache.events == []
        assert mirror.prefixes == contents(instance.cache)


def test_a_reference_to_lost_content_is_not_valid() -> None:
    cache = BlockCache(0, 16, 4)
    rng = np.random.default_rng(0)
    first, second = (rng.integers(0, 100, 64, dtype=np.int32).tobytes() for _ in range(2))
    assert cache.reserve(4)
    blocks = cache.keep(first, "", 4)
    refs = cache.refs(blocks)
    assert cache.num_valid(refs) == 4
    cache.unpin(blocks)
    assert cache.reserve(2)
    assert cache.num_valid(refs) == 2
    cache.keep(second[: 2 * STRIDE], "", 2)
    assert cache.num_valid(refs) == 2
