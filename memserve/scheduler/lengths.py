"""How long answers will be: an online histogram of those that have ended."""

import numpy as np

GROWTH = 1.25
NUM_BUCKETS = 64
FORGET = 0.999
PRIOR_LENGTH = 128
PRIOR_WEIGHT = 4.0


class OutputLengths:
    """Lengths in buckets that grow by a quarter each; old answers fade."""

    def __init__(self) -> None:
        edges = np.unique(np.floor(GROWTH ** np.arange(NUM_BUCKETS)).astype(int))
        self._ends = edges  # bucket i: lengths in [ends[i], ends[i + 1])
        self._counts = np.zeros(len(edges))
        self._sums = np.zeros(len(edges))
        self._note(PRIOR_LENGTH, PRIOR_WEIGHT)

    def add(self, num_tokens: int) -> None:
        """An answer has ended by itself or at its limit."""
        if num_tokens > 0:
            self._counts *= FORGET
            self._sums *= FORGET
            self._note(num_tokens, 1.0)

    def remaining(self, num_so_far: int, max_tokens: int) -> float:
        """Tokens still to come, at least 1: the mean of longer answers, capped by `max_tokens`."""
        first = int(np.searchsorted(self._ends, num_so_far, side="right"))
        count = self._counts[first:].sum()
        # Of answers longer than all seen it is only known that they go on: as long again.
        total = float(self._sums[first:].sum() / count) if count > 0 else 2.0 * num_so_far
        return max(1.0, min(total, max_tokens) - num_so_far)

    def _note(self, num_tokens: int, weight: float) -> None:
        bucket = int(np.searchsorted(self._ends, num_tokens, side="right")) - 1
        self._counts[bucket] += weight
        self._sums[bucket] += weight * num_tokens
