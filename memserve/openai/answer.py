"""The tokens of one choice turned into the text that a client sees.

A choice holds back text that may be the start of a stop string, cuts the answer at a stop string,
and says why it ended. What it has to say since it was last asked is a `Delta`; deltas of the same
choice may be merged before they are sent, so a slow client costs no memory but its answer's.
"""

from dataclasses import dataclass, field

from memserve.messages import TokenEvent
from memserve.openai.plan import TextRules
from memserve.tokens import Detokenizer, StopChecker, Tokenizer


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


class Choice:
    """One answer while its tokens arrive."""

    def __init__(self, index: int, rules: TextRules, tokenizer: Tokenizer) -> None:
        self.index = index
        self.finished = False
        self.num_tokens = 0
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
        text = (
            ""
            if stopped_by_token and not self._rules.include_stop
            else self._detokenizer.push(event.token)
        )
        if event.finish is not None:
            text += self._detokenizer.flush()
        matched = self._emit(text, delta, ended_by_token=stopped_by_token)
        if matched is not None:
            self._finish(delta, "stop", matched)
        elif event.finish is not None:
            delta.pieces.append(self._stops.flush())
            in_rules = stopped_by_token and event.token in self._rules.stop_token_ids
            self._finish(delta, event.finish, event.token if in_rules else None)

    def _emit(self, text: str, delta: Delta, *, ended_by_token: bool) -> str | None:
        """Pass new text on through the stop checker; returns the stop string that it completed."""
        if self.num_tokens <= self._rules.min_tokens and not ended_by_token:
            delta.pieces.append(text)
            return None
        released, matched = self._stops.push(text)
        delta.pieces.append(released)
        return matched

    def _finish(self, delta: Delta, reason: str, stop_reason: int | str | None) -> None:
        self.finished = True
        delta.finish_reason = reason
        delta.stop_reason = stop_reason
