"""Sends a workload: every session starts when it should, and waits for each answer.

A request's clock starts when it is sent, not when it waits for its turn under `max_concurrency`. A
session whose request fails is over; the turns it doesn't send are counted.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from memserve.bench.client import Client, Reply, Request
from memserve.bench.words import Message, text_of
from memserve.workloads import Session, drawn_answer

AnswerIds = Literal["server", "tokenize", "drawn"]
"""Where the token ids of answers come from, for the prompts of later turns: the server sends them, or
its /tokenize makes them of the text, or, where it offers neither, drawn ones stand in their place."""


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """One request as the client saw it. Times in seconds."""

    session_id: str
    turn: int
    start: float
    """After the load's begin."""
    ttft: float | None
    latency: float
    gaps: list[float]
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int | None
    error: str | None

    @property
    def tpot(self) -> float | None:
        """Mean seconds per token after the first; None for a single token."""
        if self.ttft is None or self.output_tokens < 2:
            return None
        return (self.latency - self.ttft) / (self.output_tokens - 1)


@dataclass(kw_only=True)
class Record:
    """What a load has brought so far."""

    outcomes: list[Outcome] = field(default_factory=list)
    num_skipped: int = 0
    """Turns not sent because an earlier one failed."""
    num_running: int = 0
    peak_running: int = 0
    duration: float = 0.0
    """Seconds from the begin to the last answer's end."""
    answer_ids: AnswerIds = "server"
    """The worst way that had to be taken."""


class Load:
    """One workload on its way to a server; `on_end` is called after every request."""

    def __init__(
        self,
        client: Client,
        vocab: range,
        *,
        max_concurrency: int | None = None,
        on_end: Callable[[Record], None],
    ) -> None:
        self.record = Record()
        self._client = client
        self._vocab = vocab
        self._gate = (
            asyncio.Semaphore(max_concurrency) if max_concurrency else contextlib.nullcontext()
        )
        self._on_end = on_end
        self._begin = 0.0

    async def run(self, sessions: Iterable[Session]) -> Record:
        """Send all sessions, which come in the order of their starts; returns at the last end."""
        self._begin = time.perf_counter()
        async with asyncio.TaskGroup() as running:
            for session in sessions:
                delay = session.start - (time.perf_counter() - self._begin)
                await asyncio.sleep(max(0.0, delay))
                running.create_task(self._converse(session))
        self.record.duration = time.perf_counter() - self._begin
        return self.record

    async def _converse(self, session: Session) -> None:
        answers: list[list[int]] = []
        messages: list[Message] = []
        for number, turn in enumerate(session.turns):
            if turn.think_time:
                await asyncio.sleep(turn.think_time)
            messages.append({"role": "user", "content": text_of(turn.tokens)})
            prompt = session.prompt(answers) if self._client.takes_token_ids else messages
            reply = await self._send(session, number, prompt)
            left = len(session.turns) - number - 1
            if reply.error is not None:
                self.record.num_skipped += left
                return
            if not left:
                return
            messages.append({"role": "assistant", "content": reply.text})
            if self._client.takes_token_ids:
                answers.append(await self._answer(session, number, reply))

    async def _send(
        self, session: Session, number: int, prompt: list[int] | list[Message]
    ) -> Reply:
        turn = session.turns[number]
        request = Request(
            prompt=prompt, max_tokens=turn.output_length, session_id=session.session_id
        )
        async with self._gate:
            self.record.num_running += 1
            self.record.peak_running = max(self.record.peak_running, self.record.num_running)
            try:
                reply = await self._client.ask(request)
            finally:
                self.record.num_running -= 1
        drawn_length = len(prompt) if self._client.takes_token_ids else 0
        self.record.outcomes.append(
            Outcome(
                session_id=session.session_id,
                turn=number,
                start=reply.sent_at - self._begin,
                ttft=reply.ttft,
                latency=reply.latency,
                gaps=reply.gaps,
                prompt_tokens=reply.usage.prompt_tokens if reply.usage else drawn_length,
                output_tokens=reply.num_output_tokens,
                cached_tokens=reply.num_cached_tokens,
                error=reply.error,
            )
        )
        self._on_end(self.record)
        return reply

    async def _answer(self, session: Session, number: int, reply: Reply) -> list[int]:
        """Token ids of an answer that the next prompt will contain."""
        if reply.token_ids:
            return reply.token_ids
        if self.record.answer_ids != "drawn":
            if tokens := await self._client.tokenize(reply.text):
                self.record.answer_ids = "tokenize"
                return tokens
            self.record.answer_ids = "drawn"
        return drawn_answer(self._vocab, session, number)
