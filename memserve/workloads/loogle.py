"""Questions about shared documents, in the shape of LooGLE as the paper used it.

Every question is a session of its own, a prompt of the document and then the question. Questions
about a few documents at a time come mixed, as from several users. Lengths are the paper's (prompts of
1759 tokens in the median, 2004 at the 90th percentile; answers of 19 and 41), five a document.
`shared_documents` is the paper's Fig 15: sessions that each ask all questions about one document, one
after the other, several sessions about each.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from memserve.workloads.drawing import Quantiles, synthetic_tokens
from memserve.workloads.sessions import Limits, Turn

QUESTIONS_PER_DOCUMENT = 5
DOCUMENTS_AT_A_TIME = 4
DOCUMENT = Quantiles((0, 0.5, 0.9, 1), (1540, 1734, 1980, 2150))
QUESTION = Quantiles((0, 0.5, 0.9, 1), (8, 22, 40, 60))
ANSWER = Quantiles((0, 0.5, 0.9, 1), (3, 19, 41, 75))


@dataclass(frozen=True)
class Document:
    """A document and questions about it, as token ids."""

    tokens: list[int]
    questions: list[list[int]]


def loogle(
    seed: int, vocab: range, limits: Limits, documents: Sequence[Document] | None
) -> Iterator[list[Turn]]:
    """Questions without end. Given documents are cut to the paper's lengths and come again."""
    rng = np.random.default_rng((seed, 2))
    number = 0
    while True:
        questions: list[list[Turn]] = []
        for _ in range(DOCUMENTS_AT_A_TIME):
            given = documents[number % len(documents)] if documents else None
            questions += _document(seed, number, vocab, limits, given, rng)
            number += 1
        for index in rng.permutation(len(questions)):
            yield questions[index]


def shared_documents(
    seed: int, vocab: range, limits: Limits, *, num_documents: int, num_shared: int
) -> Iterator[list[Turn]]:
    """`num_shared` sessions about each document in random order; every question stands alone."""
    rng = np.random.default_rng((seed, 10))
    texts = [limits.scaled(DOCUMENT.draw(rng)) for _ in range(num_documents)]
    for number in rng.permutation(num_documents * num_shared).tolist():
        document = number % num_documents
        text = synthetic_tokens(vocab, texts[document], seed, "loogle", document)
        turns = []
        for k in range(QUESTIONS_PER_DOCUMENT):
            length = limits.scaled(QUESTION.draw(rng))
            question = synthetic_tokens(vocab, length, seed, "question", number, k)
            output_length = limits.output(ANSWER.draw(rng))
            turns.append(Turn(tokens=text + question, output_length=output_length, alone=True))
        yield turns


def _document(
    seed: int,
    number: int,
    vocab: range,
    limits: Limits,
    given: Document | None,
    rng: np.random.Generator,
) -> list[list[Turn]]:
    """The single-turn sessions of one document; cut so that the longest question fits behind it."""
    length = limits.scaled(DOCUMENT.draw(rng))
    text = (
        synthetic_tokens(vocab, length, seed, "loogle", number)
        if given is None
        else given.tokens[:length]
    )
    asked = [
        (
            synthetic_tokens(
                vocab, limits.scaled(QUESTION.draw(rng)), seed, "loogle question", number, k
            )
            if given is None
            else given.questions[k % len(given.questions)],
            limits.output(ANSWER.draw(rng)),
        )
        for k in range(QUESTIONS_PER_DOCUMENT)
    ]
    rooms = [
        room - len(question)
        for question, output_length in asked
        if (room := limits.prompt_room(output_length)) is not None
    ]
    text = text[: max(0, min(rooms, default=len(text)))]
    return [
        [Turn(tokens=text + question, output_length=output_length)]
        for question, output_length in asked
    ]
