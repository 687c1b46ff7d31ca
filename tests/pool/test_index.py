"""The radix index against a dict from prefixes to values, with exact least-recently-used order."""

import subprocess
import sys
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from memserve.pool.index import PIECE, RadixIndex, pack_tokens

BLOCK = 2
Key = tuple[str, tuple[int, ...]]

# Few different blocks, so that prefixes meet, part in the middle of an edge, and meet again.
token_lists = st.lists(st.sampled_from([(1, 1), (1, 2), (2, 1)]), min_size=0, max_size=7).flatmap(
    lambda pairs: st.integers(0, 1).map(lambda extra: [t for p in pairs for t in p] + [1] * extra)
)
salts = st.sampled_from(["", "tenant"])


def prefixes(tokens: list[int]) -> list[tuple[int, ...]]:
    return [tuple(tokens[:end]) for end in range(BLOCK, len(tokens) + 1, BLOCK)]


def goes_on(key: Key, other: Key) -> bool:
    """Whether `other` strictly continues `key`."""
    same_start = key[0] == other[0] and other[1][: len(key[1])] == key[1]
    return same_start and len(other[1]) > len(key[1])


class IndexAgainstOracle(RuleBasedStateMachine):
    """A dict of every cached prefix: its value and when it was last used."""

    @initialize()
    def start(self) -> None:
        self.index: RadixIndex[int] = RadixIndex(BLOCK)
        self.values: dict[Key, int] = {}
        self.used: dict[Key, int] = {}
        self.clock = 0
        self.next_value = 0

    def cached(self, tokens: list[int], salt: str) -> list[Key]:
        found: list[Key] = []
        for prefix in prefixes(tokens):
            if (salt, prefix) not in self.values:
                break
            found.append((salt, prefix))
        return found

    def use(self, keys: list[Key]) -> None:
        self.clock += 1
        for key in keys:
            self.used[key] = self.clock

    def forget(self, key: Key) -> int:
        del self.used[key]
        return self.values.pop(key)

    def has_continuation(self, key: Key) -> bool:
        return any(goes_on(key, other) for other in self.values)

    @rule(tokens=token_lists, salt=salts, fewer=st.integers(0, 2))
    def insert(self, tokens: list[int], salt: str, fewer: int) -> None:
        keys = [(salt, prefix) for prefix in prefixes(tokens)]
        keys = keys[: max(0, len(keys) - fewer)]
        offered = list(range(self.next_value, self.next_value + len(keys)))
        self.next_value += len(keys)
        held = self.index.insert(tokens, offered, salt)
        for key, value in zip(keys, offered, strict=True):
            self.values.setdefault(key, value)
        self.use(keys)
        assert held == [self.values[key] for key in keys]

    @rule(tokens=token_lists, salt=salts, touch=st.booleans())
    def match(self, tokens: list[int], salt: str, touch: bool) -> None:
        keys = self.cached(tokens, salt)
        assert self.index.match(tokens, salt, touch=touch) == [self.values[key] for key in keys]
        if touch:
            self.use(keys)

    @rule(tokens=token_lists, salt=salts)
    def delete(self, tokens: list[int], salt: str) -> None:
        keys = self.cached(tokens, salt)
        gone = []
        if keys and len(keys) == len(prefixes(tokens)):
            gone = [self.forget(key) for key in list(self.values) if goes_on(keys[-1], key)]
        while keys and not self.has_continuation(keys[-1]):
            gone.append(self.forget(keys.pop()))
        assert sorted(self.index.delete(tokens, salt)) == sorted(gone)

    @rule(n=st.integers(0, 6))
    def evict_the_least_recently_used_leaves(self, n: int) -> None:
        if n > len(self.values):
            assert self.index.evict(n, lambda _: True) == []
            return
        expected = []
        for _ in range(n):
            leaves = [key for key in self.values if not self.has_continuation(key)]
            expected.append(self.forget(min(leaves, key=lambda key: self.used[key])))
        assert self.index.evict(n, lambda _: True) == expected

    @rule(n=st.integers(1, 6), data=st.data(), partial=st.booleans())
    def evict_around_values_in_use(self, n: int, data: st.DataObject, partial: bool) -> None:
        pinned = data.draw(st.sets(st.sampled_from(sorted(self.values)))) if self.values else set()
        blocked = {key for key in self.values if any(key == p or goes_on(key, p) for p in pinned)}
        num_evictable = len(self.values) - len(blocked)
        pinned_values = {self.values[key] for key in pinned}
        gone = self.index.evict(n, lambda value: value not in pinned_values, partial=partial)
        expected = min(n, num_evictable) if partial or num_evictable >= n else 0
        assert len(gone) == len(set(gone)) == expected
        for key in [key for key, value in self.values.items() if value in set(gone)]:
            assert key not in blocked
            self.forget(key)
        # Evicting refreshed the values in use; a look at everything puts both orders in step.
        for salt, prefix in sorted(self.values):
            self.match(list(prefix), salt, touch=True)

    @invariant()
    def the_tree_holds_what_the_dict_holds(self) -> None:
        assert self.index.audit() == []
        assert len(self.index) == len(self.values)
        listed = {(salt, tuple(array("i", packed))): value for salt, packed, value in self.index}
        assert listed == self.values


