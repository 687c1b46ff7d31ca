"""Prompts of given lengths: `random` and `prefix-repetition`, as in vLLM's benchmark."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from memserve.errors import UsageError
from memserve.workloads.drawing import synthetic_tokens
from memserve.workloads.sessions import Limits, Turn


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomLengths:
    """Lengths of `random`, in tokens."""

    input_len: int = 1024
    output_len: int = 128
    range_ratio: float = 0.0
    """Input and output lengths vary uniformly by this share in both directions; below 1."""
    prefix_len: int = 0
    """Tokens that all prompts begin with, before the `input_len` others."""

    def __post_init__(self) -> None:
        """Raises `UsageError` for lengths that can't be."""
        if min(self.input_len, self.output_len) < 1 or self.prefix_len < 0:
            raise UsageError("random prompts and answers need at least one token")
        if not 0 <= self.range_ratio < 1:
            raise UsageError(f"the range ratio must be in [0, 1), not {self.range_ratio}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixLengths:
    """Lengths of `prefix-repetition`, in tokens."""

    prefix_len: int = 256
    suffix_len: int = 256
    num_prefixes: int = 10
    output_len: int = 128

    def __post_init__(self) -> None:
        """Raises `UsageError` for lengths that can't be."""
        if min(self.prefix_len, self.suffix_len, self.num_prefixes, self.output_len) < 1:
            raise UsageError("prefixes, suffixes and answers need at least one token")


def random_prompts(
    seed: int, vocab: range, limits: Limits, lengths: RandomLengths
) -> Iterator[list[Turn]]:
    """Single requests without end that share nothing but a prefix, if there is one."""
    rng = np.random.default_rng((seed, 4))
    prefix = synthetic_tokens(vocab, round(lengths.prefix_len * limits.scale), seed, "prefix")
    number = 0
    while True:
        new = limits.scaled(_around(lengths.input_len, lengths.range_ratio, rng))
        tokens = prefix + synthetic_tokens(vocab, new, seed, "random", number)
        output = limits.output(_around(lengths.output_len, lengths.range_ratio, rng))
        yield [Turn(tokens=tokens, output_length=output)]
        number += 1


def _around(length: int, ratio: float, rng: np.random.Generator) -> int:
    least, most = round(length * (1 - ratio)), round(length * (1 + ratio))
    return int(rng.integers(least, most, endpoint=True))


def prefix_repetition(
    seed: int, vocab: range, limits: Limits, lengths: PrefixLengths
) -> Iterator[list[Turn]]:
    """Single requests without end, each with one of a few prefixes and a suffix of its own."""
    rng = np.random.default_rng((seed, 5))
    size, suffix = limits.scaled(lengths.prefix_len), limits.scaled(lengths.suffix_len)
    prefixes = [
        synthetic_tokens(vocab, size, seed, "repeated", number)
        for number in range(lengths.num_prefixes)
    ]
    number = 0
    while True:
        for which in rng.permutation(lengths.num_prefixes):
            new = synthetic_tokens(vocab, suffix, seed, "suffix", number)
            yield [
                Turn(tokens=prefixes[which] + new, output_length=limits.output(lengths.output_len))
            ]
            number += 1
