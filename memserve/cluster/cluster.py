"""The workers as one: spawns them, places requests, hands on what workers say.

A request enters through `generate`, an async context manager; leaving it, for whatever reason, makes
every worker forget what is left of the request. Where it runs is the scheduler's decision, who owns a
ticket that of `memserve.cluster.streams`.

Runs on one event loop and imports no torch. It does not parse requests and does not see text.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, assert_never

from memserve.cluster.admission import Admission
from memserve.cluster.elastic import adapt_roles, drain, join, set_role
from memserve.cluster.instance import Instance, InstancePlan, Spawn, spawn_process
from memserve.cluster.knowledge import Knowledge
from memserve.cluster.membership import Membership
from memserve.cluster.questions import Questions
from memserve.cluster.returning import Returns
from memserve.cluster.streams import Outlet, Stream, Streams
from memserve.errors import ChannelClosed, InvalidRequest, Overloaded, RequestError
from memserve.generation import ChoiceToken, Generation
from memserve.messages import (
    Calibrated,
    Declined,
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
    StartFailed,
    Tokens,
    ToLauncher,
    Withdrawn,
)
from memserve.pool.remote import PoolReply, PoolRequest, RemotePool
from memserve.scheduler.interface import Ask, Placement
from memserve.scheduler.scheduler import Scheduler

logger = logging.getLogger(__name__)

INSPECT_TIMEOUT_S = 30.0
DEFAULT_MAX_NUM_QUEUED_TOKENS = 1 << 20


@dataclass(frozen=True, slots=True)
class InstanceReport:
    """One instance's books, recounted, and how the launcher sees its load."""

    number: int
    name: str
    inspection: Inspection


