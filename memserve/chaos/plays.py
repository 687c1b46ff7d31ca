"""The mixed load: short plays of requests, each first performed once while nothing disturbs it.

A play is one request, or the turns of a chat. Its prompts are those of `memserve bench`'s workloads:
chats, and questions about shared documents; with several choices, seeds, log-probabilities, penalties
and stop strings among them, streamed or not. In the later turns of a chat stand the undisturbed
answers, so a play asks the same whenever it is performed.
"""

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from memserve.bench.words import Message, text_of
from memserve.chaos.asking import CHAT, COMPLETIONS, Answer, Asked
from memserve.errors import UsageError
from memserve.workloads import Limits, Session, Workload, make_sessions
from memserve.workloads.synthetic import PrefixLengths

AT_ONCE = 4
"""Plays that are rehearsed together."""
GREEDY: dict[str, object] = {"temperature": 0, "ignore_eos": True}
SEEDED: dict[str, object] = {"temperature": 0.9, "top_p": 0.95, "ignore_eos": True}
PENALTIES: dict[str, object] = {
    "repetition_penalty": 1.2,
    "presence_penalty": 0.3,
    "frequency_penalty": 0.2,
    "min_tokens": 8,
}
DOCUMENTS = PrefixLengths(prefix_len=320, suffix_len=24, num_prefixes=3, output_len=48)

Ask = Callable[[Asked, str], Awaitable[Answer]]
"""Sends a request under an id."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One request, and its undisturbed answer."""

    asked: Asked
    wanted: Answer


Play = list[Scene]
"""Requests that follow each other."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """What to draw. Equal values give equal plays."""

    seed: int
    num_plays: int
    vocab: range
    """Token ids of drawn prompts."""
    max_model_len: int


async def rehearse(program: Program, ask: Ask) -> list[Play]:
    """All plays, performed on a server that nothing disturbs. Raises `UsageError` if one fails."""
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(number: int, session: Session, kind: str) -> Play:
        async with gate:
            return await _rehearsed(session, kind, number, ask)

    try:
        async with asyncio.TaskGroup() as running:
            tasks = [
                running.create_task(one(number, session, kind))
                for number, (session, kind) in enumerate(_cast(program))
            ]
    except ExceptionGroup as group:
        raise group.exceptions[0] from None
    return [task.result() for task in tasks]


KINDS = ("chat", "document", "choices", "document, whole", "seeded chat", "penalties", "stop")
"""What a play tests; its number decides."""


def _cast(program: Program) -> list[tuple[Session, str]]:
    """Sessions by kind of play, in turns."""
    limits = Limits(scale=0.25, max_output_len=40, max_model_len=program.max_model_len)
    shape = {"seed": program.seed, "vocab": program.vocab, "num_requests": 8 * program.num_plays}
    chats = make_sessions(Workload(name="sharegpt", limits=limits, **shape))  # type: ignore[arg-type]
    documents = make_sessions(
        Workload(name="prefix-repetition", prefixes=DOCUMENTS, **shape)  # type: ignore[arg-type]
    )
    kinds = itertools.islice(itertools.cycle(KINDS), program.num_plays)
    return [(next(chats if "chat" in kind else documents), kind) for kind in kinds]


async def _rehearsed(session: Session, kind: str, number: int, ask: Ask) -> Play:
    if "chat" in kind:
        return await _rehearsed_chat(session, kind, number, ask)
    turn = session.turns[0]
    body: dict[str, object] = {"prompt": turn.tokens, "max_tokens": turn.output_length}
    match kind:
        case "document":
            body |= {**GREEDY, "stream": True}
        case "document, whole":
            body |= GREEDY
        case "choices":
            body |= {**SEEDED, "n": 2, "seed": number, "logprobs": 2, "stream": True}
        case "penalties":
            body |= {**GREEDY, **PENALTIES, "logprobs": 0}
        case "stop":
            body |= {**GREEDY, "stream": True}
            whole = await _performed(Asked(kind=kind, endpoint=COMPLETIONS, body=body), number, ask)
            body["stop"] = [stop_within(whole.wanted.choices[0].text)]
    return [await _performed(Asked(kind=kind, endpoint=COMPLETIONS, body=body), number, ask)]


async def _rehearsed_chat(session: Session, kind: str, number: int, ask: Ask) -> Play:
    play: Play = []
    messages: list[Message] = []
    for turn in session.turns[:3]:
        messages.append({"role": "user", "content": text_of(turn.tokens)})
        body: dict[str, object] = {
            "messages": list(messages),
            "max_tokens": turn.output_length,
            "stream": True,
        }
        body |= GREEDY
        if kind != "chat":
            body |= {**SEEDED, "seed": number, "logprobs": True, "top_logprobs": 1, "n": 2}
        scene = await _performed(Asked(kind=kind, endpoint=CHAT, body=body), number, ask)
        play.append(scene)
        messages.append({"role": "assistant", "content": scene.wanted.choices[0].text})
    return play


async def _performed(asked: Asked, number: int, ask: Ask) -> Scene:
    answer = await ask(asked, f"rehearsal-{number}")
    if answer.error is not None:
        raise UsageError(f"a request failed before anything was disturbed: {answer.error}")
    return Scene(asked=asked, wanted=answer)


def stop_within(text: str) -> str:
    """Some characters out of the middle of a text: a stop string that its answer will meet."""
    middle = len(text) // 2
    return text[middle : middle + 6] or "\n"
