"""The tokens of one choice turned into the text that a client sees.

A choice holds back text that may be the start of a stop string, cuts the answer at a stop string,
and says why it ended. What it has to say since it was last asked is a `Delta`; deltas of the same
choice may be merged before they are sent, so a slow client costs no memory but its answer's.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field

from memserve.messages import TokenEvent
from memserve.openai.plan import TextRules
from memserve.tokens import REPLACEMENT, Detokenizer, StopChecker, Tokenizer

CONTEXT_TOKENS = 8
"""Tokens before an answer that may change how its first word is decoded."""


@dataclass(slots=True)
class Delta:
    """What is new in choice number `index` of the response."""

    index: int
    pieces: list[str] = field(default_factory=list)
    events: list[TokenEvent] = field(default_factory=list)
    num_tokens: int = 0
    """Tokens of the whole choice so far, these included."""
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    """The stop string or stop token that ended the choice; None for every other end."""

    @property
    def text(self) -> str:
        """The new text."""
        return "".join(self.pieces)


class Transcript:
    """The tokens of one choice, and how much of its text each one completes."""

    def __init__(self, tokenizer: Tokenizer, *, hidden: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._hidden = hidden
        self._tokens: list[int] = []
        self._ends: list[int] = []  # characters that the tokens up to here stand for
        self._pieces: list[str] = []

    def add(self, token: int, text: str) -> None:
        """The next token, and the text that it completes, shown or not."""
        self._tokens.append(token)
        self._ends.append((self._ends[-1] if self._ends else 0) + len(text))

    def show(self, text: str) -> None:
        """More of the text that the client sees."""
        self._pieces.append(text)

    def after(self, prompt: Sequence[int]) -> tuple[str, list[int]] | None:
        """The shown text as it reads after `prompt`, and the tokens that decode to exactly that.

        A decoder may drop the space before a text's first word, which is there after a prompt. None
        if no tokens stand for the shown text: it is empty, was cut inside a token, lacks special
        tokens that were generated, or holds bytes that are no text.
        """
        shown = "".join(self._pieces)
        if not shown or REPLACEMENT in shown:
            return None
        num_tokens = bisect.bisect_left(self._ends, len(shown)) + 1
        tokens = self._tokens[:num_tokens]
        if num_tokens > len(self._ends) or self._ends[num_tokens - 1] != len(shown):
            return None
        if not self._hidden.isdisjoint(tokens):
            return None
        head = tokens[: bisect.bisect_left(self._ends, 1) + 1]
        context = list(prompt[-CONTEXT_TOKENS:])
        alone, before = self._decode(head), self._decode(context)
        here = self._decode(context + head)
        if not (shown.startswith(alone) and here.startswith(before)):
            return None
        return here[len(before) :] + shown[len(alone) :], tokens

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=False)


class Choice:
    """One answer while its tokens arrive."""

    def __init__(self, index: int, rules: TextRules, tokenizer: Tokenizer) -> None:
        self.index = index
        self.finished = False
        self.num_tokens = 0
        hidden = tokenizer.special_token_ids if rules.skip_special_tokens else frozenset()
        self.transcript = Transcript(tokenizer, hidden=hidden)
        self._rules = rules
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=rules.skip_special_tokens)
        self._stops = StopChecker(rules.stops, include_in_output=rules.include_stop)

    def absorb(self, event: TokenEvent, delta: Delta) -> None:
        """Add the next token to `delta`; afterwards `finished` tells whether it was the last.

        A choice may end at a stop string before the engine knows; the caller then aborts it.
        """
        self.num_tokens += 1
        delta.num_tokens = self.num_tokens
        delta.events.append(event)
        stopped_by_token = event.finish == "stop"
        # The text of a token that ends the answer is no part of it, unless it was asked for.
        shown = self._rules.include_stop or not stopped_by_token
        text = self._detokenizer.push(event.token) if shown else ""
        if event.finish is not None:
            text += self._detokenizer.flush()
        if shown:
            self.transcript.add(event.token, text)
        matched = self._emit(text, delta, ended_by_token=stopped_by_token)
        if matched is not None:
            self._finish(delta, "stop", matched)
        elif event.finish is not None:
            self._show(self._stops.flush(), delta)
            in_rules = stopped_by_token and event.token in self._rules.stop_token_ids
            self._finish(delta, event.finish, event.token if in_rules else None)

    def _emit(self, text: str, delta: Delta, *, ended_by_token: bool) -> str | None:
        """Pass new text on through the stop checker; returns the stop string that it completed."""
        if self.num_tokens <= self._rules.min_tokens and not ended_by_token:
            self._show(text, delta)
            return None
        released, matched = self._stops.push(text)
        self._show(released, delta)
        return matched

    def _show(self, text: str, delta: Delta) -> None:
        delta.pieces.append(text)
        self.transcript.show(text)

    def _finish(self, delta: Delta, reason: str, stop_reason: int | str | None) -> None:
        self.finished = True
        delta.finish_reason = reason
        delta.stop_reason = stop_reason
