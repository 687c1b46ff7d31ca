"""The workers as one: spawns them, places requests, owns every stream until it ends.

A request enters through `generate`, an async context manager; leaving it, for whatever reason, makes
every worker forget what is left of the request. The cluster decides who owns a ticket (see
`memserve.messages`): tokens of anyone else, and tokens it has already, are dropped.

Runs on one event loop and imports no torch. It does not parse requests and does not see text.
"""

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, assert_never

from memserve.cluster.elastic import drain, join, set_role
from memserve.cluster.instance import Instance, InstancePlan, Spawn, spawn_process
from memserve.cluster.membership import Membership
from memserve.cluster.questions import Questions
from memserve.cluster.stream import Stream
from memserve.errors import ChannelClosed, InvalidRequest, Overloaded, RequestError, RequestFailed
from memserve.generation import ChoiceToken, Generation
from memserve.messages import (
    Abort,
    Calibrated,
    Declined,
    Expect,
    Heartbeat,
    IndexEvents,
    Inspect,
    Inspection,
    PoolAnswer,
    PoolCall,
    Published,
    Pulled,
    Ready,
    Rejected,
    ResetPrefixCache,
    Settle,
    StartFailed,
    Submit,
    TokenEvent,
    Tokens,
    ToLauncher,
    Withdrawn,
)
from memserve.pool.remote import PoolReply, PoolRequest, RemotePool
from memserve.scheduler.placement import LeastWork, Placement, Policy

logger = logging.getLogger(__name__)

INSPECT_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class InstanceReport:
    """One instance's books, recounted, and how the launcher sees its load."""

    name: str
    inspection: Inspection