TestIndexAgainstOracle = IndexAgainstOracle.TestCase
TestIndexAgainstOracle.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)


@given(st.lists(st.integers(-(2**31), 2**31 - 1)))
def test_packed_tokens_are_their_int32_bytes_whatever_they_came_in(tokens: list[int]) -> None:
    packed = pack_tokens(tokens)
    assert packed == pack_tokens(tuple(tokens)) == pack_tokens(array("i", tokens))
    assert pack_tokens(packed) is packed
    assert array("i", packed).tolist() == tokens


@pytest.mark.parametrize("count", [PIECE - 1, PIECE, PIECE + 1, 3 * PIECE, 3 * PIECE + 7])
def test_long_prompts_are_packed_in_pieces_without_a_seam(count: int) -> None:
    tokens = [(7919 * i) % 30_000 for i in range(count)]
    assert array("i", pack_tokens(tokens)).tolist() == tokens
    with pytest.raises(OverflowError):
        pack_tokens([*tokens[:-1], -(2**31) - 1])


def test_a_token_beyond_int32_is_an_error_and_not_another_token() -> None:
    with pytest.raises(OverflowError):
        pack_tokens([2**31])


def test_a_match_in_the_middle_of_an_edge_keeps_only_the_used_part_young() -> None:
    index: RadixIndex[str] = RadixIndex(1)
    index.insert([1, 2, 3, 4], ["a1", "a2", "a3", "a4"])
    index.insert([9], ["b"])
    index.match([1, 2])
    assert index.evict(4, lambda _: True) == ["a4", "a3", "b", "a2"]


def test_importing_the_index_and_the_references_loads_no_torch() -> None:
    code = (
        "import sys, memserve.pool, memserve.pool.index, memserve.pool.refs\n"
        "memserve.pool.RadixIndex, memserve.pool.BlockRef\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)\n"
        "memserve.pool.MemPool, memserve.pool.MemfdTransfer\n"
        "assert 'torch' not in sys.modules\n"
        "memserve.pool.Arena\n"
        "assert 'torch' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_name_that_the_package_offers_can_be_imported() -> None:
    import memserve.pool

    for name in memserve.pool.__all__:
        assert getattr(memserve.pool, name).__name__ == name
    with pytest.raises(AttributeError):
        _ = memserve.pool.nothing_like_this


def test_values_in_use_are_looked_at_once_and_not_again_at_every_eviction() -> None:
    index: RadixIndex[int] = RadixIndex(1)
    for value in range(100):
        index.insert([value], [value])
    looked_at: list[int] = []

    def evictable(value: int) -> bool:
        looked_at.append(value)
        return value >= 50

    assert index.evict(1, evictable) == [50]
    assert looked_at == list(range(51))
    looked_at.clear()
    assert index.evict(2, evictable) == [51, 52]
    assert looked_at == [51, 52]


def test_values_on_one_level_need_not_differ() -> None:
    index: RadixIndex[None] = RadixIndex(1)
    index.insert([1, 2, 3], [None, None, None])
    index.insert([1, 4], [None, None])
    assert len(index) == 4
    assert index.audit() == []
    assert index.evict(2, lambda _: True) == [None, None]
    assert len(index) == 2
