"""What became of the requests of a simulation, and its figures."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from memserve.sim.instance import SimulatedInstance


@dataclass(slots=True)
class Outcome:
    """One request; times are virtual seconds."""

    sent: float
    num_prompt_tokens: int
    num_outputs: int
    first_token: float = 0.0
    end: float = 0.0
    num_cached_tokens: int = 0
    prefilled_on: int = 0
    decoded_on: int = 0

    @property
    def ttft(self) -> float:
        """Time to the first token."""
        return self.first_token - self.sent

    @property
    def jct(self) -> float:
        """Time to the last token."""
        return self.end - self.sent

    @property
    def tpot(self) -> float | None:
        """Time of each token after the first; None if there is just one."""
        return (
            (self.end - self.first_token) / (self.num_outputs - 1) if self.num_outputs > 1 else None
        )


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """A simulation in numbers; times in seconds."""

    num_requests: int
    num_refused: int
    """Too long for an instance's KV cache."""
    num_rejected: int = 0
    """Turned away since they would have missed the TTFT objective; their sessions end."""
    num_kept: int = 0
    """Requests that kept every objective; without one, all."""
    goodput: float = 0.0
    """Of those, how many a second."""
    duration: float
    ttft_mean: float
    ttft_p50: float
    ttft_p99: float
    tpot_mean: float
    tpot_p99: float
    jct_mean: float
    jct_p99: float
    hit_rate: float
    """Share of prompt tokens whose prefill was skipped."""
    num_prompt_tokens: int
    prefilled_tokens: int
    output_tokens_per_s: float
    utilisation: list[float]
    """Share of the time in which each instance computed."""
    copied_bytes: int
    num_handovers: int
    num_declined: int
    num_preemptions: int
    num_fetched_blocks: int
    num_returned_blocks: int
    num_evicted_blocks: int
    num_role_changes: int
    num_groups: int = 0
    """Prompts that several instances were to prefill together."""
    num_dissolved: int = 0
    """Of those, the ones for which a rank had no room."""


@dataclass(slots=True)
class Outcomes:
    """Outcomes as they come, then the figures."""

    requests: list[Outcome] = field(default_factory=list)
    num_refused: int = 0
    num_rejected: int = 0
    num_role_changes: int = 0
    num_groups: int = 0
    num_dissolved: int = 0
    duration: float = 0.0
    instances: Sequence[SimulatedInstance] = ()

    def add(self, outcome: Outcome) -> None:
        """One request has ended."""
        self.requests.append(outcome)

    def close(self, now: float, instances: Sequence[SimulatedInstance]) -> None:
        """All have ended."""
        self.duration = max((outcome.end for outcome in self.requests), default=now)
        self.instances = instances

    def num_kept(self, slo_ttft: float | None, slo_tpot: float | None) -> int:
        """Requests that kept these objectives."""
        return sum(
            (slo_ttft is None or one.ttft <= slo_ttft)
            and (slo_tpot is None or (one.tpot or 0.0) <= slo_tpot)
            for one in self.requests
        )

    def figures(self, slo_ttft: float | None = None, slo_tpot: float | None = None) -> Figures:
        """The numbers, under these objectives. There must be a request."""
        requests, instances = self.requests, self.instances
        ttft = np.array([outcome.ttft for outcome in requests])
        jct = np.array([outcome.jct for outcome in requests])
        tpot = np.array([t for outcome in requests if (t := outcome.tpot) is not None] or [0.0])
        num_kept = self.num_kept(slo_ttft, slo_tpot)
        num_prompt = sum(outcome.num_prompt_tokens for outcome in requests)
        arrivals = [instance.arrivals for instance in instances]
        return Figures(
            num_requests=len(requests),
            num_refused=self.num_refused,
            num_rejected=self.num_rejected,
            num_kept=num_kept,
            goodput=num_kept / self.duration,
            duration=self.duration,
            ttft_mean=float(ttft.mean()),
            ttft_p50=float(np.percentile(ttft, 50)),
            ttft_p99=float(np.percentile(ttft, 99)),
            tpot_mean=float(tpot.mean()),
            tpot_p99=float(np.percentile(tpot, 99)),
            jct_mean=float(jct.mean()),
            jct_p99=float(np.percentile(jct, 99)),
            hit_rate=sum(outcome.num_cached_tokens for outcome in requests) / num_prompt,
            num_prompt_tokens=num_prompt,
            prefilled_tokens=sum(one.work.num_prefill_tokens for one in instances),
            output_tokens_per_s=sum(one.num_outputs for one in requests) / self.duration,
            utilisation=[one.work.busy / self.duration for one in instances],
            copied_bytes=sum(one.copies.num_bytes for one in instances),
            num_handovers=sum(one.num_handovers for one in arrivals),
            num_declined=sum(one.num_declined for one in arrivals),
            num_preemptions=sum(one.batcher.num_preemptions for one in instances),
            num_fetched_blocks=sum(one.num_fetched_blocks for one in arrivals),
            num_returned_blocks=sum(one.num_returned_blocks for one in arrivals),
            num_evicted_blocks=sum(one.cache.num_evicted for one in instances),
            num_role_changes=self.num_role_changes,
            num_groups=self.num_groups,
            num_dissolved=self.num_dissolved,
        )
