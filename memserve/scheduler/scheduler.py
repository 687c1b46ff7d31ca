"""The global scheduler: decides where every request runs, and learns from what then happens.

Contract: the caller asks with `place`, reports every dispatched choice by its ticket until `ended`,
and hands on what workers tell of their caches and steps. Time is passed in, so a cluster and a
simulation drive the same code. No I/O, no torch, single-threaded.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from memserve.messages import CopySample, IndexEvents, StepSample
from memserve.pool.refs import BlockRef
from memserve.scheduler.counters import Counters
from memserve.scheduler.interface import Ask, Placement, Role, SchedulerConfig
from memserve.scheduler.prompt_tree import PromptTree


@dataclass(slots=True)
class _Load:
    """What one instance has been given and has not finished."""

    instance: int
    role: Role
    num_blocks: int
    num_prefill_tokens: int = 0
    num_sequences: int = 0
    last_chosen: int = 0
    leaving: bool = False


@dataclass(slots=True)
class _Ticket:
    prefill: int
    decode: int
    num_prefill_tokens: int


class Scheduler:
    """Places requests on the instances that have joined."""

    TOKENS_PER_SEQUENCE = 64

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._loads: dict[int, _Load] = {}
        self._tickets: dict[int, _Ticket] = {}
        self._prompts = PromptTree(config.block_size)
        self._num_chosen = 0
        self.counters = Counters()

    # Members

    def join(
        self,
        instance: int,
        role: Role,
        *,
        num_blocks: Sequence[int],
        block_bytes: int,
        epoch: int,
    ) -> None:
        """An instance serves from now on; its cache is empty.

        `num_blocks` are those of its tiers, the fastest first, of `block_bytes` each; `epoch` is
        its life.
        """
        assert block_bytes > 0
        assert epoch > 0
        self._loads[instance] = _Load(instance, role, sum(num_blocks))

    def leave(self, instance: int) -> None:
        """An instance has gone; tickets that it still has may end later."""
        self._loads.pop(instance, None)
        self.forget(instance)

    def set_role(self, instance: int, role: Role) -> None:
        """Change what new requests are sent there."""
        self._loads[instance].role = role

    def set_leaving(self, instance: int) -> None:
        """Send no new work there."""
        self._loads[instance].leaving = True

    def roles(self) -> dict[int, Role]:
        """Every instance's role."""
        return {load.instance: load.role for load in self._loads.values()}

    # Requests

    def place(self, ask: Ask, now: float) -> Placement:
        """Where a request should run.

        Raises `LookupError` when no instance prefills, or none decodes.
        """
        assert now >= 0
        serving = [load for load in self._loads.values() if not load.leaving]
        cached = {
            load.instance: self._prompts.match(load.instance, ask.prompt, ask.salt)
            for load in serving
            if load.role.prefills
        }
        prefill = self._least(
            (load for load in serving if load.role.prefills),
            lambda load: (
                load.num_prefill_tokens
                - cached[load.instance]
                + self.TOKENS_PER_SEQUENCE * load.num_sequences
            ),
        )
        decode = prefill
        if not prefill.role.decodes:
            decode = self._least(
                (load for load in serving if load.role.decodes), lambda load: load.num_sequences
            )
        return Placement(
            prefill=prefill.instance,
            decode=decode.instance,
            num_cached_tokens=cached[prefill.instance],
        )

    def dispatched(
        self, ticket: int, choice: int, ask: Ask, placement: Placement, now: float
    ) -> None:
        """One choice of a placed request was sent; its load counts from now on."""
        assert now >= 0
        # The first choice computes the prompt, the others find it cached.
        num_new = len(ask.prompt) - placement.num_cached_tokens if choice == 0 else 1
        self._tickets[ticket] = _Ticket(placement.prefill, placement.decode, num_new)
        prefill, decode = self._loads[placement.prefill], self._loads[placement.decode]
        prefill.num_prefill_tokens += num_new
        decode.num_sequences += 1
        self._prompts.record(prefill.instance, ask.prompt, ask.salt, num_blocks=prefill.num_blocks)

    def first_token(self, ticket: int, now: float) -> None:
        """The prompt of a ticket is computed."""
        assert now >= 0
        found = self._tickets.get(ticket)
        if found is not None and found.prefill in self._loads:
            self._loads[found.prefill].num_prefill_tokens -= found.num_prefill_tokens
            found.num_prefill_tokens = 0

    def token(self, ticket: int, now: float) -> None:
        """One more token of a ticket has come."""

    def decodes_at(self, ticket: int, instance: int, now: float) -> None:
        """The ticket's answer is generated there: a handover was accepted, declined or withdrawn."""
        assert now >= 0
        found = self._tickets.get(ticket)
        if found is None or found.decode == instance:
            return
        if found.decode in self._loads:
            self._loads[found.decode].num_sequences -= 1
        if instance in self._loads:
            self._loads[instance].num_sequences += 1
        found.decode = instance

    def ended(self, ticket: int, now: float) -> None:
        """A ticket is over, whatever became of it; unknown ones are ignored."""
        self.first_token(ticket, now)
        found = self._tickets.pop(ticket, None)
        if found is not None and found.decode in self._loads:
            self._loads[found.decode].num_sequences -= 1

    # What workers tell

    def apply(self, instance: int, events: IndexEvents) -> bool:
        """Follow an instance's index.

        False if it can't be followed (a message is missing): ask the worker to report all of it.
        """
        assert events.number > 0
        return instance in self._loads

    def forget(self, instance: int) -> None:
        """An instance's cache is empty."""
        self._prompts.forget(instance)

    def locate(self, instance: int, tokens: list[int], salt: str) -> list[BlockRef]:
        """What an instance holds of the whole blocks of `tokens`, in order, on any tier."""
        known = self._prompts.match(instance, tokens, salt)
        assert known >= 0
        return []  # where they lie is known once index events are followed

    def learn(self, instance: int, steps: list[StepSample], copies: list[CopySample]) -> None:
        """Timed steps and copies of an instance."""

    def replan(self, now: float) -> list[tuple[int, Role]]:
        """Roles that should change now; the caller applies them with `set_role`."""
        assert now >= 0
        return []

    def _least(self, loads: Iterable[_Load], weight: Callable[[_Load], int]) -> _Load:
        chosen = min(loads, key=lambda load: (weight(load), load.last_chosen), default=None)
        if chosen is None:
            raise LookupError("no instance serves this role")
        self._num_chosen += 1
        chosen.last_chosen = self._num_chosen
        return chosen
