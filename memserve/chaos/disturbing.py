"""Kills and stops workers of a running server, at random moments out of a seed.

A worker is killed (SIGKILL), stopped for longer than `--worker-timeout` (the server has to take it for
dead), stopped for a moment and continued, or given another role. Deaths are kept to so many of one
worker in five minutes that the server doesn't give it up, which it does with one that dies too often.
"""

import asyncio
import enum
import logging
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from memserve.cluster.reviving import MAX_DEATHS, WINDOW_S

log = logging.getLogger(__name__)


class Blow(enum.Enum):
    """What is done to a worker."""

    KILL = "kill"
    STOP = "stop"
    """Until it is taken for dead."""
    PAUSE = "pause"
    """Stopped, and continued in time, or nearly so."""
    FLIP = "change of role"


@dataclass(frozen=True)
class Worker:
    """One life of a worker."""

    number: int
    epoch: int
    pid: int


WEIGHTS = (5, 2, 3, 3)

ListWorkers = Callable[[], Awaitable[Sequence[Worker]]]
SetRole = Callable[[int, str], Awaitable[None]]
ROLES = ("prefill", "decode", "mixed")


class Disturber:
    """Strikes about every `every` seconds; `counts` says how often and how."""

    def __init__(
        self,
        workers: ListWorkers,
        set_role: SetRole,
        *,
        seed: int,
        every: float,
        worker_timeout: float,
    ) -> None:
        self.counts = dict.fromkeys(Blow, 0)
        self._workers = workers
        self._set_role = set_role
        self._random = random.Random(f"blows {seed}")  # noqa: S311 - not for secrets
        self._every = every
        self._worker_timeout = worker_timeout
        self._epochs: dict[int, int] = {}
        self._deaths: dict[int, list[float]] = {}
        """By number, when each life after the first was seen."""
        self._struck: set[Worker] = set()

    async def run(self, until: float) -> None:
        """Strike again and again until the monotonic clock says so; then nothing is stopped."""
        async with asyncio.TaskGroup() as blows:
            while True:
                wait = self._random.expovariate(1 / self._every)
                if time.monotonic() + wait >= until:
                    return
                await asyncio.sleep(wait)
                blow = self._random.choices(list(Blow), weights=WEIGHTS)[0]
                if victims := await self._victims():
                    blows.create_task(self._strike(self._random.choice(victims), blow))

    async def _victims(self) -> list[Worker]:
        """Whom another death would not end for good, and nothing is being done to."""
        workers, now = await self._workers(), time.monotonic()
        for worker in workers:
            before = self._epochs.get(worker.number, worker.epoch)
            self._epochs[worker.number] = worker.epoch
            self._deaths.setdefault(worker.number, []).extend([now] * (worker.epoch - before))
        return [
            worker
            for worker in workers
            if worker not in self._struck
            and sum(now - when < WINDOW_S for when in self._deaths[worker.number]) < MAX_DEATHS - 1
        ]

    async def _strike(self, worker: Worker, blow: Blow) -> None:
        log.info("%s worker %d, life %d", blow.value, worker.number, worker.epoch)
        self.counts[blow] += 1
        if blow is Blow.FLIP:
            await self._set_role(worker.number, self._random.choice(ROLES))
            return
        self._struck.add(worker)
        with suppress(ProcessLookupError):  # it has just died by itself
            if blow is Blow.KILL:
                os.kill(worker.pid, signal.SIGKILL)
                return
            os.kill(worker.pid, signal.SIGSTOP)
            if blow is Blow.PAUSE:
                await asyncio.sleep(self._worker_timeout * self._random.uniform(0.1, 0.8))
                os.kill(worker.pid, signal.SIGCONT)
                self._struck.discard(worker)
