"""What a simulated instance computes: the steps under way, and sums over those that have ended."""

from dataclasses import dataclass

from memserve.messages import StepSample
from memserve.sim.batching import Slice


@dataclass(slots=True)
class Work:
    """What an instance has computed since the start."""

    busy: float = 0.0
    """Seconds in steps."""
    num_steps: int = 0
    num_prefill_tokens: int = 0
    num_decode_tokens: int = 0


@dataclass(slots=True, eq=False)
class Run:
    """Steps under way: one with prompt chunks, or several in which the same sequences decode."""

    slices: list[Slice]
    start: float
    ends: list[float]
    sample: StepSample
    """Of its first step."""
    prefills: bool
    num_told: int = 0
    """Steps whose tokens are told."""
