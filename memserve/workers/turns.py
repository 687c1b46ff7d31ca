"""Whose turn it is among the started groups, and a chunk's way through a step of the engine.

Contract: an engine calls `ready` and `slices` when it puts a step together, passes `written` to the
step, and afterwards calls `computed` for each of these slices, or `broke`. The group with the lowest
number is worked on until this rank's part of its prompt is computed. A group that can't go on is
reported to `leave`, which calls `remove`.
"""

from bisect import insort
from collections.abc import Callable
from operator import attrgetter
from typing import final

from memserve.errors import GroupBroken
from memserve.messages import Abort, Shutdown
from memserve.workers.link import Event, Hangup
from memserve.workers.mailbox import Mailbox
from memserve.workers.parts import Part
from memserve.workers.sequence import Slice

PAUSE_S = 0.002
"""How long an engine without other work waits for other ranks before it looks at its inbox."""

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
    def under_way(self) -> bool:
        """Whether other prompts have to wait: the other ranks are, or soon will be, at work."""
        return bool(self._started) and self._started[0].num_chunks_done > 0

    @property
    def num_ranks(self) -> int:
        """Instances that compute the step at hand together."""
        return 1 if self._entered is None else len(self._entered.group.instances)

    def ready(self) -> bool:
        """Tell the others how far we are; whether all are ready for the next chunk."""
        self._entered = None
        while self._started:
            part = self._started[0]
            if not part.own_slices:
                self._advance(part)
                continue
            if self._all_reached(part):
                self._entered = part
            break
        return self._entered is not None

    def slices(self) -> list[Slice]:
        """What this rank computes of the chunk that all are ready for."""
        part = self._entered
        if part is None or part not in self._started:  # given up meanwhile, for an older request
            self._entered = None
            return []
        self.num_steps += 1
        known = part.sequence.num_computed
        return [Slice(part.sequence, end - start, start - known) for start, end in part.own_slices]

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

    def _all_reached(self, part: Part, seconds: float = 0.0) -> bool:
        """Tell the others how far we are; whether they are as far. It may turn out to be broken."""
        assert part.lockstep is not None
        part.lockstep.tell(part.num_chunks_done)
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
        part.lockstep.tell(part.num_chunks_done)
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
