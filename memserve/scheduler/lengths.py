"""How long answers will be: an online histogram of those that have ended.

An answer that was cut at its `max_tokens`, or that still runs, only tells that it would have been or
will be longer (Kaplan and Meier's estimate of survival). So where clients force lengths, as benchmarks
do, answers are expected to reach their limits; where limits are generous, to end like those before;
and long answers are expected as soon as some have become long, not when the first of them have ended.
"""

from bisect import bisect_right

import numpy as np

GROWTH = 1.25
NUM_BUCKETS = 64
FORGET = 0.999
PRIOR_LENGTH = 128
PRIOR_WEIGHT = 1.0
LONGEST = 1 << 62
"""No answer has so many tokens."""


class OutputLengths:
    """Lengths in buckets that grow by a quarter each; old answers fade."""

    def __init__(self) -> None:
        edges = np.unique(np.floor(GROWTH ** np.arange(NUM_BUCKETS)).astype(int))
        self._starts: list[int] = edges.tolist()  # bucket i: [starts[i], starts[i + 1])
        self._ended = np.zeros(len(edges))
        self._sums = np.zeros(len(edges))  # of the lengths of those that ended
        self._cut = np.zeros(len(edges))
        self._running = np.zeros(len(edges))  # by the last bucket that each has left behind
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

    def reached(self, num_tokens: int) -> int:
        """An answer that runs has come to another bucket; where the one after it starts.

        To be told with the first token, and then whenever an answer is as long as was said.
        """
        bucket = self._bucket(num_tokens)
        if bucket > 0:
            self._running[bucket - 1] += 1.0
        if bucket > 1:
            self._running[bucket - 2] -= 1.0
        return self._starts[bucket + 1] if bucket + 1 < len(self._starts) else LONGEST

    def left(self, num_tokens: int) -> None:
        """An answer of so many tokens does not run any more, whatever became of it."""
        if num_tokens > 0 and (bucket := self._bucket(num_tokens)):
            self._running[bucket - 1] -= 1.0

    def remaining(self, num_so_far: int, max_tokens: int) -> float:
        """Tokens still to come, at least 1: the mean of longer answers, each cut at `max_tokens`."""
        first = bisect_right(self._starts, num_so_far)
        at_risk = 0.0  # answers in this bucket and in longer ones
        mean = min(2.0 * num_so_far, max_tokens)  # of answers that reach the bucket
        ended, sums = self._ended.tolist(), self._sums.tolist()
        cut = (self._cut + self._running).tolist()
        for i in range(len(self._starts) - 1, first - 1, -1):
            if not ended[i] and not cut[i]:
                continue
            if not at_risk:
                # Of the longest that are known it is only known that they went on: as long again.
                mean = min(2.0 * self._starts[i], max_tokens)
            at_risk += ended[i] + cut[i]
            if ended[i]:
                mean += ended[i] / at_risk * (min(sums[i] / ended[i], max_tokens) - mean)
        return max(1.0, min(mean, max_tokens) - num_so_far)

    def _bucket(self, num_tokens: int) -> int:
        return bisect_right(self._starts, num_tokens) - 1

    def _note(self, num_tokens: int, weight: float) -> None:
        bucket = self._bucket(num_tokens)
        self._ended[bucket] += weight
        self._sums[bucket] += weight * num_tokens
