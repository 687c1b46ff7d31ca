"""Numbers out of a seed: token ids by counter, and lengths with given quantiles.

Token ids come from a hash of (key, position), not from a generator with state: any part of any
prompt can be made at any time, in any order, and is always the same.
"""

import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15  # the increment of splitmix64, whose finaliser `_mix` is


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def synthetic_tokens(vocab: range, count: int, *key: int | str) -> list[int]:
    """The first `count` token ids of the text named by `key`, all within `vocab` (of step 1).

    A shorter text of the same key is a prefix of the longer one; texts of different keys have
    nothing in common.
    """
    state = 0
    for part in key:
        number = zlib.crc32(part.encode()) if isinstance(part, str) else part
        start = np.array([(state + (number + 1) * GOLDEN) & MASK], dtype=np.uint64)
        state = int(_mix(start)[0])
    positions = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    drawn = _mix(positions + np.array([state], dtype=np.uint64))
    ids: list[int] = (drawn % np.uint64(len(vocab)) + np.uint64(vocab.start)).tolist()
    return ids


@dataclass(frozen=True)
class Quantiles:
    """A distribution of lengths, given by points of its quantile function and linear between them."""

    shares: tuple[float, ...]
    """Rising from 0 to 1."""
    lengths: tuple[float, ...]

    def draw(self, rng: np.random.Generator) -> float:
        """One length."""
        return float(np.interp(rng.random(), self.shares, self.lengths))
