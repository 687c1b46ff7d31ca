"""The instances' books, recounted by themselves."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from memserve.cluster.instance import Instance
from memserve.cluster.questions import Questions
from memserve.errors import ChannelClosed
from memserve.messages import Inspect, Inspection

INSPECT_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class InstanceReport:
    """One instance's books, recounted, and how the launcher sees its load."""

    number: int
    name: str
    inspection: Inspection


class Inspections(Questions[Inspection]):
    """Asks instances for their books."""

    async def of(self, instances: Sequence[Instance]) -> list[InstanceReport]:
        """What these have counted; one that dies meanwhile is left out. Raises `TimeoutError`."""
        async with asyncio.timeout(INSPECT_TIMEOUT_S):
            reports = await asyncio.gather(*map(self._one, instances))
        return [report for report in reports if report is not None]

    async def _one(self, instance: Instance) -> InstanceReport | None:
        try:
            inspection = await self.ask(instance, Inspect)
        except ChannelClosed:
            return None
        return InstanceReport(instance.number, instance.name, inspection)
