"""The dispatched choices: who works on each, who owns it, and where its tokens go.

Contract: a stream is opened with its work sent, and closed exactly once; closing makes every worker
forget what is left of it. The first of Pulled and Withdrawn that arrives decides who owns a ticket
(see `memserve.messages`): tokens of anyone else, and tokens that came before, are dropped. Every step
of a ticket's life is reported to the scheduler here, and nowhere else.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from memserve.cluster.instance import Instance
from memserve.errors import RequestError, RequestFailed
from memserve.generation import ChoiceToken, Generation
from memserve.messages import Abort, Expect, Published, Settle, Submit, TokenEvent
from memserve.scheduler.interface import Ask, Placement
from memserve.scheduler.scheduler import Scheduler

Outlet = asyncio.Queue[ChoiceToken | RequestError]


@dataclass(slots=True, eq=False)
class Stream:
    """One dispatched choice."""

    ticket: int
    choice: int
    generation: Generation
    placement: Placement
    prefill: Instance
    decode: Instance
    outlet: Outlet
    owner: Instance
    """Whose tokens count; the prefill instance until the decode instance has pulled."""
    holders: set[int] = field(default_factory=set)
    """Instances that hold something for the ticket."""
    answer: list[int] = field(default_factory=list)
    """Its tokens so far."""
    finished: bool = False
    """Whether its last token has come."""


class Streams:
    """The streams by ticket; `ended` hears of each that is over, when its workers were told."""

    def __init__(
        self,
        scheduler: Scheduler,
        instances: Mapping[int, Instance],
        ended: Callable[[Stream], None],
    ) -> None:
        self._scheduler = scheduler
        self._instances = instances
        self._ended = ended
        self._next_ticket = 1
        self._streams: dict[int, Stream] = {}
        self._released = asyncio.Event()
        """Set whenever an instance has one stream less to work on."""

    def __len__(self) -> int:
        return len(self._streams)

    def open(
        self, generation: Generation, choice: int, ask: Ask, placement: Placement, outlet: Outlet
    ) -> Stream:
        """Register one choice and send its work."""
        prefill = self._instances[placement.prefill]
        decode = self._instances[placement.decode]
        ticket = self._next_ticket
        self._next_ticket += 1
        stream = Stream(ticket, choice, generation, placement, prefill, decode, outlet, prefill)
        self._streams[ticket] = stream
        self._scheduler.dispatched(ticket, choice, ask, placement, time.monotonic())
        if decode is not prefill:
            stream.holders.add(decode.number)
            decode.send(
                Expect(
                    ticket=ticket,
                    choice=choice,
                    prompt=generation.prompt,
                    sampling=generation.sampling,
                    cache_salt=generation.cache_salt,
                    reuse=placement.reuse_decode,
                )
            )
        stream.holders.add(prefill.number)
        prefill.send(submission(stream))
        return stream

    def is_open(self, stream: Stream) -> bool:
        """Whether more tokens of it may come."""
        return stream.ticket in self._streams

    def close(self, stream: Stream) -> None:
        """Forget a stream and make the workers forget it too; nothing happens if it is closed."""
        if self._streams.pop(stream.ticket, None) is None:
            return
        self._scheduler.ended(stream.ticket, time.monotonic())
        for number in stream.holders:
            self._instances[number].send(Abort(stream.ticket))
        self._released.set()
        self._ended(stream)

    def fail(self, stream: Stream, error: RequestError) -> None:
        """Let the request end with an error."""
        stream.outlet.put_nowait(error)
        self.close(stream)

    def lose(self, instance: Instance, reason: str) -> None:
        """An instance has died: fail what it worked on."""
        for stream in list(self._streams.values()):
            if instance.number in stream.holders:
                self.fail(stream, RequestFailed(reason))

    async def released(self, instance: Instance) -> None:
        """Wait until an instance works on nothing."""
        while any(instance.number in stream.holders for stream in self._streams.values()):
            self._released.clear()
            await self._released.wait()

    # What workers say of a ticket

    def token(self, instance: Instance, event: TokenEvent) -> None:
        """A token has come."""
        stream = self._streams.get(event.ticket)
        if stream is None or stream.owner is not instance or event.position != len(stream.answer):
            return  # of an aborted stream, or a token that the client has already
        now = time.monotonic()
        if stream.answer:
            self._scheduler.token(stream.ticket, now)
        else:
            self._scheduler.first_token(stream.ticket, now)
        stream.answer.append(event.token)
        stream.outlet.put_nowait(ChoiceToken(stream.choice, event))
        if event.finish is not None:
            stream.finished = True
            stream.holders.discard(instance.number)
            self.close(stream)

    def published(self, message: Published) -> None:
        """Blocks can be pulled: tell the decode instance."""
        stream = self._streams.get(message.ticket)
        if stream is not None and stream.decode is not stream.prefill:
            stream.decode.send(message)

    def pulled(self, ticket: int) -> None:
        """The decode instance has the prompt: it owns the stream, unless the prompt was withdrawn."""
        stream = self._streams.get(ticket)
        if stream is not None and stream.decode is not stream.prefill:
            stream.owner = stream.decode
            stream.holders.discard(stream.prefill.number)
            self._released.set()
            self._scheduler.decodes_at(ticket, stream.decode.number, time.monotonic())
            stream.prefill.send(Settle(ticket, accepted=True))

    def declined(self, instance: Instance, ticket: int) -> None:
        """The decode instance has no room."""
        stream = self._streams.get(ticket)
        if stream is not None and stream.decode is instance:
            stream.holders.discard(instance.number)
            self._decode_where_prefilled(stream)
            stream.prefill.send(Settle(ticket, accepted=False))

    def withdrawn(self, ticket: int) -> None:
        """The prefill instance needed its blocks back."""
        stream = self._streams.get(ticket)
        if stream is not None and stream.owner is not stream.decode:
            stream.holders.discard(stream.decode.number)
            stream.decode.send(Abort(ticket))
            self._decode_where_prefilled(stream)

    def rejected(self, ticket: int, reason: str) -> None:
        """The instance can't run it."""
        stream = self._streams.get(ticket)
        if stream is not None:
            self.fail(stream, RequestFailed(reason))

    def _decode_where_prefilled(self, stream: Stream) -> None:
        self._released.set()
        stream.decode = stream.prefill
        self._scheduler.decodes_at(stream.ticket, stream.prefill.number, time.monotonic())


def submission(stream: Stream) -> Submit:
    """The work of a stream's prefill instance."""
    generation, placement = stream.generation, stream.placement
    fetch = placement.fetch
    return Submit(
        ticket=stream.ticket,
        choice=stream.choice,
        prompt=generation.prompt,
        sampling=generation.sampling,
        decode_on=None if stream.decode is stream.prefill else stream.decode.number,
        cache_salt=generation.cache_salt,
        reuse=placement.reuse_prefill,
        order=placement.order,
        first_fetched_block=fetch.first_block if fetch else 0,
        fetch=fetch.refs if fetch else [],
    )
