"""A session: a user who asks, waits for the answer, and asks again with everything said so far.

The prompt of turn k is the new tokens of turns 0 … k and the answers to turns 0 … k-1, in order; of a
turn that stands alone, its own tokens.
"""

import dataclasses
from collections.abc import Sequence

from memserve.errors import UsageError
from memserve.workloads.drawing import synthetic_tokens


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One request of a session."""

    tokens: list[int]
    """New prompt tokens of this turn; at least one."""
    output_length: int
    """Tokens that the answer is to have; at least one."""
    think_time: float = 0.0
    """Seconds from the previous answer's end (of turn 0: from the session's start) to this turn."""
    alone: bool = False
    """Whether its prompt leaves out what was said before."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """Turns that follow each other, each after the answer to the one before."""

    session_id: str
    start: float
    """Seconds after the workload's start."""
    turns: list[Turn]
    tenant: str = ""

    def prompt(self, answers: Sequence[Sequence[int]]) -> list[int]:
        """The whole prompt of the turn that comes after these answers to all earlier turns."""
        tokens: list[int] = []
        if self.turns[len(answers)].alone:
            return list(self.turns[len(answers)].tokens)
        for turn, answer in zip(self.turns, answers, strict=False):
            tokens += turn.tokens
            tokens += answer
        return tokens + self.turns[len(answers)].tokens


def drawn_answer(vocab: range, session: Session, turn: int) -> list[int]:
    """Token ids that stand for the answer to a turn where no model gives one."""
    return synthetic_tokens(
        vocab, session.turns[turn].output_length, "answer", session.session_id, turn
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """How a workload's lengths are fitted to a model and a machine. `None`: no limit."""

    scale: float = 1.0
    """Factor of every drawn length."""
    max_input_len: int | None = None
    """Longest prompt in tokens."""
    max_output_len: int | None = None
    """Longest answer in tokens."""
    max_model_len: int | None = None
    """Longest prompt plus answer in tokens."""

    def __post_init__(self) -> None:
        """Raises `UsageError` for limits that no request could keep."""
        if self.scale <= 0:
            raise UsageError(f"the scale of lengths must be positive, not {self.scale}")
        for value, least in (
            (self.max_input_len, 1),
            (self.max_output_len, 1),
            (self.max_model_len, 2),
        ):
            if value is not None and value < least:
                raise UsageError(f"a limit of {value} tokens leaves no room for a request")

    def scaled(self, length: float) -> int:
        """A drawn length after scaling; at least 1."""
        return max(1, round(length * self.scale))

    def output(self, length: float) -> int:
        """A drawn answer length after scaling, within the limits."""
        most = [self.scaled(length)]
        if self.max_output_len is not None:
            most.append(self.max_output_len)
        if self.max_model_len is not None:
            most.append(self.max_model_len - 1)
        return min(most)

    def prompt_room(self, output_length: int) -> int | None:
        """Most prompt tokens of a request with an answer of this length."""
        rooms = []
        if self.max_input_len is not None:
            rooms.append(self.max_input_len)
        if self.max_model_len is not None:
            rooms.append(self.max_model_len - output_length)
        return min(rooms, default=None)

    def fit(self, turns: Sequence[Turn]) -> list[Turn]:
        """The turns whose prompts keep the limits: a first prompt is cut, a dialogue ends early."""
        fitting: list[Turn] = []
        history = 0
        for turn in turns:
            room = self.prompt_room(turn.output_length)
            length = len(turn.tokens) + (0 if turn.alone else history)
            if room is not None and length > room:
                if fitting and not turn.alone:
                    break
                turn = dataclasses.replace(turn, tokens=turn.tokens[:room])  # noqa: PLW2901
            fitting.append(turn)
            history += len(turn.tokens) + turn.output_length
        return fitting
