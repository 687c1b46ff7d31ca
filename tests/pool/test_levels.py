"""Levels of the radix index against a dict from prefixes to values and levels."""

from array import array

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from memserve.pool.index import RadixIndex
from tests.pool.test_index import BLOCK, Key, goes_on, prefixes, salts, token_lists


class LevelsAgainstOracle(RuleBasedStateMachine):
    """`values` and `levels` say what each cached prefix must have."""

    @initialize()
    def start(self) -> None:
        self.index: RadixIndex[int] = RadixIndex(BLOCK, num_levels=2)
        self.values: dict[Key, int] = {}
        self.levels: dict[Key, int] = {}
        self.next_value = 0

    def new_value(self) -> int:
        self.next_value += 1
        return self.next_value

    def forget(self, values: list[int]) -> None:
        for key in [key for key, value in self.values.items() if value in set(values)]:
            del self.values[key], self.levels[key]

    def below(self, key: Key) -> list[Key]:
        return [other for other in self.values if goes_on(key, other)]

    def above(self, key: Key) -> list[Key]:
        return [other for other in self.values if goes_on(other, key)]

    @rule(tokens=token_lists, salt=salts, level=st.sampled_from([0, 1]))
    def insert(self, tokens: list[int], salt: str, level: int) -> None:
        keys = [(salt, prefix) for prefix in prefixes(tokens)]
        level = max([level, *(self.levels[key] for key in keys if key in self.levels)])
        held = self.index.insert(tokens, [self.new_value() for _ in keys], salt, level=level)
        for key, value in zip(keys, held, strict=True):
            self.values.setdefault(key, value)
            self.levels.setdefault(key, level)
        assert held == [self.values[key] for key in keys]

    @rule(tokens=token_lists, salt=salts)
    def match(self, tokens: list[int], salt: str) -> None:
        keys = [(salt, p) for p in prefixes(tokens) if (salt, p) in self.values]
        assert self.index.match(tokens, salt) == [self.values[key] for key in keys]

    @rule(tokens=token_lists, salt=salts)
    def delete(self, tokens: list[int], salt: str) -> None:
        self.forget(self.index.delete(tokens, salt))

    @precondition(lambda self: self.values)
    @rule(data=st.data(), level=st.sampled_from([0, 1]))
    def values_move_as_far_as_levels_allow(self, data: st.DataObject, level: int) -> None:
        chosen = data.draw(st.sets(st.sampled_from(sorted(self.values)), min_size=1))
        leaving = {key for key in chosen if self.levels[key] != level}
        blocking = self.below if level == 1 else self.above
        may_go = {
            key
            for key in leaving
            if all(self.levels[other] == level or other in leaving for other in blocking(key))
        }
        new_by_old = {self.values[key]: self.new_value() for key in chosen}
        moved = self.index.move(new_by_old, level)
        assert sorted(moved) == sorted(self.values[key] for key in may_go)
        for key in may_go:
            self.values[key] = new_by_old[self.values[key]]
            self.levels[key] = level

    @rule(
        n=st.integers(1, 6),
        data=st.data(),
        level=st.sampled_from([0, 1]),
        partial=st.booleans(),
    )
    def evict(self, n: int, data: st.DataObject, level: int, partial: bool) -> None:
        pinned = data.draw(st.sets(st.sampled_from(sorted(self.values)))) if self.values else set()
        pinned_values = {self.values[key] for key in pinned}
        blocked = {key for key in self.values if key in pinned or set(self.below(key)) & pinned}
        may_go = {k for k in self.values if k not in blocked and self.levels[k] == level}
        gone = self.index.evict(
            n, lambda value: value not in pinned_values, partial=partial, level=level
        )
        of_level = [key for key in may_go if self.values[key] in set(gone)]
        expected = min(n, len(may_go)) if partial or len(may_go) >= n else 0
        assert len(of_level) == expected
        self.forget(gone)
        assert not pinned_values & set(gone)

    @rule(n=st.integers(1, 6), data=st.data())
    def the_coldest_are_leaves_of_their_level(self, n: int, data: st.DataObject) -> None:
        pinned = data.draw(st.sets(st.sampled_from(sorted(self.values)))) if self.values else set()
        pinned_values = {self.values[key] for key in pinned}
        found = self.index.coldest(n, lambda value: value not in pinned_values)
        key_by_value = {value: key for key, value in self.values.items()}
        free = [
            key
            for key in self.values
            if self.levels[key] == 0
            and not any(k in pinned for k in (key, *self.below(key)) if self.levels[k] == 0)
        ]
        assert len(found) == len(set(found)) == min(n, len(free))
        for i, value in enumerate(found):
            continuing = [k for k in self.below(key_by_value[value]) if self.levels[k] == 0]
            assert {self.values[k] for k in continuing} <= set(found[:i])

    @invariant()
    def the_tree_holds_what_the_dicts_hold(self) -> None:
        assert self.index.audit() == []
        listed = {(salt, tuple(array("i", packed))): value for salt, packed, value in self.index}
        assert listed == self.values


TestLevelsAgainstOracle = LevelsAgainstOracle.TestCase
TestLevelsAgainstOracle.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)


def test_what_stays_fast_stays_as_cold_as_it_was() -> None:
    index: RadixIndex[str] = RadixIndex(1, num_levels=2)
    index.insert([1, 2, 3], ["a1", "a2", "a3"])
    index.insert([9], ["b"])
    assert index.coldest(2, lambda _: True) == ["a3", "a2"]
    assert index.move({"a3": "A3", "a2": "A2"}, 1) == ["a2", "a3"]
    assert index.coldest(2, lambda _: True) == ["a1", "b"]
    assert index.match([1, 2, 3]) == ["a1", "A2", "A3"]


def test_what_came_to_the_slower_level_last_leaves_it_last() -> None:
    index: RadixIndex[str] = RadixIndex(1, num_levels=2)
    for name in ("a", "b"):
        index.insert([ord(name)], [name])
    index.move({"b": "B"}, 1)
    index.move({"a": "A"}, 1)
    assert index.evict(1, lambda _: True, level=1) == ["B"]


def test_a_block_stays_fast_while_a_fast_one_continues_it() -> None:
    index: RadixIndex[str] = RadixIndex(1, num_levels=2)
    index.insert([1, 2], ["a", "ab"])
    index.insert([1, 3], ["-", "ac"])
    assert index.move({"a": "A", "ab": "AB"}, 1) == ["ab"]
    assert index.move({"a": "A", "ac": "AC"}, 1) == ["ac", "a"]
    assert index.audit() == []


def test_a_block_comes_back_only_with_all_before_it() -> None:
    index: RadixIndex[str] = RadixIndex(1, num_levels=2)
    index.insert([1, 2], ["a", "ab"], level=1)
    index.insert([1, 3], ["-", "ac"], level=1)
    assert index.move({"ab": "AB"}, 0) == []
    assert index.move({"ab": "AB", "a": "A"}, 0) == ["a", "ab"]
    assert index.match([1, 2]) == ["A", "AB"]
    assert index.match([1, 3]) == ["A", "ac"]
    assert index.audit() == []


def test_slow_continuations_go_with_a_fast_block_or_keep_it() -> None:
    index: RadixIndex[str] = RadixIndex(1, num_levels=2)
    index.insert([1], ["a"])
    index.insert([1, 2], ["a", "ab"], level=1)
    assert index.evict(1, lambda value: value != "ab") == []
    assert sorted(index.evict(1, lambda _: True)) == ["a", "ab"]
    assert len(index) == 0
