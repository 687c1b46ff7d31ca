"""Which instances there are: starts them, introduces them to each other, stops them."""

import asyncio
import itertools
import logging

from memserve.cluster.instance import Instance, InstancePlan, Spawn
from memserve.messages import ReleasePeer

logger = logging.getLogger(__name__)


class Membership:
    """The instances by number; numbers are never used twice."""

    def __init__(self, plans: list[InstancePlan], spawn: Spawn) -> None:
        self._spawn = spawn
        self._numbers = itertools.count()
        members = [self._make(plan) for plan in plans]
        self.by_number = {instance.number: instance for instance in members}
        self._leaving: list[Instance] = []

    @property
    def instances(self) -> list[Instance]:
        """All that have not left."""
        return list(self.by_number.values())

    async def start_all(self) -> None:
        """Start all at once and let them map each other's arenas.

        Raises `UsageError` with the first one's reason if any of them can't start.
        """
        try:
            async with asyncio.TaskGroup() as starting:
                for instance in self.instances:
                    starting.create_task(self._start(instance))
        except BaseException as error:
            await self.stop_all()
            if isinstance(error, BaseExceptionGroup):
                raise error.exceptions[0] from None
            raise
        for instance, peer in itertools.permutations(self.instances, 2):
            instance.introduce(peer)

    async def add(self, plan: InstancePlan) -> Instance:
        """Start one more. Raises `UsageError` with its reason if it can't start."""
        instance = self._make(plan)
        try:
            await self._start(instance)
        except BaseException:
            await instance.stop()
            raise
        for peer in self.instances:
            instance.introduce(peer)
            peer.introduce(instance)
        self.by_number[instance.number] = instance
        return instance

    async def remove(self, instance: Instance) -> None:
        """Stop one, and let the others forget its memory."""
        self._leaving.append(self.by_number.pop(instance.number))
        for peer in self.instances:
            peer.send(ReleasePeer(instance.number))
        await instance.stop()
        self._leaving.remove(instance)

    async def stop_all(self) -> None:
        """Stop every process that was started."""
        async with asyncio.TaskGroup() as stopping:
            for instance in (*self.instances, *self._leaving):
                stopping.create_task(instance.stop())

    def _make(self, plan: InstancePlan) -> Instance:
        return Instance(next(self._numbers), 1, plan, self._spawn)

    async def _start(self, instance: Instance) -> None:
        await instance.start()
        await instance.wait_ready()
        assert instance.ready is not None
        logger.info(
            "%s serves: %d tokens of KV cache, %s, %s attention",
            instance.name,
            instance.num_cache_tokens,
            instance.ready.dtype,
            instance.ready.attention,
        )
