"""Users who perform plays again and again, and leave early now and then; all answers are judged.

The last play of each is ended, however long the server takes: what is asked is asked to the end.
"""

import asyncio
import logging
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import aiohttp

from memserve.chaos.asking import Answer, ask
from memserve.chaos.judging import Difference, verdict
from memserve.chaos.plays import Play, Scene

log = logging.getLogger(__name__)

SHARE_OF_LEAVERS = 0.15
LONGEST_PATIENCE = 24
"""Most tokens that a client who leaves early waits for."""
SHARE_OF_STRANGERS = 0.5
"""Plays whose prompts nobody else has in the cache."""
NUM_SALTS = 3
LONGEST_PAUSE_S = 0.5


@dataclass
class Performance:
    """What the load has brought."""

    num_requests: int = 0
    num_left: int = 0
    """Requests whose client went away."""
    failed: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    """Tokens that differ: wrong, or ties."""
    gaps: dict[tuple[str, int], float] = field(default_factory=dict)
    """The longest of each streamed choice, in seconds, by request and choice."""

    def note(self, request_id: str, scene: Scene, answer: Answer) -> bool:
        """Judge an answer; whether it is right and came to its end."""
        self.num_requests += 1
        self.num_left += answer.left
        if answer.error is not None:
            self._complain(self.failed, request_id, scene, answer.error)
            return False
        if scene.asked.streamed:
            for index, choice in answer.choices.items():
                if (gap := choice.longest_gap) is not None:
                    self.gaps[request_id, index] = gap
        match verdict(scene, answer):
            case None:
                return not answer.left
            case Difference() as difference:
                self.differences.append(difference)
                log.warning(
                    "%s (%s), choice %d: token %d is %d, not %d; judged at the end",
                    *(request_id, scene.asked.kind, difference.choice, len(difference.common)),
                    *(difference.got, difference.wanted),
                )
            case str(reason):
                self._complain(self.wrong, request_id, scene, reason)
        return False

    def _complain(self, where: list[str], request_id: str, scene: Scene, reason: str) -> None:
        where.append(f"{request_id} ({scene.asked.kind}): {reason}")
        log.error("%s", where[-1])


class User:
    """One client after another, all from one seed."""

    def __init__(
        self, number: int, seed: int, http: aiohttp.ClientSession, performance: Performance
    ) -> None:
        self._number = number
        self._random = random.Random(f"user {seed} {number}")  # noqa: S311 - not for secrets
        self._http = http
        self._performance = performance
        self._num_plays = 0

    async def run(self, plays: Sequence[Play], until: float) -> None:
        """Perform random plays until the monotonic clock says so."""
        while time.monotonic() < until:
            await asyncio.sleep(self._random.random() * LONGEST_PAUSE_S)
            await self.perform(self._random.choice(plays))

    async def perform(self, play: Play, *, leaves: float = SHARE_OF_LEAVERS) -> None:
        """Perform one play, to its end or to the first answer that isn't right."""
        self._num_plays += 1
        name = f"chaos-{self._number}-{self._num_plays}"
        strange = self._random.random() < SHARE_OF_STRANGERS
        salt = name if strange else f"common {self._random.randrange(NUM_SALTS)}"
        for turn, scene in enumerate(play):
            request_id = f"{name}-{turn}"
            patience = None
            if scene.asked.streamed and self._random.random() < leaves:
                patience = self._random.randint(0, LONGEST_PATIENCE)
            answer = await ask(
                self._http, scene.asked, request_id=request_id, salt=salt, leave_after=patience
            )
            if not self._performance.note(request_id, scene, answer):
                return
