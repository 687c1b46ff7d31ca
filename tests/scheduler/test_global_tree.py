"""The global prompt tree against plain dictionaries, and what it does when messages get lost."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from memserve.messages import IndexEvents
from memserve.pool.events import Cleared, IndexEvent, Inserted, Moved, Removed
from memserve.pool.index import pack_tokens
from memserve.pool.refs import BlockRef
from memserve.scheduler.global_tree import GlobalPromptTree

BLOCK = 2
INSTANCES = (0, 1, 2)
SALTS = ("", "s")
Path = tuple[int, ...]  # one number a block
Key = tuple[str, Path]

paths = st.lists(st.integers(0, 1), min_size=1, max_size=6).map(tuple)
instances = st.sampled_from(INSTANCES)
salts = st.sampled_from(SALTS)
picks = st.integers(0, 99)


def pack(path: Path) -> bytes:
    return pack_tokens([token for block in path for token in (block, 7)])


class TreeAgainstDictionaries(RuleBasedStateMachine):
    """`held[instance]` maps every held prefix to its (tier, block, generation)."""

    def __init__(self) -> None:
        super().__init__()
        self.tree = GlobalPromptTree(BLOCK)
        self.held: dict[int, dict[Key, tuple[int, int, int]]] = {}
        self.numbers = dict.fromkeys(INSTANCES, 0)
        self.tickets: list[tuple[int, str, Path]] = []
        self.num_blocks = 0
        for instance in INSTANCES:
            self.tree.join(instance, epoch=instance + 1)
            self.held[instance] = {}

    def tell(self, instance: int, *events: IndexEvent) -> None:
        self.numbers[instance] += 1
        assert self.tree.apply(instance, IndexEvents(self.numbers[instance], [*events]))

    def new_ref(self, tier: int) -> tuple[int, int, int]:
        self.num_blocks += 1
        return tier, self.num_blocks, self.num_blocks % 5

    def below(self, instance: int, salt: str, path: Path) -> list[Key]:
        """A held prefix and all held that continue it, the longest first."""
        keys = [
            key for key in self.held[instance] if key[0] == salt and key[1][: len(path)] == path
        ]
        return sorted(keys, key=lambda key: -len(key[1]))

    def remove(self, instance: int, keys: list[Key]) -> list[IndexEvent]:
        """The longest prefixes lie in the slow tier, so they go first."""
        refs = [self.held[instance].pop(key) for key in keys]
        by_tier = {tier: [ref[1] for ref in refs if ref[0] == tier] for tier in (1, 0)}
        return [Removed(tier, blocks) for tier, blocks in by_tier.items() if blocks]

    @rule(instance=instances, salt=salts, path=paths, slow=st.booleans())
    def insert(self, instance: int, salt: str, path: Path, slow: bool) -> None:
        held = self.held[instance]
        known = next(n for n in range(len(path), -1, -1) if n == 0 or (salt, path[:n]) in held)
        if known == len(path):
            return
        parent = held[salt, path[:known]] if known else None
        tier = 1 if slow or (parent and parent[0]) else 0
        refs = [self.new_ref(tier) for _ in path[known:]]
        for i, ref in enumerate(refs, start=known + 1):
            held[salt, path[:i]] = ref
        event = Inserted(
            salt,
            parent and parent[:2],
            pack(path[known:]),
            tier,
            [ref[1] for ref in refs],
            [ref[2] for ref in refs],
        )
        self.tell(instance, event)

    @rule(instance=instances, pick=picks)
    def evict(self, instance: int, pick: int) -> None:
        if held := sorted(self.held[instance]):
            keys = self.below(instance, *held[pick % len(held)])
            self.tell(instance, *self.remove(instance, keys))

    @rule(instance=instances, pick=picks, tier=st.integers(0, 1))
    def move(self, instance: int, pick: int, tier: int) -> None:
        held = self.held[instance]
        if not held:
            return
        salt, path = sorted(held)[pick % len(held)]
        if tier:
            keys = [key for key in self.below(instance, salt, path) if held[key][0] == 0]
        else:
            above = [(salt, path[: n + 1]) for n in range(len(path))]
            keys = [key for key in above if held[key][0] == 1]
        if keys:
            sources = [held[key][1] for key in keys]
            for key in keys:
                held[key] = self.new_ref(tier)
            blocks, generations = [held[k][1] for k in keys], [held[k][2] for k in keys]
            self.tell(instance, Moved(1 - tier, sources, tier, blocks, generations))

    @rule(instance=instances, salt=salts, path=paths)
    def expect(self, instance: int, salt: str, path: Path) -> None:
        self.tree.expect(instance, pack(path), salt)
        self.tickets.append((instance, salt, path))

    @rule(index=st.integers(0, 9))
    def end(self, index: int) -> None:
        if index < len(self.tickets):
            instance, salt, path = self.tickets.pop(index)
            self.tree.unexpect(instance, pack(path), salt)

    @rule(instance=instances, how=st.sampled_from(["clear", "gap", "impossible", "restart"]))
    def lose_all(self, instance: int, how: str) -> None:
        self.held[instance].clear()
        if how == "restart":
            self.tree.leave(instance)
            self.tree.join(instance, epoch=instance + 1)
            self.numbers[instance] = 0
            return
        if how == "gap":
            self.numbers[instance] += 2
            assert not self.tree.apply(instance, IndexEvents(self.numbers[instance], []))
            self.tell(instance, Removed(0, [1]))  # ignored until it tells everything anew
        elif how == "impossible":
            orphan = Inserted("", (0, 999_999), pack((0, 1)), 0, [1, 2], [0, 0])
            first = Inserted("", None, pack((0, 1)), 1, [3, 4], [0, 0])
            self.numbers[instance] += 1
            message = IndexEvents(self.numbers[instance], [Cleared(), first, orphan])
            assert not self.tree.apply(instance, message)
        self.numbers[instance] += 10
        self.tell(instance, Cleared())

    @rule(salt=salts, path=paths)
    def look_up(self, salt: str, path: Path) -> None:
        found = self.tree.match(pack(path), salt)
        for instance, held in self.held.items():
            refs = [
                held[salt, path[: n + 1]] for n in range(len(path)) if (salt, path[: n + 1]) in held
            ]
            expected = max(
                (
                    next(n for n in range(len(path), -1, -1) if path[:n] == theirs[:n])
                    for who, their_salt, theirs in self.tickets
                    if (who, their_salt) == (instance, salt)
                ),
                default=0,
            )
            assert found.held.get(instance, 0) == len(refs)
            assert found.slow.get(instance, 0) == sum(tier > 0 for tier, _, _ in refs)
            assert found.reach(instance) == max(len(refs), expected)
            located = self.tree.locate(instance, pack(path), salt)
            assert located == [BlockRef(instance, instance + 1, *ref) for ref in refs]

    @invariant()
    def books_are_right(self) -> None:
        assert self.tree.audit() == []
        prefixes = {key for held in self.held.values() for key in held}
        expected = {(s, p[: n + 1]) for _, s, p in self.tickets for n in range(len(p))}
        assert len(self.tree) == len(prefixes | expected)


TreeAgainstDictionaries.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None
)
test_the_tree_agrees_with_dictionaries = TreeAgainstDictionaries.TestCase


def test_a_prompt_is_expected_until_its_ticket_ends() -> None:
    tree = GlobalPromptTree(BLOCK)
    tree.join(0, epoch=1)
    prompt = pack((1, 2, 3))
    tree.expect(0, prompt, "")
    assert tree.match(prompt, "").reach(0) == 3
    tree.unexpect(0, prompt, "")
    assert tree.match(prompt, "").reach(0) == 0
    assert len(tree) == 0


def test_events_of_who_has_left_are_ignored() -> None:
    tree = GlobalPromptTree(BLOCK)
    assert tree.apply(5, IndexEvents(7, [Removed(0, [1])]))
    assert len(tree) == 0
