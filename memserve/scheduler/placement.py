"""Which instance prefills a request and which one decodes it.

A role is data: it tells what the scheduler sends to an instance, never what the instance can do. Load
is counted here at dispatch, so that a burst spreads before its first answer comes. Ties go to the
instance that was chosen least recently.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from memserve.scheduler.interface import Role
from memserve.scheduler.prompt_tree import PromptTree

__all__ = ["LeastWork", "Load", "Placement", "Policy", "Role"]


@dataclass(slots=True)
class Load:
    """What one instance has been given and has not finished."""

    instance: int
    role: Role
    num_cache_blocks: int = 0
    num_prefill_tokens: int = 0
    """Tokens still to compute of prompts that have not had their first token, as far as known."""
    num_sequences: int = 0
    """Sequences that it decodes or will decode."""
    last_chosen: int = 0


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a request runs; equal numbers mean that nothing is handed over."""

    prefill: int
    decode: int
    num_uncached_tokens: int
    """Prompt tokens that the prefill instance will probably have to compute."""


class Policy(Protocol):
    """Chooses placements and is told when an instance has lost its cache."""

    def place(self, prompt: list[int], salt: str, loads: Sequence[Load]) -> Placement:
        """The placement of one prompt on the instances that serve now.

        Raises `LookupError` when none of them prefills, or none decodes.
        """
        ...

    def forget(self, instance: int) -> None:
        """The instance's cache is empty."""
        ...

    def learn(self, load: Load, tokens: list[int], salt: str) -> None:
        """This instance's cache holds these tokens, though it was not sent them."""
        ...


class LeastWork:
    """Prefill where the prompt is computed first, decode where the fewest sequences run.

    The paper's Eq. 1 with exec(x, y) taken as proportional to the tokens that are not cached:
    tokens queued before this prompt plus its own. A mixed instance that prefills a request
    decodes it too; each sequence that it decodes slows its prefill, by as much as
    `TOKENS_PER_SEQUENCE` more tokens would.
    """

    TOKENS_PER_SEQUENCE = 64

    def __init__(self, block_size: int) -> None:
        self._prompts = PromptTree(block_size)
        self._num_chosen = 0

    def place(self, prompt: list[int], salt: str, loads: Sequence[Load]) -> Placement:
        """See `Policy.place`."""
        uncached = {
            load.instance: len(prompt) - self._prompts.match(load.instance, prompt, salt)
            for load in loads
            if load.role.prefills
        }
        prefill = self._least(
            (load for load in loads if load.role.prefills),
            lambda load: (
                load.num_prefill_tokens
                + uncached[load.instance]
                + self.TOKENS_PER_SEQUENCE * load.num_sequences
            ),
        )
        decode = prefill
        if not prefill.role.decodes:
            decode = self._least(
                (load for load in loads if load.role.decodes), lambda load: load.num_sequences
            )
        self._prompts.record(prefill.instance, prompt, salt, num_blocks=prefill.num_cache_blocks)
        return Placement(prefill.instance, decode.instance, uncached[prefill.instance])

    def forget(self, instance: int) -> None:
        """See `Policy.forget`."""
        self._prompts.forget(instance)

    def learn(self, load: Load, tokens: list[int], salt: str) -> None:
        """See `Policy.learn`."""
        self._prompts.record(load.instance, tokens, salt, num_blocks=load.num_cache_blocks)

    def _least(self, loads: Iterable[Load], weight: Callable[[Load], int]) -> Load:
        chosen = min(loads, key=lambda load: (weight(load), load.last_chosen), default=None)
        if chosen is None:
            raise LookupError("no instance serves this role")
        self._num_chosen += 1
        chosen.last_chosen = self._num_chosen
        return chosen
