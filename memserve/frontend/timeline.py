"""One request's life: its events, stamped where they happen, and what was counted on the way.

Metrics, the request log and benchmarks read this and measure nothing of their own. Times are
seconds of a monotonic clock.
"""

import enum
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from memserve.messages import TokenEvent

logger = logging.getLogger(__name__)

Clock = Callable[[], float]

SOURCES = ("device", "host", "p2p", "disk")


class Moment(enum.Enum):
    """The events of a request's life, in order; a life ends with exactly one of the last four."""

    ARRIVED = "arrived"
    ADMITTED = "admitted"
    FIRST_TOKEN = "first token"  # noqa: S105
    LAST_TOKEN = "last token"  # noqa: S105
    FINISHED = "finished"
    REFUSED = "refused"
    """Answered with a client's error (4xx) or turned away for overload (503)."""
    ABORTED = "aborted"
    """The client left."""
    FAILED = "failed"


@dataclass(slots=True)
class ChoiceTimes:
    """When the tokens of one choice came."""

    first: float
    last: float
    num_tokens: int = 1
    finish_reason: str | None = None

    @property
    def per_output_token(self) -> float | None:
        """Mean seconds per token after the first; None for a single token."""
        if self.num_tokens < 2:
            return None
        return (self.last - self.first) / (self.num_tokens - 1)


class Timeline:
    """What happened to one request, and when.

    `on_gap` is told the seconds between two tokens of a choice, as they come.
    """

    def __init__(
        self, request_id: str, *, on_gap: Callable[[float], None], clock: Clock = time.monotonic
    ) -> None:
        self.request_id = request_id
        self.status = 0
        self.num_prompt_tokens = 0
        self.max_tokens = 0
        self.choices: dict[int, ChoiceTimes] = {}
        self._first_by_prompt: dict[int, TokenEvent] = {}
        """Of each prompt the first token of the choice that reused least of it."""
        self._prefill_seconds = 0.0
        self._stamps: dict[Moment, float] = {}
        self._on_gap = on_gap
        self._clock = clock
        self.stamp(Moment.ARRIVED)

    def stamp(self, moment: Moment) -> None:
        """Note that something happened now; the first stamp of a moment counts."""
        if moment not in self._stamps:
            self._stamps[moment] = self._clock()
            logger.debug("request %s: %s", self.request_id, moment.value)

    def token(self, prompt: int, choice: int, event: TokenEvent) -> None:
        """Note a token of a choice; the first one tells how much of its prompt was cached."""
        now = self._clock()
        times = self.choices.get(choice)
        if times is not None:
            self._on_gap(now - times.last)
            times.last = now
            times.num_tokens += 1
            return
        self.choices[choice] = ChoiceTimes(first=now, last=now)
        # Choices share a prompt: what the first to prefill it computed was not skipped.
        least = self._first_by_prompt.setdefault(prompt, event)
        if event.num_cached_tokens < least.num_cached_tokens:
            self._first_by_prompt[prompt] = event
        if Moment.FIRST_TOKEN not in self._stamps and event.prefilled is not None:
            self._prefill_seconds = event.prefilled.seconds
        self.stamp(Moment.FIRST_TOKEN)

    def finish_choice(self, choice: int, reason: str) -> None:
        """Note why a choice has ended."""
        self.choices[choice].finish_reason = reason

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens whose prefill was skipped."""
        return sum(event.num_cached_tokens for event in self._first_by_prompt.values())

    @property
    def cached_by_source(self) -> dict[str, int]:
        """The same by where their KV lay: vLLM's names; `device` is the prefill worker's own."""
        found = dict.fromkeys(SOURCES, 0)
        for event in self._first_by_prompt.values():
            if (told := event.prefilled) is not None:
                found["host"] += told.num_host_tokens
                found["p2p"] += told.num_p2p_tokens
                found["disk"] += told.num_disk_tokens
        found["device"] = self.num_cached_tokens - sum(found.values())
        return found

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far, of all choices."""
        return sum(times.num_tokens for times in self.choices.values())

    @property
    def end(self) -> Moment | None:
        """How the life has ended."""
        ends = (Moment.FINISHED, Moment.REFUSED, Moment.ABORTED, Moment.FAILED)
        return next((moment for moment in ends if moment in self._stamps), None)

    def seconds(self, start: Moment, stop: Moment) -> float | None:
        """Time between two moments, None if one of them never came."""
        if start not in self._stamps or stop not in self._stamps:
            return None
        return self._stamps[stop] - self._stamps[start]

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from arrival to the first token of any choice."""
        return self.seconds(Moment.ARRIVED, Moment.FIRST_TOKEN)

    @property
    def prefill_time(self) -> float | None:
        """Seconds from the start of the prefill on a worker to the first token here."""
        first = self.time_to_first_token
        return None if first is None else min(self._prefill_seconds, first)

    @property
    def queue_time(self) -> float | None:
        """Seconds from arrival to that start: with `prefill_time` it is the time to first token."""
        first, prefill = self.time_to_first_token, self.prefill_time
        return None if first is None or prefill is None else first - prefill

    @property
    def duration(self) -> float | None:
        """Seconds from arrival to the end."""
        return None if self.end is None else self.seconds(Moment.ARRIVED, self.end)


@dataclass(frozen=True, slots=True)
class Slo:
    """The service level objectives: seconds to the first token, and mean seconds per token after."""

    ttft: float | None = None
    tpot: float | None = None

    @property
    def names(self) -> list[str]:
        """The objectives that are set, and `all` of them; none if none is set."""
        given = [name for name, limit in (("ttft", self.ttft), ("tpot", self.tpot)) if limit]
        return [*given, "all"] if given else []

    def verdicts(self, life: Timeline) -> dict[str, bool]:
        """Which of them a request has kept; every choice must, and a failed request keeps none."""
        finished, first = life.end is Moment.FINISHED, life.time_to_first_token
        slowest = max((times.per_output_token or 0.0 for times in life.choices.values()), default=0)
        kept = {
            "ttft": finished and first is not None and (self.ttft is None or first <= self.ttft),
            "tpot": finished and (self.tpot is None or slowest <= self.tpot),
        }
        kept["all"] = all(kept.values())
        return {name: kept[name] for name in self.names}
