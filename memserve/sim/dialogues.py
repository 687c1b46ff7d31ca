"""Who asks a simulated cluster what: dialogues of requests that follow each other.

The workloads of `memserve.workloads` are played as `memserve bench serve` sends them: the prompt of a
turn holds the answers to the turns before. Block traces (one JSON object a line, plain or gzip:
`{"session", "turn", "input_length", "output_length", "prompt_blocks", "ids_rle": [[first id, how many],
…]}`, ids of blocks of 16 tokens of prompt and answer) have no times: their sessions start at random. Of
a block's tokens only their being equal is known, so each is its block's id, 16 times.
"""

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import msgspec
import numpy as np

from memserve.errors import UsageError
from memserve.workloads import Session, drawn_answer
from memserve.workloads.catalog import VOCAB
from memserve.workloads.sharegpt import read_lines

TRACE_BLOCK = 16


@dataclass(frozen=True, slots=True)
class Request:
    """What a client sends, and the answer that it will get: at least one token, of a forced length."""

    prompt: list[int]
    output: list[int]
    think_time: float = 0.0
    """Seconds from the answer before to this request."""


@dataclass(slots=True)
class Dialogue:
    """Requests one after the other; each is sent when the one before has its answer."""

    name: str
    start: float
    requests: Iterator[Request]
    tenant: str = ""


class BlockRecord(msgspec.Struct):
    """One request of a block trace."""

    session: int
    turn: int
    input_length: int
    output_length: int
    prompt_blocks: int
    ids_rle: list[tuple[int, int]]


@dataclass(slots=True)
class _Answers:
    """The answers to a session's turns so far."""

    session: Session
    given: list[list[int]] = field(default_factory=list)

    def requests(self) -> Iterator[Request]:
        for number, turn in enumerate(self.session.turns):
            prompt = self.session.prompt(self.given)
            answer = drawn_answer(VOCAB, self.session, number)
            yield Request(prompt, answer, turn.think_time)
            self.given.append(answer)


def played(sessions: Iterable[Session]) -> Iterator[Dialogue]:
    """The sessions of a workload; prompts are made when they are needed."""
    for session in sessions:
        requests = _Answers(session).requests()
        yield Dialogue(session.session_id, session.start, requests, session.tenant)


def block_trace(path: Path, *, rate: float, num_requests: int, seed: int) -> Iterator[Dialogue]:
    """Sessions of a block trace in its order, `rate` of them starting in a second (Poisson).

    Raises `UsageError`, when iterated, for a file that is no such trace.
    """
    rng = np.random.default_rng((seed, 9))
    start, left = 0.0, num_requests
    for session, group in groupby(_records(path), key=lambda record: record.session):
        records = list(group)[:left]
        left -= len(records)
        yield Dialogue(f"{path.stem}-{session}", start, map(_request, records))
        if not left:
            return
        start += float(rng.exponential(1 / rate))


def _request(record: BlockRecord) -> Request:
    tokens = array("i")
    for first, count in record.ids_rle:
        for block in range(first, first + count):
            tokens.extend([block] * TRACE_BLOCK)
    # What follows the last whole block is nobody else's.
    length = record.input_length + record.output_length
    rest = -2 - record.session * 1024 - record.turn
    tokens.extend([rest] * (length - len(tokens)))
    known = tokens.tolist()
    return Request(known[: record.input_length], known[record.input_length : length])


def _records(path: Path) -> Iterator[BlockRecord]:
    for number, line in enumerate(read_lines(path), 1):
        try:
            record = msgspec.json.decode(line, type=BlockRecord)
        except msgspec.DecodeError as error:
            raise UsageError(f"{path}, line {number}: {error}") from None
        if record.input_length < 1 or record.output_length < 1:
            raise UsageError(f"{path}, line {number}: prompt and answer need tokens")
        yield record


def is_block_trace(path: Path) -> bool:
    """Whether the file's first line is of a block trace (and not of a timed one)."""
    first = next(read_lines(path), b"{}")
    return b'"ids_rle"' in first
