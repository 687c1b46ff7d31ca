"""What workers say, handed to whom it concerns.

Contract: every message of a worker goes to exactly one part of the cluster, in the order in which it
was sent, and only while this very life of the worker counts: what one sends that is lost is too late.
Decides nothing, and does not know what becomes of a worker that falls silent.
"""

from collections.abc import Iterable
from typing import assert_never, final

from memserve.cluster.groups import Groups
from memserve.cluster.inspecting import Inspections
from memserve.cluster.instance import Instance
from memserve.cluster.knowledge import Knowledge
from memserve.cluster.membership import Membership
from memserve.cluster.pool_calls import PoolCalls
from memserve.cluster.streams import Streams
from memserve.messages import (
    Calibrated,
    Declined,
    Heartbeat,
    IndexEvents,
    Inspection,
    PoolAnswer,
    Published,
    Pulled,
    Ready,
    Rejected,
    StartFailed,
    Tokens,
    ToLauncher,
    Withdrawn,
)
from memserve.parallel.messages import Gathered, Joined, LeftGroup, LetGo


@final
class Hearing:
    """Knows who is to hear of what."""

    def __init__(
        self,
        members: Membership,
        streams: Streams,
        groups: Groups,
        knowledge: Knowledge,
        inspections: Inspections,
        calls: PoolCalls,
    ) -> None:
        self._members = members
        self._streams = streams
        self._groups = groups
        self._knowledge = knowledge
        self._inspections = inspections
        self._calls = calls

    def hear(self, instance: Instance, batch: Iterable[ToLauncher]) -> None:
        """A worker has sent these."""
        for message in batch:
            if self._members.is_member(instance):  # one of them may be the end of it
                self._hand_on(instance, message)

    def lose(self, instance: Instance) -> None:
        """A worker says nothing any more: who waits for its answer waits in vain."""
        self._knowledge.lose(instance)
        self._groups.lose(instance)
        self._inspections.lose(instance)
        self._calls.lose(instance)

    def _hand_on(self, instance: Instance, message: ToLauncher) -> None:
        match message:
            case Tokens(events):
                for event in events:
                    self._streams.token(instance, event)
            case Published():
                self._streams.published(message)
            case Pulled(ticket):
                self._streams.pulled(ticket)
            case Declined(ticket):
                self._streams.declined(instance, ticket)
            case Withdrawn(ticket):
                self._streams.withdrawn(instance, ticket)
            case Rejected():
                self._streams.rejected(message)
            case Heartbeat():
                self._knowledge.beat(instance, message)
            case IndexEvents():
                self._knowledge.index_changed(instance, message)
            case Calibrated():
                self._knowledge.calibrated(message)
            case Inspection(query, stats):
                instance.note_stats(stats)
                self._inspections.answer(query, message)
            case PoolAnswer(number, reply):
                self._calls.answer(number, reply)
            case Joined(ticket, refs):
                self._groups.joined(instance, ticket, refs)
            case LeftGroup():
                self._streams.left(instance, message)
            case Gathered(ticket):
                self._streams.gathered(ticket)
            case LetGo(ticket):
                self._groups.let_go(instance, ticket)
            case Ready() | StartFailed():
                raise AssertionError(f"not expected here: {message}")
            case _:
                assert_never(message)
