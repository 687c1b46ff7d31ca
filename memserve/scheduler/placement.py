"""Which instance prefills a request and which one decodes it.

A role is data: it tells what the scheduler sends to an instance, never what the instance can do. Load
is counted here at dispatch, so that a burst spreads before its first answer comes. Ties go to the
instance that was chosen least recently.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol


class Role(StrEnum):
    """What the scheduler sends to an instance."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"

    @property
    def prefills(self) -> bool:
        """Whether prompts are sent there."""
        return self is not Role.DECODE

    @property
    def decodes(self) -> bool:
        """Whether answers are generated there."""
        return self is not Role.PREFILL


@dataclass(slots=True)
class Load:
    """What one instance has been given and has not finished."""

    instance: int
    role: Role
    num_prefill_tokens: int = 0
    """Prompt tokens of requests that have not had their first token."""
    num_sequences: int = 0
    """Sequences that it decodes or will decode."""
    last_chosen: int = 0


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a request runs; equal numbers mean that nothing is handed over."""

    prefill: int
    decode: int


class Policy(Protocol):
    """Chooses a placement; `loads` are the instances that serve now, at least one."""

    def place(self, prompt: list[int], loads: Iterable[Load]) -> Placement:
        """The placement of one prompt. Raises `LookupError` when no instance can take it."""
        ...


class LeastLoaded:
    """Prefill where the fewest prompt tokens wait, decode where the fewest sequences run.

    A mixed instance that prefills a request decodes it too: moving it would cost and gain nothing
    that choosing another instance for the prompt would not.
    """

    def __init__(self) -> None:
        self._num_chosen = 0

    def place(self, prompt: list[int], loads: Iterable[Load]) -> Placement:  # noqa: ARG002
        """See `Policy.place`."""
        loads = list(loads)
        prefill = self._least(
            (load for load in loads if load.role.prefills),
            lambda load: (load.num_prefill_tokens, load.num_sequences),
        )
        if prefill.role.decodes:
            return Placement(prefill.instance, prefill.instance)
        decode = self._least(
            (load for load in loads if load.role.decodes),
            lambda load: (load.num_sequences, load.num_prefill_tokens),
        )
        return Placement(prefill.instance, decode.instance)

    def _least(self, loads: Iterable[Load], weight: Callable[[Load], tuple[int, int]]) -> Load:
        chosen = min(loads, key=lambda load: (*weight(load), load.last_chosen), default=None)
        if chosen is None:
            raise LookupError("no instance serves this role")
        self._num_chosen += 1
        chosen.last_chosen = self._num_chosen
        return chosen
