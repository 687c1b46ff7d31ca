"""How long answers will be: an online histogram of those that have ended.

An answer that was cut at its `max_tokens` only tells that it would have been longer (Kaplan and Meier's
estimate of survival). So where clients force lengths, as benchmarks do, answers are expected to
reach their limits; where limits are generous, to end like those before.
"""

import numpy as np

GROWTH = 1.25
NUM_BUCKETS = 64
FORGET = 0.999
PRIOR_LENGTH = 128
PRIOR_WEIGHT = 1.0


class OutputLengths:
    """Lengths in buckets that grow by a quarter each; old answers fade."""

    def __init__(self) -> None:
        edges = np.unique(np.floor(GROWTH ** np.arange(NUM_BUCKETS)).astype(int))
        self._starts = edges  # bucket i: lengths in [starts[i], starts[i + 1])
        self._ended = np.zeros(len(edges))
        self._sums = np.zeros(len(edges))  # of the lengths of those that ended
        self._cut = np.zeros(len(edges))
        self._note(PRIOR_LENGTH, PRIOR_WEIGHT)

    def add(self, num_tokens: int, *, cut: bool = False) -> None:
        """An answer has ended by itself, or was cut."""
        if num_tokens > 0:
            self._ended *= FORGET
            self._sums *= FORGET
            self._cut *= FORGET
            if cut:
                self._cut[self._bucket(num_tokens)] += 1.0
            else:
                self._note(num_tokens, 1.0)

    def remaining(self, num_so_far: int, max_tokens: int) -> float:
        """Tokens still to come, at least 1: the mean of longer answers, each cut at `max_tokens`."""
        first = int(np.searchsorted(self._starts, num_so_far, side="right"))
        ended, starts = self._ended[first:], self._starts[first:]
        at_risk = np.cumsum((ended + self._cut[first:])[::-1])[::-1]
        known = at_risk > 0
        share = np.divide(ended, at_risk, out=np.zeros_like(ended), where=known)
        lasting = np.cumprod(1.0 - share)
        ending = np.concatenate([[1.0], lasting[:-1]]) * share
        means = np.divide(self._sums[first:], ended, out=np.zeros_like(ended), where=ended > 0)
        total = float((ending * np.minimum(means, max_tokens)).sum())
        # Of answers longer than all that are known it is only known that they go on: as long again.
        longest = max(num_so_far, int(starts[known][-1]) if known.any() else 0)
        total += (float(lasting[-1]) if len(lasting) else 1.0) * min(2.0 * longest, max_tokens)
        return max(1.0, min(total, max_tokens) - num_so_far)

    def _bucket(self, num_tokens: int) -> int:
        return int(np.searchsorted(self._starts, num_tokens, side="right")) - 1

    def _note(self, num_tokens: int, weight: float) -> None:
        bucket = self._bucket(num_tokens)
        self._ended[bucket] += weight
        self._sums[bucket] += weight * num_tokens