class Cluster:
    """Serves generations on a set of workers; implements `memserve.generation.Generator`."""

    def __init__(
        self,
        plans: list[InstancePlan],
        *,
        max_num_queued_reqs: int,
        policy: Policy | None = None,
        spawn: Spawn = spawn_process,
    ) -> None:
        self._members = Membership(plans, spawn)
        self.pool = RemotePool(self)
        self._policy = policy or LeastWork(plans[0].engine.block_size)
        self._max_num_queued_reqs = max_num_queued_reqs
        self._tickets = itertools.count(1)
        self._streams: dict[int, Stream] = {}
        self._streams_by_request: dict[str, list[Stream]] = {}
        self._inspections: Questions[Inspection] = Questions()
        self._calls: Questions[PoolReply] = Questions()
        self._lost: dict[int, str] = {}
        self._released = asyncio.Event()
        """Set whenever an instance has one stream less to work on."""
        self._tasks: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Cluster"]:
        """Start every worker, serve, and stop them all at the end.

        Raises `UsageError` with the first worker's reason if any of them can't start.
        """
        await self._members.start_all()
        for instance in self.instances:
            self.in_background(self._read(instance))
        try:
            yield self
        finally:
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._members.stop_all()

    @property
    def instances(self) -> list[Instance]:
        """All that have not left."""
        return self._members.instances

    @property
    def num_requests(self) -> int:
        """Requests that are in the cluster now."""
        return len(self._streams_by_request)

    @property
    def max_sequence_tokens(self) -> int:
        """Longest prompt plus answer that fits the arena of every instance."""
        return min(instance.num_cache_tokens for instance in self.instances)

    def problems(self) -> list[str]:
        """Why the cluster can't serve; empty when it is healthy."""
        return list(self._lost.values())

    @asynccontextmanager
    async def generate(self, generation: Generation) -> AsyncIterator[AsyncIterator[ChoiceToken]]:
        """See `memserve.generation.Generator.generate`."""
        placement = self._admit(generation)
        outlet: asyncio.Queue[ChoiceToken | RequestError] = asyncio.Queue()
        streams: list[Stream] = []
        self._streams_by_request[generation.request_id] = streams
        try:
            streams.extend(
                self._dispatch(generation, choice, placement, outlet)
                for choice in range(generation.num_choices)
            )
            yield self._tokens(streams, outlet)
        finally:
            del self._streams_by_request[generation.request_id]
            for stream in streams:
                self._close(stream)

    def abort_choice(self, generation: Generation, choice: int) -> None:
        """See `memserve.generation.Generator.abort_choice`."""
        for stream in self._streams_by_request.get(generation.request_id, ()):
            if stream.choice == choice:
                self._close(stream)

    async def inspect(self) -> list[InstanceReport]:
        """Every instance's books, recounted by itself."""
        present = [one for one in self.instances if one.number not in self._lost]
        async with asyncio.timeout(INSPECT_TIMEOUT_S):
            found = await asyncio.gather(
                *(self._inspections.ask(instance, Inspect) for instance in present)
            )
        return [
            InstanceReport(instance.name, inspection)
            for instance, inspection in zip(present, found, strict=True)
        ]

    def reset_prefix_cache(self) -> None:
        """Make every instance drop the history that no request is using."""
        for instance in self.instances:
            instance.send(ResetPrefixCache())
            self._policy.forget(instance.number)

    async def call(self, instance: int, request: PoolRequest) -> PoolReply:
        """See `memserve.pool.remote.Control.call`."""
        if instance not in self._members.by_number:
            raise ChannelClosed(f"there is no instance {instance}")
        return await self._calls.ask(
            self._members.by_number[instance], lambda number: PoolCall(number, request)
        )

    # Members

    async def drain(self, number: int) -> int:
        """See `memserve.cluster.elastic.drain`."""
        return await drain(self, number)

    async def join(self, role: str) -> str:
        """See `memserve.cluster.elastic.join`."""
        return await join(self, role)

    def set_role(self, number: int, role: str) -> None:
        """See `memserve.cluster.elastic.set_role`."""
        set_role(self, number, role)

    async def add(self, plan: InstancePlan) -> Instance:
        """Start one more worker and let it serve. Raises `UsageError` if it can't start."""
        instance = await self._members.add(plan)
        self.in_background(self._read(instance))
        return instance

    async def release(self, instance: Instance) -> None:
        """Give an instance no new work, and return when what it has is done."""
        instance.leaving = True
        while any(instance.number in stream.holders for stream in self._streams.values()):
            self._released.clear()
            await self._released.wait()

    def learn(self, number: int, tokens: list[int], salt: str) -> None:
        """An instance holds this prefix now; the policy should know."""
        self._policy.learn(self._members.by_number[number].load, tokens, salt)

    async def remove(self, instance: Instance) -> None:
        """Stop an instance that has no work, and let its peers forget it."""
        self._policy.forget(instance.number)
        await self._members.remove(instance)

    def in_background(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Run something until it ends or the cluster does."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # Requests

    def _admit(self, generation: Generation) -> Placement:
        if self._lost:
            raise Overloaded("; ".join(self._lost.values()))
        if self.num_requests >= self._max_num_queued_reqs:
            raise Overloaded(f"{self.num_requests} requests are queued already; try again later")
        if generation.request_id in self._streams_by_request:
            raise InvalidRequest(f"request id {generation.request_id!r} is in use")
        num_tokens = len(generation.prompt) + generation.sampling.max_tokens
        if num_tokens > self.max_sequence_tokens:
            raise InvalidRequest(
                f"prompt and answer may take {num_tokens} tokens, but the KV cache of a worker "
                f"holds {self.max_sequence_tokens}"
            )
        loads = [instance.load for instance in self.instances if not instance.leaving]
        return self._policy.place(generation.prompt, generation.cache_salt, loads)

    def _dispatch(
        self,
        generation: Generation,
        choice: int,
        placement: Placement,
        outlet: "asyncio.Queue[ChoiceToken | RequestError]",
    ) -> Stream:
        """Register one choice and send its work."""
        prefill = self._members.by_number[placement.prefill]
        decode = self._members.by_number[placement.decode]
        ticket = next(self._tickets)
        prompt, sampling, salt = generation.prompt, generation.sampling, generation.cache_salt
        # The first choice computes the prompt, the others find it cached.
        num_uncached = placement.num_uncached_tokens if choice == 0 else 1
        stream = Stream(ticket, choice, num_uncached, prefill, decode, outlet, owner=prefill)
        self._streams[ticket] = stream
        prefill.load.num_prefill_tokens += num_uncached
        decode.load.num_sequences += 1
        if decode is not prefill:
            stream.holders.add(decode.number)
            decode.send(Expect(ticket, choice, prompt, sampling, salt))
        stream.holders.add(prefill.number)
        decode_on = None if decode is prefill else decode.number
        prefill.send(Submit(ticket, choice, prompt, sampling, decode_on, salt))
        return stream

    def _close(self, stream: Stream) -> None:
        """Forget a stream and make the workers forget it too."""
        if self._streams.pop(stream.ticket, None) is None:
            return
        if stream.num_tokens == 0:
            stream.prefill.load.num_prefill_tokens -= stream.num_uncached_tokens
        stream.decode.load.num_sequences -= 1
        for number in stream.holders:
            self._members.by_number[number].send(Abort(stream.ticket))
        self._released.set()

    async def _tokens(
        self, streams: list[Stream], outlet: "asyncio.Queue[ChoiceToken | RequestError]"
    ) -> AsyncIterator[ChoiceToken]:
        """Tokens of all choices as they come, until every choice has ended."""
        while not outlet.empty() or any(stream.ticket in self._streams for stream in streams):
            item = await outlet.get()
            if isinstance(item, RequestError):
                raise item
            yield item

    # Workers

    async def _read(self, instance: Instance) -> None:
        """Handle what a worker sends until it leaves, or until we fail to: nobody waits in vain."""
        try:
            async for batch in instance.messages():
                for message in batch:
                    self._handle(instance, message)
        except Exception:
            logger.exception("a message of worker %s could not be handled", instance.name)
        self._lose(instance)

    def _lose(self, instance: Instance) -> None:
        """A worker has gone: fail what it worked on."""
        if instance.number not in self._members.by_number:
            return  # it was asked to leave
        reason = f"worker {instance.name} has died"
        logger.error("%s", reason)
        self._lost[instance.number] = reason
        for stream in list(self._streams.values()):
            if instance.number in stream.holders:
                self._fail(stream, RequestFailed(reason))
        self._inspections.lose(instance)
        self._calls.lose(instance)

    def _handle(self, instance: Instance, message: ToLauncher) -> None:
        match message:
            case Tokens(events):
                for event in events:
                    self._token(instance, event)
            case Published():
                self._relay(message)
            case Pulled(ticket):
                self._pulled(ticket)
            case Declined(ticket):
                self._declined(instance, ticket)
            case Withdrawn(ticket):
                self._withdrawn(ticket)
            case Rejected(ticket, reason):
                self._rejected(ticket, reason)
            case Heartbeat(stats):
                instance.stats = stats
            case Inspection(query, stats):
                instance.stats = stats
                self._inspections.answer(query, message)
            case PoolAnswer(number, reply):
                self._calls.answer(number, reply)
            case Calibrated() | IndexEvents():
                logger.debug("%s told of its steps or its index", instance.name)
            case Ready() | StartFailed():
                raise AssertionError("a worker starts once")
            case _:
                assert_never(message)

    def _token(self, instance: Instance, event: TokenEvent) -> None:
        stream = self._streams.get(event.ticket)
        if stream is None or stream.owner is not instance or event.position != stream.num_tokens:
            return  # of an aborted stream, or a token that the client has already
        if stream.num_tokens == 0:
            stream.prefill.load.num_prefill_tokens -= stream.num_uncached_tokens
        stream.num_tokens += 1
        stream.outlet.put_nowait(ChoiceToken(stream.choice, event))
        if event.finish is not None:
            stream.holders.discard(instance.number)
            self._close(stream)

    def _relay(self, message: Published) -> None:
        stream = self._streams.get(message.ticket)
        if stream is not None and stream.decode is not stream.prefill:
            stream.decode.send(message)

    def _pulled(self, ticket: int) -> None:
        """The decode instance has the prompt: it owns the stream, unless the prompt was withdrawn."""
        stream = self._streams.get(ticket)
        if stream is not None and stream.decode is not stream.prefill:
            stream.owner = stream.decode
            stream.holders.discard(stream.prefill.number)
            self._released.set()
            stream.prefill.send(Settle(ticket, accepted=True))

    def _declined(self, instance: Instance, ticket: int) -> None:
        stream = self._streams.get(ticket)
        if stream is not None and stream.decode is instance:
            stream.holders.discard(instance.number)
            self._decode_where_prefilled(stream)
            stream.prefill.send(Settle(ticket, accepted=False))

    def _withdrawn(self, ticket: int) -> None:
        stream = self._streams.get(ticket)
        if stream is not None and stream.owner is not stream.decode:
            stream.holders.discard(stream.decode.number)
            stream.decode.send(Abort(ticket))
            self._decode_where_prefilled(stream)

    def _decode_where_prefilled(self, stream: Stream) -> None:
        self._released.set()
        stream.decode.load.num_sequences -= 1
        stream.prefill.load.num_sequences += 1
        stream.decode = stream.prefill

    def _rejected(self, ticket: int, reason: str) -> None:
        stream = self._streams.get(ticket)
        if stream is not None:
            self._fail(stream, RequestFailed(reason))

    def _fail(self, stream: Stream, error: RequestError) -> None:
        stream.outlet.put_nowait(error)
        self._close(stream)