class Cluster:
    """Serves generations on a set of workers; implements `memserve.generation.Generator`.

    With `calibration` workers time a few steps before their first request, for the scheduler. With
    `returns` the KV of answers comes back to where their prompts were prefilled.
    """

    def __init__(
        self,
        plans: list[InstancePlan],
        scheduler: Scheduler,
        *,
        max_num_queued_reqs: int,
        max_num_queued_tokens: int = DEFAULT_MAX_NUM_QUEUED_TOKENS,
        calibration: bool = False,
        returns: bool = True,
        spawn: Spawn = spawn_process,
    ) -> None:
        self._members = Membership(plans, spawn)
        self.pool = RemotePool(self)
        self.scheduler = scheduler
        self._calibration = calibration
        self._knowledge = Knowledge(scheduler)
        self.returns = Returns(
            self.pool,
            scheduler,
            self.in_background,
            block_size=plans[0].engine.block_size,
            enabled=returns,
        )
        self._streams = Streams(scheduler, self._members.by_number, self.returns.ended)
        self._streams_by_request: dict[str, list[Stream]] = {}
        self._admission = Admission(max_num_queued_reqs, max_num_queued_tokens)
        self._inspections: Questions[Inspection] = Questions()
        self._calls: Questions[PoolReply] = Questions()
        self._lost: dict[int, str] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Cluster"]:
        """Start every worker, serve, and stop them all at the end.

        Raises `UsageError` with the first worker's reason if any of them can't start.
        """
        await self._members.start_all()
        try:
            for instance in self.instances:
                self._admit_instance(instance)
                self.in_background(self._read(instance))
            if self._calibration:
                await self._knowledge.calibrate(self.instances)
            self.in_background(adapt_roles(self))
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
    def num_streams(self) -> int:
        """Choices that are being worked on now."""
        return len(self._streams)

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
        self._admit(generation)
        ask = Ask(
            prompt=generation.prompt,
            max_tokens=generation.sampling.max_tokens,
            salt=generation.cache_salt,
            num_choices=generation.num_choices,
            priority=generation.priority,
            tenant=generation.tenant,
            session=generation.session,
        )
        placement = self._place(ask)
        outlet: Outlet = asyncio.Queue()
        streams: list[Stream] = []
        self._streams_by_request[generation.request_id] = streams
        self._admission.enter(generation)
        try:
            streams.extend(
                self._streams.open(generation, choice, ask, placement, outlet)
                for choice in range(generation.num_choices)
            )
            yield self._tokens(streams, outlet)
        finally:
            del self._streams_by_request[generation.request_id]
            self._admission.leave(generation)
            for stream in streams:
                self._streams.close(stream)

    def abort_choice(self, generation: Generation, choice: int) -> None:
        """See `memserve.generation.Generator.abort_choice`."""
        for stream in self._streams_by_request.get(generation.request_id, ()):
            if stream.choice == choice:
                self._streams.close(stream)

    async def inspect(self) -> list[InstanceReport]:
        """Every instance's books, recounted by itself."""
        present = [one for one in self.instances if one.number not in self._lost]
        async with asyncio.timeout(INSPECT_TIMEOUT_S):
            found = await asyncio.gather(
                *(self._inspections.ask(instance, Inspect) for instance in present)
            )
        return [
            InstanceReport(instance.number, instance.name, inspection)
            for instance, inspection in zip(present, found, strict=True)
        ]

    def reset_prefix_cache(self) -> None:
        """Make every instance drop the history that no request is using; it tells what that was."""
        for instance in self.instances:
            instance.send(ResetPrefixCache())

    async def call(self, instance: int, request: PoolRequest) -> PoolReply:
        """See `memserve.pool.remote.Control.call`."""
        if instance not in self._members.by_number:
            raise ChannelClosed(f"there is no instance {instance}")
        return await self._calls.ask(
            self._members.by_number[instance], lambda number: PoolCall(number, request)
        )

    def tell(self, instance: int, request: PoolRequest) -> None:
        """See `memserve.pool.remote.Control.tell`."""
        if instance in self._members.by_number:
            self._calls.tell(
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
        timed = await self._knowledge.timed_steps(instance) if self._calibration else None
        self._admit_instance(instance)
        if timed is not None:
            self._knowledge.learn(instance, timed)
        return instance

    async def release(self, instance: Instance) -> None:
        """Return when what a leaving instance has to do is done."""
        await self._streams.released(instance)

    async def remove(self, instance: Instance) -> None:
        """Stop an instance that has no work, and let its peers forget it."""
        self.scheduler.leave(instance.number)
        self._knowledge.lose(instance)
        await self._members.remove(instance)

    def in_background(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Run something until it ends or the cluster does."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._background_ended)
        return task

    def _background_ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("something in the background has failed", exc_info=error)

    def _admit_instance(self, instance: Instance) -> None:
        self.scheduler.join(
            instance.number,
            instance.role,
            num_blocks=instance.num_blocks,
            block_bytes=instance.block_bytes,
            epoch=instance.epoch,
        )

    # Requests

    def _admit(self, generation: Generation) -> None:
        """Refuse what can't be served at all, or not now."""
        if self._lost:
            raise Overloaded("; ".join(self._lost.values()))
        self._admission.check(generation)
        if generation.request_id in self._streams_by_request:
            raise InvalidRequest(f"request id {generation.request_id!r} is in use")
        num_tokens = len(generation.prompt) + generation.sampling.max_tokens
        if num_tokens > self.max_sequence_tokens:
            raise InvalidRequest(
                f"prompt and answer may take {num_tokens} tokens, but the KV cache of a worker "
                f"holds {self.max_sequence_tokens}"
            )

    def _place(self, ask: Ask) -> Placement:
        """The scheduler's decision, timed."""
        counters, start = self.scheduler.counters, time.perf_counter()
        try:
            return self.scheduler.place(ask, time.monotonic())
        except LookupError as error:
            raise Overloaded(str(error)) from None
        finally:
            counters.num_decisions += 1
            counters.decision_seconds += time.perf_counter() - start

    async def _tokens(self, streams: list[Stream], outlet: Outlet) -> AsyncIterator[ChoiceToken]:
        """Tokens of all choices as they come, until every choice has ended."""
        while not outlet.empty() or any(map(self._streams.is_open, streams)):
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
        self._streams.lose(instance, reason)
        self.scheduler.leave(instance.number)
        self._knowledge.lose(instance)
        self._inspections.lose(instance)
        self._calls.lose(instance)

    def _handle(self, instance: Instance, message: ToLauncher) -> None:
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
                self._streams.withdrawn(ticket)
            case Rejected(ticket, reason):
                self._streams.rejected(ticket, reason)
            case Heartbeat():
                self._knowledge.beat(instance, message)
            case IndexEvents():
                self._knowledge.index_changed(instance, message)
            case Calibrated():
                self._knowledge.calibrated(message)
            case Inspection(query, stats):
                instance.stats = stats
                self._inspections.answer(query, message)
            case PoolAnswer(number, reply):
                self._calls.answer(number, reply)
            case Ready() | StartFailed():
                raise AssertionError("a worker starts once")
            case _:
                assert_never(message)
