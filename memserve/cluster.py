"""The workers as one: spawns them, places requests, owns every stream until it ends.

A request enters through `generate`, an async context manager; leaving it, for whatever reason, makes
every worker forget what is left of the request. The cluster decides who owns a ticket (see
`memserve.messages`): tokens of anyone else, and tokens it has already, are dropped.

Runs on one event loop and imports no torch. It does not parse requests and does not see text.
"""

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import assert_never

from memserve.errors import InvalidRequest, Overloaded, RequestError, RequestFailed
from memserve.generation import ChoiceToken, Generation
from memserve.instance import Instance, InstancePlan, Spawn, spawn_process
from memserve.messages import (
    Abort,
    Declined,
    Expect,
    Heartbeat,
    Inspect,
    Inspection,
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
from memserve.scheduler.placement import LeastWork, Placement, Policy

logger = logging.getLogger(__name__)

INSPECT_TIMEOUT_S = 30.0


@dataclass(slots=True, eq=False)
class Stream:
    """One dispatched choice: who works on it, and where its tokens go."""

    ticket: int
    choice: int
    num_uncached_tokens: int
    prefill: Instance
    decode: Instance
    outlet: "asyncio.Queue[ChoiceToken | RequestError]"
    owner: Instance
    """Whose tokens count; the prefill instance until the decode instance has pulled."""
    holders: set[int] = field(default_factory=set)
    """Instances that hold something for the ticket."""
    num_tokens: int = 0


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
        self.instances = [Instance(number, 1, plan, spawn) for number, plan in enumerate(plans)]
        self._policy = policy or LeastWork(plans[0].engine.block_size)
        self._max_num_queued_reqs = max_num_queued_reqs
        self._tickets = itertools.count(1)
        self._queries = itertools.count(1)
        self._streams: dict[int, Stream] = {}
        self._streams_by_request: dict[str, list[Stream]] = {}
        self._inspections: dict[int, asyncio.Future[Inspection]] = {}
        self._lost: dict[int, str] = {}

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Cluster"]:
        """Start every worker, serve, and stop them all at the end.

        Raises `UsageError` with the first worker's reason if any of them can't start.
        """
        await self._start_all()
        readers = [asyncio.create_task(self._read(instance)) for instance in self.instances]
        try:
            yield self
        finally:
            for reader in readers:
                reader.cancel()
            await asyncio.gather(*readers, return_exceptions=True)
            await self._stop()

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
        asked = []
        for instance in self.instances:
            if instance.number not in self._lost:
                query = next(self._queries)
                self._inspections[query] = asyncio.get_running_loop().create_future()
                instance.send(Inspect(query))
                asked.append((instance, query))
        try:
            async with asyncio.timeout(INSPECT_TIMEOUT_S):
                return [
                    InstanceReport(instance.name, await self._inspections[query])
                    for instance, query in asked
                ]
        finally:
            for _, query in asked:
                self._inspections.pop(query).cancel()

    def reset_prefix_cache(self) -> None:
        """Make every instance drop the history that no request is using."""
        for instance in self.instances:
            instance.send(ResetPrefixCache())
            self._policy.forget(instance.number)

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
        loads = [instance.load for instance in self.instances]
        return self._policy.place(generation.prompt, generation.cache_salt, loads)

    def _dispatch(
        self,
        generation: Generation,
        choice: int,
        placement: Placement,
        outlet: "asyncio.Queue[ChoiceToken | RequestError]",
    ) -> Stream:
        """Register one choice and send its work."""
        prefill = self.instances[placement.prefill]
        decode = self.instances[placement.decode]
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
            self.instances[number].send(Abort(stream.ticket))

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

    async def _start_all(self) -> None:
        """Start all workers at once and let them map each other's arenas."""
        try:
            async with asyncio.TaskGroup() as starting:
                for instance in self.instances:
                    starting.create_task(self._start(instance))
        except BaseException as error:
            await self._stop()
            if isinstance(error, BaseExceptionGroup):
                raise error.exceptions[0] from None
            raise
        for instance, peer in itertools.permutations(self.instances, 2):
            instance.introduce(peer)

    async def _start(self, instance: Instance) -> None:
        await instance.start()
        await instance.wait_ready()
        assert instance.ready is not None
        instance.load.num_cache_blocks = instance.num_cache_blocks
        logger.info(
            "%s serves: %d tokens of KV cache, %s, %s attention",
            instance.name,
            instance.num_cache_tokens,
            instance.ready.dtype,
            instance.ready.attention,
        )

    async def _stop(self) -> None:
        async with asyncio.TaskGroup() as stopping:
            for instance in self.instances:
                stopping.create_task(instance.stop())

    async def _read(self, instance: Instance) -> None:
        async for batch in instance.messages():
            for message in batch:
                self._handle(instance, message)
        self._lose(instance)

    def _lose(self, instance: Instance) -> None:
        """A worker has gone: fail what it worked on."""
        reason = f"worker {instance.name} has died"
        logger.error("%s", reason)
        self._lost[instance.number] = reason
        for stream in list(self._streams.values()):
            if instance.number in stream.holders:
                self._fail(stream, RequestFailed(reason))

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
                if query in self._inspections:
                    self._inspections[query].set_result(message)
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
