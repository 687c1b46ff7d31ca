"""Prefill here, decode there: both ends of a handover.

`Departures` belongs to the prefill side: it publishes a prompt's blocks as its chunks are computed
and keeps them until the launcher settles who decodes. `Arrivals` belongs to the decode side: it
reserves room for a whole prompt, all or nothing and in ticket order, once its prefill has started;
pulls the blocks that its own index lacks; and hands the finished sequence to the batcher.

Several instances may have computed the blocks, each publishing its own, in any order.

Nothing here waits: every call returns at once, deadlines are looked at by `expire`. When a peer's
message never comes, a deadline settles the matter, and the prefill side decodes by itself.
"""

import itertools
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import msgspec

from memserve.messages import (
    Declined,
    Expect,
    Published,
    Pulled,
    Withdrawn,
    known_tokens,
    num_known_tokens,
)
from memserve.pool.mempool import MemPool
from memserve.pool.refs import BlockRef, Tier
from memserve.workers.batching import Batcher
from memserve.workers.claims import Claims
from memserve.workers.link import CopyDone
from memserve.workers.sequence import Sequence, Slice, handed_over
from memserve.workers.swapping import Swapper

logger = logging.getLogger(__name__)

Send = Callable[[msgspec.Struct], None]
StartCopy = Callable[[int, list[int], list[BlockRef], list[int], int], None]
"""Copy (ticket, numbers of blocks, their references, into these local blocks) in the background.

The last argument is the step that completes them, as in `Published`; 0: they are complete.
"""


