"""How long steps and copies took: the latest of them, for the scheduler's model of their cost.

`Samples` holds a bounded number of each; the copy thread may add while the engine takes.
"""

from collections import deque
from collections.abc import Sequence as Items
from typing import TypeVar

from memserve.messages import CopySample, StepSample
from memserve.workers.sequence import Sequence, Slice

T = TypeVar("T")

MAX_SAMPLES = 64  # kept between two heartbeats, the latest ones


class Samples:
    """The latest samples since they were last taken."""

    def __init__(self) -> None:
        self._steps: deque[StepSample] = deque(maxlen=MAX_SAMPLES)
        self._copies: deque[CopySample] = deque(maxlen=MAX_SAMPLES)

    def add_step(self, sample: StepSample) -> None:
        """A step has run."""
        self._steps.append(sample)

    def add_copy(self, sample: CopySample) -> None:
        """A copy has ended; any thread may say so."""
        self._copies.append(sample)

    def take(self) -> tuple[list[StepSample], list[CopySample]]:
        """What has been added since the last call."""
        return _drain(self._steps), _drain(self._copies)


def _drain(kept: "deque[T]") -> list[T]:
    return [kept.popleft() for _ in range(len(kept))]


def step_sample(
    slices: Items[Slice], seconds: float, *, num_ranks: int = 1, after_idling: bool = False
) -> StepSample:
    """What a step computed that took so long; to be called before its results are recorded."""
    num_prefill = prefill_pairs = num_decodes = decode_pairs = 0
    context: dict[Sequence, int] = {}  # read once for all slices of a sequence
    for part in slices:
        count, known = part.num_tokens, part.start
        if part.sequence.prefilling:
            num_prefill += count
            prefill_pairs += count * known + count * (count + 1) // 2
            context[part.sequence] = known
        else:
            num_decodes += 1
            decode_pairs += known + 1
    return StepSample(
        num_prefill,
        prefill_pairs,
        num_decodes,
        decode_pairs,
        seconds,
        num_ranks=num_ranks,
        num_prefill_context=sum(context.values()),
        after_idling=after_idling,
    )
