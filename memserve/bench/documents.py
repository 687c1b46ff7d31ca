"""Real documents and questions for `loogle`, in LooGLE's own format.

One JSON object a line, plain or gzip: `{"input": text, "qa_pairs": "[{'Q': question, …}, …]"}`, the
pairs being a list or a Python literal in a string. The server's /tokenize makes token ids of them.
"""

import ast
from pathlib import Path
from typing import Any

import msgspec

from memserve.bench.client import Client
from memserve.errors import UsageError
from memserve.workloads import Document
from memserve.workloads.loogle import DOCUMENT, QUESTIONS_PER_DOCUMENT
from memserve.workloads.sharegpt import read_lines

CHARACTERS = 8 * round(max(DOCUMENT.lengths))
"""What the longest document needs, generously."""


class Record(msgspec.Struct):
    """One line of a file of documents."""

    input: str
    qa_pairs: str | list[dict[str, Any]]


def read_documents(path: Path) -> list[tuple[str, list[str]]]:
    """Texts and their first questions. Raises `UsageError` for a file that is no such file."""
    documents = []
    for number, text in enumerate(read_lines(path), 1):
        try:
            record = msgspec.json.decode(text, type=Record)
            pairs = record.qa_pairs
            pairs = ast.literal_eval(pairs) if isinstance(pairs, str) else pairs
            questions = [str(pair["Q"]) for pair in pairs]
        except (msgspec.DecodeError, ValueError, SyntaxError, KeyError, TypeError) as error:
            raise UsageError(f"{path}, line {number}: {error}") from None
        if record.input and questions:
            documents.append((record.input[:CHARACTERS], questions[:QUESTIONS_PER_DOCUMENT]))
    if not documents:
        raise UsageError(f"{path} holds no document with questions")
    return documents


async def tokenized(client: Client, texts: list[tuple[str, list[str]]]) -> list[Document]:
    """The documents as the server's tokens. Raises `UsageError` if it has no /tokenize."""
    documents = []
    for text, questions in texts:
        parts = [await client.tokenize(part) for part in (text, *(f"\n{q}\n" for q in questions))]
        if not all(parts):
            raise UsageError("documents of a file need a server with /tokenize")
        tokens, *asked = (part for part in parts if part)
        documents.append(Document(tokens=tokens, questions=asked))
    return documents