class Departures:
    """Prompts computed here that another instance is to decode."""

    def __init__(
        self,
        pool: MemPool,
        batcher: Batcher,
        claims: Claims,
        send: Send,
        *,
        timeout: float,
        granularity: str,
    ) -> None:
        self._pool = pool
        self._batcher = batcher
        self._claims = claims
        self._send = send
        self._timeout = timeout
        self._granularity = granularity
        self._leaving: dict[int, tuple[Sequence, float]] = {}
        self.num_withdrawn = 0
        batcher.before_preempting = self.recall

    def __len__(self) -> int:
        return len(self._leaving)

    @property
    def sequences(self) -> list[Sequence]:
        """The sequences that wait for their decode instance."""
        return [sequence for sequence, _ in self._leaving.values()]

    def announce(self, slices: Iterable[Slice], step: int) -> bool:
        """Before a step with this number: tell the decode instances of the blocks that it completes.

        Only by `layer` (the paper's by-layer transfer, §5.2), for which True means that somebody may
        follow the step. Blocks that are complete already, out of the cache, are published as such.
        """
        if self._granularity != "layer":
            return False
        size = self._pool.block_size
        followed = False
        for part in slices:
            sequence = part.sequence
            if sequence.decode_on is not None and sequence.prefilling and not sequence.spread:
                self._publish(sequence, sequence.num_computed // size)
                end = (sequence.num_computed + part.num_tokens) // size
                followed |= self._publish(sequence, end, step=step)
        return followed

    def publish(self, sequence: Sequence, now: float) -> None:
        """Tell the decode instance of the blocks that are complete and not announced yet.

        After the prompt's last chunk (the first token is known then) that includes the block that is
        not full, and the sequence leaves the batch until `settle`. By `request`, that is the only
        time (the paper's by-request aggregated transfer, §5.2).
        """
        done = sequence.num_new_outputs > 0
        if done:
            self._publish(sequence, len(sequence.blocks), first_token=sequence.tokens[-1])
        elif self._granularity != "request":
            self._publish(sequence, sequence.num_computed // self._pool.block_size)
        if done:
            self.depart(sequence, now)
            self._claims.hold(sequence.ticket, lambda: self._withdraw(sequence))

    def depart(self, sequence: Sequence, now: float) -> None:
        """All of a running sequence is published: out of the batch until `settle`."""
        self._batcher.suspend(sequence)
        self._leaving[sequence.ticket] = (sequence, now + 2 * self._timeout)

    def settle(self, ticket: int, *, accepted: bool) -> bool:
        """The launcher's word on who decodes; True if the ticket was waiting for it here."""
        if ticket not in self._leaving:
            return False
        sequence, _ = self._leaving.pop(ticket)
        if accepted:
            self._release(sequence)
        else:
            self._keep(sequence)
        return True

    def abort(self, ticket: int) -> None:
        """Forget a ticket."""
        if ticket in self._leaving:
            self._release(self._leaving.pop(ticket)[0])

    def recall(self, sequence: Sequence) -> None:
        """A prompt loses its blocks half-way: decode it here, after it was computed again.

        The decode instance must not keep room for it until then. Two instances that prefill for each
        other would: each would hold what the other one's prompt needs to be computed again.
        """
        if sequence.decode_on is not None and sequence.num_published:
            self._send(Withdrawn(sequence.ticket))
            sequence.decode_on = None

    def expire(self, now: float) -> None:
        """Take back what nobody has settled in time."""
        for sequence, deadline in list(self._leaving.values()):
            if now >= deadline:
                logger.warning("ticket %d: its handover was never settled", sequence.ticket)
                self._take_back(sequence)
                self._keep(sequence)

    def _publish(
        self, sequence: Sequence, end: int, *, first_token: int | None = None, step: int = 0
    ) -> bool:
        """Publish the blocks before number `end`; whether there was anything to tell."""
        start = sequence.num_published
        if end <= start and first_token is None:
            return False
        refs = self._pool.refs(sequence.blocks[start:end])
        self._send(Published(sequence.ticket, start, refs, first_token, step))
        sequence.num_published = end
        return True

    def _keep(self, sequence: Sequence) -> None:
        sequence.decode_on = None
        self._batcher.run(sequence)

    def _take_back(self, sequence: Sequence) -> None:
        del self._leaving[sequence.ticket]
        self.num_withdrawn += 1
        self._send(Withdrawn(sequence.ticket))

    def _withdraw(self, sequence: Sequence) -> None:
        """An older claim needs the blocks: compute the prompt again later, and decode it here."""
        self._take_back(sequence)
        self._release(sequence)
        sequence.decode_on = None
        self._batcher.add(sequence)

    def _release(self, sequence: Sequence) -> None:
        if not sequence.spread:
            self._claims.drop(sequence.ticket)
            self._batcher.release(sequence)


@dataclass(slots=True, eq=False)
class Arrival:
    """A prompt that another instance is computing for this one."""

    expect: Expect
    published: dict[int, tuple[BlockRef, int]] = field(default_factory=dict)
    """By number of the block where it is, and the step of its owner that completes it; 0: complete."""
    first_token: int | None = None
    deadline: float | None = None
    """Until when to wait for room; set when the prefill is known to have started."""
    whole_by: float | None = None
    """Until when to wait for word of further blocks; set when the prefill is known to have ended."""
    blocks: list[int] = field(default_factory=list)
    """Reserved local blocks, the matched ones first; empty: no room yet."""
    num_matched: int = 0
    asked: set[int] = field(default_factory=set)
    """Numbers of the blocks whose copy was started."""
    num_missing: int = 0
    """Copies started and not yet verified."""


class Arrivals:
    """Room reserved and blocks pulled for prompts that other instances compute."""

    def __init__(
        self,
        pool: MemPool,
        batcher: Batcher,
        claims: Claims,
        swapper: Swapper,
        send: Send,
        start_copy: StartCopy,
        *,
        max_num_seqs: int,
        timeout: float,
    ) -> None:
        self._pool = pool
        self._batcher = batcher
        self._claims = claims
        self._swapper = swapper
        self._send = send
        self._start_copy = start_copy
        self._max_num_seqs = max_num_seqs
        self._timeout = timeout
        self._arrivals: dict[int, Arrival] = {}
        self.num_handovers = 0
        self.num_declined = 0
        self.num_late = 0
        """Copies that ended when nobody waited for them any more."""
        self.num_failed_pulls = 0
        self.num_pulled_blocks = 0
        self.num_pulls = 0

    def __len__(self) -> int:
        return len(self._arrivals)

    @property
    def blocks(self) -> list[int]:
        """The blocks that all arrivals hold references to."""
        return [block for arrival in self._arrivals.values() for block in arrival.blocks]

    def expect(self, message: Expect) -> None:
        """A prompt will come; no room is kept until its prefill has started."""
        self._arrivals[message.ticket] = Arrival(message)

    def published(self, message: Published, now: float) -> None:
        """Blocks of an expected prompt can be pulled."""
        arrival = self._arrivals.get(message.ticket)
        if arrival is None:
            return  # declined or aborted meanwhile
        first = message.first_block
        if first in arrival.published:  # its sender was preempted, and starts anew from there
            later = {number for number in arrival.published if number >= first}
            for number in later - arrival.asked:
                del arrival.published[number]
        for number, ref in enumerate(message.refs, start=first):
            arrival.published[number] = (ref, message.step)
        if message.first_token is not None:
            arrival.first_token = message.first_token
            arrival.whole_by = now + self._timeout
        if arrival.deadline is None:
            arrival.deadline = now + self._timeout
        if arrival.blocks:
            self._pull(arrival)

    def copied(self, done: CopyDone) -> None:
        """A copy has ended: count it, or give up if a block changed under it."""
        self._pool.end_io(done.into)
        self._swapper.copies.ended((done.ticket, done.indexes[0]))
        arrival = self._arrivals.get(done.ticket)
        if arrival is None:
            self.num_late += 1
            return
        arrival.num_missing -= len(done.indexes)
        if not all(done.verified):
            self.num_failed_pulls += 1
            self._decline(arrival, "a published block changed, or was not written in time")
        else:
            self.num_pulled_blocks += len(done.indexes)
            self._join(arrival)

    def reserve(self) -> None:
        """Reserve room for those whose prefill has started, in ticket order, as far as it goes."""
        for ticket in sorted(self._arrivals):
            arrival = self._arrivals.get(ticket)  # an older one may have taken its room meanwhile
            if arrival is None or arrival.blocks or arrival.deadline is None:
                continue
            if not self._reserve(arrival):
                return
            self._pull(arrival)

    def expire(self, now: float) -> None:
        """Decline those that have waited for too long, for room or for word of their blocks.

        While copies hang, all.
        """
        hang = self._swapper.copies.stalled
        for arrival in list(self._arrivals.values()):
            if hang and arrival.deadline is not None:
                self._decline(arrival, "copies hang")
            elif not arrival.blocks and arrival.deadline is not None and now >= arrival.deadline:
                self._decline(arrival, "no room in time")
            elif arrival.whole_by is None or now < arrival.whole_by:
                continue
            elif arrival.blocks and self._num_unknown(arrival):
                self._decline(arrival, "word of some of its blocks has not come")

    def abort(self, ticket: int) -> None:
        """Forget a ticket."""
        if ticket in self._arrivals:
            self._release(self._arrivals[ticket])

    def _reserve(self, arrival: Arrival) -> bool:
        reserved = sum(1 for other in self._arrivals.values() if other.blocks)
        if len(self._batcher.running) + reserved >= self._max_num_seqs:
            return False
        expect = arrival.expect
        # What lies in our own DRAM is pulled from the peer as well: it is the same copy.
        tokens = known_tokens(expect)
        reusable = tokens[: -1 if expect.reuse else 0]
        match = self._pool.match(reusable, expect.cache_salt, deepest=Tier.HBM)
        num_missing = -(-(len(tokens) + 1) // self._pool.block_size) - len(match.blocks)
        blocks = None
        if not self._swapper.make_room(num_missing):
            blocks = self._claims.allocate(num_missing, above=expect.ticket)
        if blocks is None:
            match.release()
            return False
        arrival.num_matched = len(match.blocks)
        arrival.blocks = match.commit() + blocks
        self._claims.hold(
            expect.ticket, lambda: self._decline(arrival, "an older request needs the room")
        )
        return True

    def _pull(self, arrival: Arrival) -> None:
        """Start copying the published blocks that are neither here nor on their way."""
        wanted = [
            number
            for number in sorted(arrival.published)
            if number >= arrival.num_matched and number not in arrival.asked
        ]
        if not wanted:
            self._join(arrival)
        for step, group in itertools.groupby(wanted, lambda number: arrival.published[number][1]):
            numbers = [*group]
            into = [arrival.blocks[number] for number in numbers]
            self._pool.begin_io(into)
            arrival.asked.update(numbers)
            self.num_pulls += self._pool.descriptor.layout.num_layers if step else 1
            arrival.num_missing += len(numbers)
            ticket = arrival.expect.ticket
            if not step:
                self._swapper.copies.begun((ticket, numbers[0]))
            refs = [arrival.published[number][0] for number in numbers]
            self._start_copy(ticket, numbers, refs, into, step)

    def _join(self, arrival: Arrival) -> None:
        """Run the sequence here once all of its prompt is."""
        expect = arrival.expect
        if arrival.first_token is None or arrival.num_missing or self._num_unknown(arrival):
            return
        self._forget(arrival)
        self.num_handovers += 1
        self._send(Pulled(expect.ticket))
        sequence = handed_over(expect, arrival.first_token, arrival.blocks)
        self._batcher.run(sequence)
        self._batcher.share(sequence)

    def _num_unknown(self, arrival: Arrival) -> int:
        """Blocks of its prompt that nobody has published."""
        num_blocks = -(-num_known_tokens(arrival.expect) // self._pool.block_size)
        return num_blocks - arrival.num_matched - len(arrival.asked)

    def _decline(self, arrival: Arrival, reason: str) -> None:
        self.num_declined += 1
        logger.info("ticket %d: handover declined: %s", arrival.expect.ticket, reason)
        self._send(Declined(arrival.expect.ticket, reason))
        self._release(arrival)

    def _release(self, arrival: Arrival) -> None:
        self._forget(arrival)
        self._pool.free_mem(arrival.blocks)

    def _forget(self, arrival: Arrival) -> None:
        del self._arrivals[arrival.expect.ticket]
        self._claims.drop(arrival.expect.ticket)
