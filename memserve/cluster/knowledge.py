"""What workers tell of themselves, handed on to the scheduler: their indexes, steps and copies.

A worker whose index can't be followed any more, because a message is missing, is asked for all of it,
once until it answers.
"""

import asyncio
import logging
from collections.abc import Sequence

from memserve.cluster.instance import Instance
from memserve.cluster.questions import Questions
from memserve.errors import ChannelClosed, UsageError
from memserve.messages import Calibrate, Calibrated, Heartbeat, IndexEvents, ReportIndex
from memserve.pool.events import Cleared
from memserve.scheduler.scheduler import Scheduler

logger = logging.getLogger(__name__)

MAX_BEATS = 3
"""So many heartbeats after it was asked an instance is asked again for all of its index."""


class Knowledge:
    """Keeps the scheduler informed."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._calibrations: Questions[Calibrated] = Questions()
        self._reporting: dict[int, int] = {}
        """Instances that were asked to tell all of their index and have not begun; heartbeats since."""

    def index_changed(self, instance: Instance, told: IndexEvents) -> None:
        """An instance's index has changed."""
        if told.events and isinstance(told.events[0], Cleared):
            self._reporting.pop(instance.number, None)
        if instance.number in self._reporting:
            return
        if not self._scheduler.apply(instance.number, told):
            logger.warning("%s: events of its index are missing; asking for all", instance.name)
            self._ask_for_all(instance)

    def beat(self, instance: Instance, heartbeat: Heartbeat) -> None:
        """An instance tells its numbers."""
        instance.note_stats(heartbeat.stats)
        if instance.number in self._reporting:
            self._reporting[instance.number] += 1
            if self._reporting[instance.number] >= MAX_BEATS:  # the report got lost as well
                self._ask_for_all(instance)
        if heartbeat.steps or heartbeat.copies:
            self._scheduler.learn(instance.number, heartbeat.steps, heartbeat.copies)

    def _ask_for_all(self, instance: Instance) -> None:
        self._reporting[instance.number] = 0
        instance.send(ReportIndex())

    def calibrated(self, told: Calibrated) -> None:
        """An instance has timed some steps."""
        self._calibrations.answer(told.query, told)

    async def calibrate(self, instances: Sequence[Instance]) -> None:
        """Let idle instances time steps: one by itself, then all of them at once.

        Raises `UsageError` if one of them dies of it.
        """
        self.learn(instances[0], await self.timed_steps(instances[0]))
        if len(instances) > 1:
            told = await asyncio.gather(*map(self.timed_steps, instances))
            for instance, steps in zip(instances, told, strict=True):
                self.learn(instance, steps, num_busy=len(instances))

    async def timed_steps(self, instance: Instance) -> Calibrated:
        """Let one instance time steps; nothing else runs on it meanwhile.

        Raises `UsageError` if it dies of it.
        """
        try:
            return await self._calibrations.ask(instance, Calibrate)
        except ChannelClosed:
            raise UsageError(f"{instance.name} has died while it timed its first steps") from None

    def learn(self, instance: Instance, told: Calibrated, *, num_busy: int = 1) -> None:
        """What an instance has timed while `num_busy` of them computed."""
        self._scheduler.learn(instance.number, told.steps, told.copies, num_busy=num_busy)
        slowest = max((step.seconds for step in told.steps), default=0.0)
        logger.info(
            "%s has timed %d steps; the longest took %.0f ms",
            instance.name,
            len(told.steps),
            1000 * slowest,
        )

    def lose(self, instance: Instance) -> None:
        """An instance has gone."""
        self._reporting.pop(instance.number, None)
        self._calibrations.lose(instance)
