"""How well the scheduler's predictions and promises were kept, counted since the start."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class ErrorSum:
    """Mean relative error of a predicted time."""

    num: int = 0
    sum_relative: float = 0.0

    def add(self, predicted: float, actual: float) -> None:
        """One prediction has come true, or not."""
        if actual > 0:
            self.num += 1
            self.sum_relative += abs(predicted - actual) / actual

    @property
    def mean(self) -> float:
        """0 before the first."""
        return self.sum_relative / self.num if self.num else 0.0


@dataclass(slots=True)
class Attainment:
    """How many requests kept a promise, of those it was made to."""

    num: int = 0
    num_kept: int = 0

    def add(self, *, kept: bool) -> None:
        """One more request is judged."""
        self.num += 1
        self.num_kept += kept


@dataclass(slots=True)
class Counters:
    """What `/metrics` tells of the scheduler."""

    prefill_error: ErrorSum = field(default_factory=ErrorSum)
    """Of the time of steps that prefill, as the workers timed them, after a warm-up."""
    ttft_error: ErrorSum = field(default_factory=ErrorSum)
    jct_error: ErrorSum = field(default_factory=ErrorSum)
    slo_ttft: Attainment = field(default_factory=Attainment)
    """Counted only where there is such an SLO."""
    slo_tpot: Attainment = field(default_factory=Attainment)
    num_decisions: int = 0
    decision_seconds: float = 0.0
    """Filled in by the caller, who has a clock."""
    num_colocated: int = 0
    num_fetches: int = 0
    num_role_changes: int = 0
    num_groups: Counter[int] = field(default_factory=Counter)
    """Prompts that several instances were to prefill together, by their number."""
    num_shared_blocks: int = 0
    """What the plans of these groups say is attended to in other ranks' arenas, as
    `EngineStats.num_remote_blocks` counts it; of those that came to their end."""
