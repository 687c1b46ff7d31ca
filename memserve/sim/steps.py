"""What a simulated instance computes: the steps under way, and sums over those that have ended."""

from collections.abc import Callable
from dataclasses import dataclass

from memserve.messages import CopySample, StepSample
from memserve.scheduler.cost import num_pairs
from memserve.sim.batching import Slice
from memserve.sim.costs import Profile

CALIBRATED_CONTEXT = 2048


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


def calibration_steps(profile: Profile, factor: Callable[[], float]) -> list[StepSample]:
    """Steps that a worker times at its start; `factor` is what noise makes of each one's time."""
    chunk = profile.max_num_batched_tokens
    shapes = [(n, num_pairs(n, 0), 0, 0) for n in (chunk, chunk // 2, chunk // 4)]
    shapes += [(chunk, num_pairs(chunk, CALIBRATED_CONTEXT), 0, 0)]
    shapes += [(0, 0, n, n * c) for n in (1, 4, 16) for c in (64, 1024)]
    shapes += [(chunk // 2, num_pairs(chunk // 2, 0), 8, 8 * 512)]
    return [
        StepSample(
            *shape,
            profile.step_seconds(*shape) * factor(),
            num_prefill_context=CALIBRATED_CONTEXT * (shape[1] > num_pairs(shape[0], 0)),
        )
        for shape in shapes
    ]


def calibration_copies(profile: Profile, block_bytes: int) -> list[CopySample]:
    """Copies that it times then."""
    return [CopySample(n * block_bytes, profile.copy_seconds(n * block_bytes)) for n in (1, 16, 64)]
