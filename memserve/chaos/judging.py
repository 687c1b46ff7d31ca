"""Whether an answer is the undisturbed one.

Tokens, texts, reasons of ends and counts must be equal, log-probabilities within
`LOGPROB_TOLERANCE`. Of an answer that its client left, what came must be how the undisturbed one
begins. The first token that differs may be a tie within rounding: whether it is one,
`memserve.chaos.ties` finds out afterwards.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from memserve.chaos.asking import Answer, Asked, Choice
from memserve.chaos.plays import Scene

LOGPROB_TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A choice that went another way."""

    asked: Asked
    prompt: list[int]
    choice: int
    common: list[int]
    """Tokens before the first that differs."""
    wanted: int
    got: int


def verdict(scene: Scene, answer: Answer) -> str | Difference | None:
    """None for an answer that is right, else what is wrong with it."""
    wanted, left = scene.wanted, answer.left
    if left and not answer.choices:
        return None
    if answer.prompt != wanted.prompt:
        return "the prompt has other tokens"
    if not left and answer.choices.keys() != wanted.choices.keys():
        return f"it has the choices {sorted(answer.choices)}"
    for index, choice in answer.choices.items():
        other = wanted.choices[index]
        place = _first_difference(other.tokens, choice.tokens)
        if place is not None:
            return Difference(
                asked=scene.asked,
                prompt=wanted.prompt,
                choice=index,
                common=choice.tokens[:place],
                wanted=other.tokens[place],
                got=choice.tokens[place],
            )
        if wrong := _wrong(other, choice, left=left):
            return f"choice {index}: {wrong}"
    return None if left else _wrong_usage(wanted, answer)


def _first_difference(wanted: Sequence[int], got: Sequence[int]) -> int | None:
    pairs = enumerate(zip(wanted, got, strict=False))
    return next((place for place, (one, other) in pairs if one != other), None)


def _wrong(wanted: Choice, got: Choice, *, left: bool) -> str | None:
    """What is wrong with a choice whose tokens are right as far as both go."""
    missing = len(wanted.tokens) - len(got.tokens)
    if missing < 0 or (missing and not left):
        return f"it has {len(got.tokens)} tokens, not {len(wanted.tokens)}"
    if not (wanted.text.startswith(got.text) if left else wanted.text == got.text):
        return "its tokens are right and its text is not"
    if not left and got.finish_reason != wanted.finish_reason:
        return f"it ends with {got.finish_reason}, not {wanted.finish_reason}"
    if not left and len(got.logprobs) != len(wanted.logprobs):
        return f"it has {len(got.logprobs)} log-probabilities, not {len(wanted.logprobs)}"
    for place, (one, other) in enumerate(zip(wanted.logprobs, got.logprobs, strict=False)):
        if abs(one - other) > LOGPROB_TOLERANCE:
            return f"the log-probability of token {place} is {other}, not {one}"
    return None


def _wrong_usage(wanted: Answer, got: Answer) -> str | None:
    """The counts of cached tokens may differ."""
    counts = [
        (answer.usage.prompt_tokens, answer.usage.completion_tokens)
        for answer in (wanted, got)
        if answer.usage is not None
    ]
    return None if counts[0] == counts[-1] else f"it counts {counts[-1]} tokens, not {counts[0]}"
