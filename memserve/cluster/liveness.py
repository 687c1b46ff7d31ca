"""Which workers have stopped without dying: those whose engine loop is not heard of any more.

Everything that a worker sends comes from its engine loop, heartbeats about once a second, also in the
middle of a long step (`memserve.workers.pulse`). Silence is counted in ticks of the launcher's own
loop: time in which the launcher itself did not run, or was stopped, is held against nobody. Workers
that start or calibrate are not watched; their start has its own deadline.
"""

import asyncio
from collections.abc import Callable

from memserve.cluster.instance import Instance

NUM_TICKS = 20
"""In one timeout."""


class Liveness:
    """Counts how long each watched instance has been silent; `timeout` in seconds."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._num_silent: dict[Instance, int] = {}
        """Ticks since each was heard of."""

    def watch(self, instance: Instance) -> None:
        """From now on this one must not fall silent."""
        self._num_silent[instance] = 0

    def heard(self, instance: Instance) -> None:
        """Something has come from it."""
        if instance in self._num_silent:
            self._num_silent[instance] = 0

    def forget(self, instance: Instance) -> None:
        """It has left, or died."""
        self._num_silent.pop(instance, None)

    async def run(self, hangs: Callable[[Instance], None]) -> None:
        """Call `hangs` for each instance that has been silent for too long, for ever."""
        while True:
            await asyncio.sleep(self.timeout / NUM_TICKS)
            for instance in list(self._num_silent):
                self._num_silent[instance] += 1
                if self._num_silent[instance] > NUM_TICKS:
                    self.forget(instance)
                    hangs(instance)
