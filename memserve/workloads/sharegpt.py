"""Chats between people and an assistant, in the shape of ShareGPT.

Built in: a distribution with the paper's figures for whole prompts (median 622 tokens, 90th percentile
1843, mean 770, of which 38 % were said before) and answers (291, 635, 321). From a file: the lengths of
real chats, one JSON object a line, `{"id": "X_0", "turns": [["human", 33], ["gpt", 255], …]}`, plain or
gzip; records X_0, X_1 … that follow each other are parts of one chat. Only lengths are real: the tokens
are drawn.
"""

import gzip
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np

from memserve.errors import UsageError
from memserve.workloads.drawing import Quantiles, synthetic_tokens
from memserve.workloads.sessions import Limits, Turn

# Fitted by random search so that the prompts, which contain what was said before, come out right.
NUM_TURNS = (0.21, 0.4, 0.36, 0.03)
"""Shares of chats with 1, 2 … turns."""
QUESTION = Quantiles((0, 0.25, 0.5, 0.9, 1), (2, 54, 177, 701, 1460))
ANSWER = Quantiles((0, 0.25, 0.5, 0.9, 1), (2, 120, 291, 635, 750))

Lengths = list[tuple[int, int]]
"""Of one chat, each turn's new tokens and answer."""


class Record(msgspec.Struct):
    """One line of a file of turn lengths."""

    id: str
    turns: list[tuple[str, int]]


def sharegpt(seed: int, vocab: range, limits: Limits, path: Path | None) -> Iterator[list[Turn]]:
    """Chats without end; those of a file come shuffled, and again when all have come.

    Raises `UsageError` if the file can't be read or holds no chat.
    """
    rng = np.random.default_rng((seed, 1))
    lengths = _drawn(rng) if path is None else _shuffled(read_chats(path), rng)
    for number, chat in enumerate(lengths):
        yield [
            Turn(
                tokens=synthetic_tokens(vocab, limits.scaled(new), seed, "sharegpt", number, k),
                output_length=limits.output(answer),
            )
            for k, (new, answer) in enumerate(chat)
        ]


def _drawn(rng: np.random.Generator) -> Iterator[Lengths]:
    while True:
        num_turns = int(rng.choice(len(NUM_TURNS), p=NUM_TURNS)) + 1
        yield [(round(QUESTION.draw(rng)), round(ANSWER.draw(rng))) for _ in range(num_turns)]


def _shuffled(chats: list[Lengths], rng: np.random.Generator) -> Iterator[Lengths]:
    while True:
        for number in rng.permutation(len(chats)):
            yield chats[number]


def read_chats(path: Path) -> list[Lengths]:
    """The chats of a file of turn lengths, parts joined. Raises `UsageError` if there are none."""
    said: dict[str, list[tuple[str, int]]] = {}
    for record in _records(path):
        chat = re.sub(r"_\d+$", "", record.id)
        said.setdefault(chat, []).extend(record.turns)
    chats = [lengths for turns in said.values() if (lengths := _pairs(turns))]
    if not chats:
        raise UsageError(f"{path} holds no chat with a question and an answer")
    return chats


def _records(path: Path) -> Iterator[Record]:
    for number, line in enumerate(read_lines(path), 1):
        try:
            yield msgspec.json.decode(line, type=Record)
        except msgspec.DecodeError as error:
            raise UsageError(f"{path}, line {number}: {error}") from None


def read_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file that are not empty; a name that ends in `.gz` is unpacked."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for line in file:
                if line.strip():
                    yield line
    except (OSError, EOFError) as error:
        raise UsageError(f"can't read the workload {path}: {error}") from None


def _pairs(turns: list[tuple[str, int]]) -> Lengths:
    """Questions with their answers; several of one speaker in a row are one."""
    pairs: Lengths = []
    question = 0
    for speaker, length in turns:
        if speaker in ("human", "user", "system"):
            question += length
        elif question and length:
            pairs.append((question, length))
            question = 0
        elif pairs:  # the assistant goes on
            pairs[-1] = (pairs[-1][0], pairs[-1][1] + length)
    return pairs
