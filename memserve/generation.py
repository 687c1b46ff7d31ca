"""What the front end asks of the cluster, and what it gets back."""

from array import array
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from memserve.messages import SamplingParams, TokenEvent


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One prompt and how to continue it.

    Every one of `num_choices` answers is drawn independently: randomness is a function of
    (sampling.seed, choice, position) alone. Prompts share KV only under equal `cache_salt`.
    The last three fields are for the scheduler: who asks, how urgently, and in which conversation.
    """

    request_id: str
    prompt: "array[int]"
    """Of type code `i`: what the scheduler looks up and the workers are sent, byte by byte."""
    sampling: SamplingParams
    num_choices: int = 1
    cache_salt: str = ""
    priority: int = 0
    """Lower is served earlier, as in vLLM."""
    tenant: str = ""
    """Whose request it is; tenants share the server fairly."""
    session: str = ""
    """Requests of one session are turns of one conversation; empty: unknown."""


@dataclass(frozen=True, slots=True)
class ChoiceToken:
    """One token of choice number `choice`, in order within its choice."""

    choice: int
    event: TokenEvent


@dataclass(slots=True)
class Recoveries:
    """What the cluster has made good, counted since its start."""

    num_deaths: int = 0
    """Of workers, those that hung included."""
    num_restarts: int = 0
    num_replayed: int = 0
    """Choices that were dispatched again."""
    num_convicted: int = 0
    """Requests that failed since they had killed every worker they were given to."""
    num_failed_returns: int = 0
    """Answers whose KV was not brought back to where their prompts were prefilled."""


@dataclass(slots=True)
class GroupCounts:
    """What became of prompts that several workers prefilled together, counted since the start."""

    num_started: int = 0
    num_dissolved: int = 0
    """Those that were dispatched again, since a worker died or could not go on."""
    num_gathered: int = 0
    """Those of which one worker then got copies of all blocks."""
    num_kept: int = 0
    """Those whose blocks stayed spread over the workers when the request had ended."""


class Generator(Protocol):
    """The cluster as the front end sees it."""

    def generate(
        self, generation: Generation
    ) -> AbstractAsyncContextManager[AsyncIterator[ChoiceToken]]:
        """Run a generation; leaving the context aborts whatever of it is still running.

        Entering raises `InvalidRequest` for a prompt that can never fit and `Overloaded` when the
        queue is full. The iterator ends after the last token of every choice (`event.finish` is
        set); it raises `RequestFailed` when the request can't be finished.
        """
        ...

    def abort_choice(self, generation: Generation, choice: int) -> None:
        """Stop one choice whose remaining tokens nobody wants (a stop string was found)."""
        ...
