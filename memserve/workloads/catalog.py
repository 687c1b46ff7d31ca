"""The workloads by name, and the sessions of one of them with their starts."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from memserve.errors import UsageError
from memserve.workloads.loogle import QUESTIONS_PER_DOCUMENT, Document, loogle, shared_documents
from memserve.workloads.react import react
from memserve.workloads.sessions import Limits, Session, Turn
from memserve.workloads.sharegpt import sharegpt
from memserve.workloads.synthetic import (
    PrefixLengths,
    RandomLengths,
    prefix_repetition,
    random_prompts,
)
from memserve.workloads.timed_trace import timed_trace

NAMES = (
    "sharegpt",
    "loogle",
    "react",
    "shared-documents",
    "prefix-repetition",
    "random",
    "timed-trace",
)
VOCAB = range(1000, 30_000)
"""Ordinary tokens in the vocabulary of every model of today; special ones stand before or behind."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """What to draw. Equal values give equal sessions on every machine."""

    name: str
    """One of `NAMES`."""
    num_requests: int
    """Turns of all sessions together; the last session may be cut, a trace may end earlier."""
    rate: float = math.inf
    """Sessions that start in a second (Poisson); infinite: all at once. A trace has its own times."""
    burstiness: float = 1.0
    """Shape of the gamma distribution of gaps: 1 is Poisson, below 1 burstier."""
    think_time: float = 0.0
    """Mean seconds (exponential) between an answer and the next turn."""
    seed: int = 0
    path: Path | None = None
    """`sharegpt`: file of turn lengths; `timed-trace`: the trace, required."""
    limits: Limits = dataclasses.field(default_factory=Limits)
    vocab: range = VOCAB
    random: RandomLengths = dataclasses.field(default_factory=RandomLengths)
    prefixes: PrefixLengths = dataclasses.field(default_factory=PrefixLengths)
    num_shared: int = 2
    """`shared-documents`: sessions about each document."""
    tick: float = 3.0
    """Resolution of a trace's time stamps in seconds."""
    speedup: float = 1.0
    """How much faster than recorded a trace is played."""

    def __post_init__(self) -> None:
        """Raises `UsageError` for values that can't be."""
        if self.name not in NAMES:
            raise UsageError(f"no workload {self.name!r}: there are {', '.join(NAMES)}")
        if self.name == "timed-trace" and self.path is None:
            raise UsageError("timed-trace needs the trace's file")
        for what, value in (
            ("number of requests", self.num_requests),
            ("rate", self.rate),
            ("burstiness", self.burstiness),
            ("speedup", self.speedup),
            ("number of sessions about a document", self.num_shared),
        ):
            if not value > 0:
                raise UsageError(f"the {what} must be positive, not {value}")


def make_sessions(
    workload: Workload, documents: Sequence[Document] | None = None
) -> Iterator[Session]:
    """The sessions in the order of their starts, made one by one as they are asked for.

    `documents` are for `loogle`; without them its documents are drawn. Raises `UsageError`, when
    iterated, for a file that can't be read.
    """
    rng = np.random.default_rng((workload.seed, 7))
    left = workload.num_requests
    for number, (start, turns) in enumerate(_started(workload, documents)):
        fitting = workload.limits.fit(turns)[:left]
        yield Session(
            session_id=f"{workload.name}-{workload.seed}-{number}",
            start=start,
            turns=_with_pauses(fitting, workload.think_time, rng),
        )
        left -= len(fitting)
        if not left:
            return


def _started(
    workload: Workload, documents: Sequence[Document] | None
) -> Iterator[tuple[float, list[Turn]]]:
    if workload.name == "timed-trace":
        assert workload.path is not None
        return timed_trace(
            workload.path,
            workload.seed,
            workload.vocab,
            workload.limits,
            tick=workload.tick,
            speedup=workload.speedup,
        )
    return zip(_starts(workload), _dialogues(workload, documents), strict=False)


def _dialogues(workload: Workload, documents: Sequence[Document] | None) -> Iterator[list[Turn]]:
    seed, vocab, limits = workload.seed, workload.vocab, workload.limits
    match workload.name:
        case "sharegpt":
            return sharegpt(seed, vocab, limits, workload.path)
        case "loogle":
            return loogle(seed, vocab, limits, documents)
        case "react":
            return react(seed, vocab, limits)
        case "shared-documents":
            num_sessions = -(-workload.num_requests // QUESTIONS_PER_DOCUMENT)
            return shared_documents(
                seed,
                vocab,
                limits,
                num_documents=-(-num_sessions // workload.num_shared),
                num_shared=workload.num_shared,
            )
        case "prefix-repetition":
            return prefix_repetition(seed, vocab, limits, workload.prefixes)
        case "random":
            return random_prompts(seed, vocab, limits, workload.random)
    raise AssertionError(workload.name)


def _starts(workload: Workload) -> Iterator[float]:
    """Starts of sessions, in seconds; the first is 0."""
    if math.isinf(workload.rate):
        yield from itertools.repeat(0.0)
    rng = np.random.default_rng((workload.seed, 8))
    now = 0.0
    while True:
        yield now
        now += float(rng.gamma(workload.burstiness, 1 / (workload.rate * workload.burstiness)))


def _with_pauses(turns: list[Turn], mean: float, rng: np.random.Generator) -> list[Turn]:
    if mean <= 0:
        return turns
    return [
        turns[0],
        *(dataclasses.replace(turn, think_time=float(rng.exponential(mean))) for turn in turns[1:]),
    ]
