"""The tokens of all choices of one request, merged into one stream of text.

`open_answers` starts every generation of a plan, or none, and yields an `Answers`. Tokens are
turned into text as they come; what the consumer has not taken yet is merged, choice by choice. A
client that reads slowly therefore gets fewer and larger chunks, and costs the memory of its answer
at most. Leaving the context aborts whatever still runs.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from memserve.errors import RequestFailed
from memserve.frontend.timeline import Moment, Timeline
from memserve.generation import ChoiceToken, Generation, Generator
from memserve.openai.answer import Choice, Delta
from memserve.openai.plan import Plan
from memserve.tokens import Tokenizer


class Answers:
    """What the choices of one request have to say."""

    def __init__(self, plan: Plan, tokenizer: Tokenizer, life: Timeline) -> None:
        self._num_choices = plan.num_choices
        self._conversation = plan.conversation
        self._choices = [
            Choice(index, plan.rules, tokenizer)
            for index in range(len(plan.generations) * plan.num_choices)
        ]
        self._num_running = len(self._choices)
        self._life = life
        self._untaken: dict[int, Delta] = {}
        self._news = asyncio.Event()

    async def take(self) -> list[Delta]:
        """What is new since the last call, one delta a choice; empty when all has been said."""
        if not self._untaken and self._num_running:
            await self._news.wait()
        self._news.clear()
        deltas, self._untaken = list(self._untaken.values()), {}
        return deltas

    async def take_whole(self) -> list[Delta]:
        """All choices, in order, when the last has ended. To be used instead of `take`."""
        while self._num_running:
            await self._news.wait()
            self._news.clear()
        return [self._untaken[choice.index] for choice in self._choices]

    async def pump(
        self,
        generator: Generator,
        generation: Generation,
        prompt: int,
        tokens: AsyncIterator[ChoiceToken],
    ) -> None:
        """Absorb the tokens of generation number `prompt` until its choices have ended."""
        first = prompt * self._num_choices
        running = set(range(self._num_choices))
        async for token in tokens:
            if token.choice not in running:
                continue  # on its way when its choice was aborted
            if self._absorb(prompt, first + token.choice, token):
                running.discard(token.choice)
                if token.event.finish is None:
                    generator.abort_choice(generation, token.choice)
            if not running:
                return
        raise RequestFailed("the answer broke off before its end")

    def _absorb(self, prompt: int, index: int, token: ChoiceToken) -> bool:
        """Add one token to its choice; True if it was the last."""
        choice = self._choices[index]
        delta = self._untaken.setdefault(index, Delta(index))
        self._life.token(prompt, index, token.event)
        choice.absorb(token.event, delta)
        if choice.finished:
            assert delta.finish_reason is not None
            self._life.finish_choice(index, delta.finish_reason)
            self._remember(choice)
            self._num_running -= 1
            if not self._num_running:
                self._life.stamp(Moment.LAST_TOKEN)
        self._news.set()
        return choice.finished

    def _remember(self, choice: Choice) -> None:
        """Keep the tokens of an answer that has ended, before its client can go on from it."""
        if self._conversation is None:
            return
        said = choice.transcript.after(self._conversation.prompt)
        if said is not None:
            self._conversation.remember(*said)


@asynccontextmanager
async def open_answers(
    generator: Generator, plan: Plan, tokenizer: Tokenizer, life: Timeline
) -> AsyncIterator[Answers]:
    """Start all generations of `plan`; once entered, every one of them is admitted.

    Raises `InvalidRequest` and `Overloaded` on entering. A failure of any generation ends the body
    by cancellation and is raised on leaving, as itself.
    """
    answers = Answers(plan, tokenizer, life)
    async with AsyncExitStack() as admitted:
        streams = [
            await admitted.enter_async_context(generator.generate(generation))
            for generation in plan.generations
        ]
        life.stamp(Moment.ADMITTED)
        try:
            async with asyncio.TaskGroup() as pumps:
                for prompt, stream in enumerate(streams):
                    generation = plan.generations[prompt]
                    pumps.create_task(answers.pump(generator, generation, prompt, stream))
                yield answers
        except BaseExceptionGroup as failures:
            raise _first(failures) from None


def _first(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    failure = failures.exceptions[0]
    return _first(failure) if isinstance(failure, BaseExceptionGroup) else failure
