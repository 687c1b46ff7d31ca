"""Whose turn it is among the started groups and other prompts, and a chunk's way through a step.

The group with the lowest number is worked on until this rank's part of its prompt is computed. Before
each of its chunks a rank may compute one step of other prompts; then it says that it is ready, and from
then on it only decodes until all are ready and the chunk is entered. So a prompt that comes while a
group computes begins after the chunk under way, the group gets a chunk for every step of others,
however many of those there are, and all ranks compute others' prompts at the same time. A rank that
waits takes its word back for a step that it has left. While a rank of the group is still busy with an
older group, other prompts are computed without such a bound.

Contract: an engine lets `schedule` put a step together, passes `written` to the step, and afterwards
calls `computed` for each slice of a group, or `broke`. A group that can't go on is reported to `leave`,
which calls `remove`.
"""

import time
from bisect import insort
from collections.abc import Callable
from operator import attrgetter
from typing import final

from memserve.errors import GroupBroken
from memserve.messages import Abort, Shutdown
from memserve.workers.batching import Batcher
from memserve.workers.link import Event, Hangup
from memserve.workers.mailbox import Mailbox
from memserve.workers.parts import Part
from memserve.workers.sequence import Slice

PAUSE_S = 0.002
"""How long an engine without other work waits for other ranks before it looks at its inbox."""

MEET_S = 0.008
"""How long a rank that has streams waits for those who leave a chunk together with it."""

Leave = Callable[[Part, str, int | None], None]
"""Give a part up, for this reason; the instance that was waited for in vain."""


class _Ended(GroupBroken):
    """The launcher wants it no more."""


@final
class Turns:
    """The started groups of one instance whose prompts are not computed yet."""

    def __init__(
        self,
        mail: Mailbox,
        beat: Callable[[], None],
        leave: Leave,
        prefilled: Callable[[Part], None],
    ) -> None:
        """`prefilled` hears of a part whose last chunk is computed here."""
        self._mail = mail
        self._beat = beat
        self._leave = leave
        self._prefilled = prefilled
        self._started: list[Part] = []  # by number
        self._entered: Part | None = None  # the one whose chunk the step at hand computes
        self.num_steps = 0

    def __len__(self) -> int:
        return len(self._started)

    def add(self, part: Part) -> None:
        """A group has started."""
        insort(self._started, part, key=attrgetter("number"))

    def remove(self, part: Part) -> None:
        """This rank has left it, if it was there."""
        if part in self._started:
            self._started.remove(part)

    @property
    def num_ranks(self) -> int:
        """Instances that compute the step at hand together."""
        return 1 if self._entered is None else len(self._entered.group.instances)

    def schedule(self, batcher: Batcher) -> list[Slice]:
        """The slices of the next step: a group's chunk and chunks of other prompts never share one.

        A group's step lasts as long as that of its slowest rank, so whatever is added to one of them
        would keep all of them.
        """
        left, self._entered = self._entered, None
        part = self._first()
        passing = part is None or self._gives_way(part)
        slices = batcher.schedule(prefill=passing)
        part = self._first()  # the room of the one before may have gone to an older request
        if part is None:
            return slices
        if passing and any(other.sequence.prefilling for other in slices):
            if self._give_way(part):
                return slices
            slices = [other for other in slices if not other.sequence.prefilling]
        if not (self._meet(part) if part is left else self._all_reached(part)):
            return slices
        self._entered = part
        self.num_steps += 1
        known = part.sequence.num_computed
        own = part.own_slices
        return slices + [Slice(part.sequence, end - start, start - known) for start, end in own]

    def pause(self) -> None:
        """With nothing else to do, wait a little for the others."""
        self._all_reached(self._started[0], seconds=PAUSE_S)

    def written(self, num_layers: int) -> None:
        """K and V of a layer are written here: wait until they are everywhere, or raise GroupBroken."""
        part = self._entered
        assert part is not None
        assert part.lockstep is not None
        part.lockstep.tell(part.num_chunks_done, num_layers)
        part.lockstep.wait(part.num_chunks_done, num_layers, self._go_on)

    def broke(self, error: GroupBroken) -> None:
        """The step was left in its middle."""
        assert self._entered is not None
        if not isinstance(error, _Ended):  # of which the mailbox tells
            self._leave(self._entered, str(error), error.waited_for)

    def computed(self, computed: Slice) -> bool:
        """A slice of a verified step is computed; True if it was the chunk's last one here."""
        part = self._entered
        assert part is not None
        if computed.end < part.own_slices[-1][1]:
            return False
        self._advance(part)
        return True

    def _first(self) -> Part | None:
        """The part that is worked on, past chunks of which this rank computes nothing."""
        while self._started:
            part = self._started[0]
            if part.own_slices:
                return part
            self._advance(part)
        return None

    def _gives_way(self, part: Part) -> bool:
        """Whether other prompts may come before its next chunk, which others may have entered."""
        return not part.gave_way and not (part.ready and self._all_reached(part))

    def _give_way(self, part: Part) -> bool:
        """The next step is one of other prompts; False if the others may have entered the chunk.

        Who takes its word back and then finds all others ready can't know whether they have looked
        before or after: they would wait for that whole step, with their streams.
        """
        assert part.lockstep is not None
        part.lockstep.hold_back(part.num_chunks_done)
        was_ready, part.ready = part.ready, False
        if was_ready and self._others_reached(part):
            return False
        part.gave_way = part.lockstep.met()
        return True

    def _all_reached(self, part: Part, seconds: float = 0.0) -> bool:
        """Tell the others how far we are; whether they are as far."""
        assert part.lockstep is not None
        part.lockstep.tell(part.num_chunks_done)
        part.ready = True
        return self._others_reached(part, seconds)

    def _meet(self, part: Part) -> bool:
        """The same, right after a chunk: the others leave it now, too, and most are ready at once.

        Who doesn't wait for them computes a step of its streams, for which they wait in the next
        chunk's first layer, with theirs; and all do so before every chunk.
        """
        deadline = time.monotonic() + MEET_S
        while not self._all_reached(part, seconds=max(0.0, deadline - time.monotonic())):
            if part not in self._started or time.monotonic() >= deadline:
                return False
        return True

    def _others_reached(self, part: Part, seconds: float = 0.0) -> bool:
        """Whether the others are ready for the next chunk. The group may turn out to be broken."""
        assert part.lockstep is not None
        try:
            return part.lockstep.reached(part.num_chunks_done, seconds=seconds)
        except GroupBroken as error:
            self._leave(part, str(error), error.waited_for)
            return False

    def _advance(self, part: Part) -> None:
        """This rank has done its part of a chunk."""
        assert part.lockstep is not None
        part.sequence.num_computed = part.chunks[part.num_chunks_done][1]
        part.num_chunks_done += 1
        part.ready = part.gave_way = False
        part.lockstep.hold_back(part.num_chunks_done)
        if part.prefilled:
            self._started.remove(part)
            self._prefilled(part)

    def _go_on(self) -> None:
        """While a step waits for the others: still alive; GroupBroken if it was ended from outside."""
        assert self._entered is not None
        ticket = self._entered.ticket
        self._beat()

        def ends(event: Event) -> bool:
            return isinstance(event, Shutdown | Hangup) or event == Abort(ticket)

        if self._mail.glance(ends):
            raise _Ended("the launcher has ended it")
