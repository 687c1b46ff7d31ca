"""Arrivals and prompts of a recorded trace in Mooncake's format.

One JSON object a line, plain or gzip, in the order of time: `{"timestamp": ms, "input_length": tokens,
"output_length": tokens, "hash_ids": [one id for each block of 512 tokens]}`. Equal ids stand for equal
blocks; so do the tokens made from them. Time stamps come in ticks of some seconds: arrivals of one tick
are spread over it.
"""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import msgspec
import numpy as np

from memserve.errors import UsageError
from memserve.workloads.drawing import synthetic_tokens
from memserve.workloads.sessions import Limits, Turn
from memserve.workloads.sharegpt import read_lines

BLOCK_TOKENS = 512


class Record(msgspec.Struct):
    """One request of a trace."""

    timestamp: int
    """Milliseconds."""
    input_length: int
    output_length: int
    hash_ids: list[int]


def timed_trace(
    path: Path, seed: int, vocab: range, limits: Limits, *, tick: float, speedup: float
) -> Iterator[tuple[float, list[Turn]]]:
    """Starts in seconds after the trace's begin, and single-turn sessions, in order, to its end.

    `tick` is the trace's resolution in seconds; `speedup` divides all times. Raises `UsageError` for
    a file that can't be read or is no such trace.
    """
    rng = np.random.default_rng((seed, 6))
    for timestamp, records in groupby(_records(path), key=lambda record: record.timestamp):
        together = list(records)
        offsets = sorted(float(share) for share in rng.random(len(together)))
        for offset, record in zip(offsets, together, strict=True):
            start = (timestamp / 1000 + tick * offset) / speedup
            yield start, [_turn(record, seed, vocab, limits)]


def _turn(record: Record, seed: int, vocab: range, limits: Limits) -> Turn:
    """The request, with the same tokens for the same block; its last block may be cut."""
    output_length = limits.output(record.output_length)
    length = limits.scaled(record.input_length)
    if (room := limits.prompt_room(output_length)) is not None:
        length = min(length, room)
    block = limits.scaled(BLOCK_TOKENS)
    tokens: list[int] = []
    for hash_id in record.hash_ids:
        if len(tokens) >= length:
            break
        tokens += synthetic_tokens(vocab, block, seed, "trace", hash_id)
    if missing := length - len(tokens):  # of rounding, when lengths are scaled
        last = record.hash_ids[-1] if record.hash_ids else record.timestamp
        tokens += synthetic_tokens(vocab, max(0, missing), seed, "trace rest", last)
    return Turn(tokens=tokens[:length], output_length=output_length)


def _records(path: Path) -> Iterator[Record]:
    latest = 0
    for number, line in enumerate(read_lines(path), 1):
        try:
            record = msgspec.json.decode(line, type=Record)
        except msgspec.DecodeError as error:
            raise UsageError(f"{path}, line {number}: {error}") from None
        if record.timestamp < latest:
            raise UsageError(f"{path}, line {number}: goes back in time")
        latest = record.timestamp
        yield record
