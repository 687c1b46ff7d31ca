"""One choice of one request as the engine sees it: its tokens, its blocks, how far it is computed."""

import time
from array import array
from collections import Counter
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TypeVar

from memserve.messages import (
    Expect,
    Prefilled,
    SamplingParams,
    Submit,
    TokenEvent,
    known_tokens,
)
from memserve.pool.refs import BlockRef
from memserve.workers.grammars import Follower

T = TypeVar("T")


class Source(Enum):
    """Where cached tokens that are not in HBM come from."""

    HOST = auto()
    """The own DRAM."""
    P2P = auto()
    """Another instance."""
    DISK = auto()
    """Files."""


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """A prompt and its answer so far.

    `tokens` holds both; the KV of the first `num_computed` of them lies in `blocks`, in order. The
    last token of a running sequence never has KV yet: computing it yields the next one.
    """

    ticket: int
    choice: int
    tokens: "array[int]"
    num_prompt_tokens: int
    num_given_outputs: int = 0
    """Tokens of the answer that it came with: others have generated them before they died."""
    sampling: SamplingParams
    cache_salt: str = ""
    reuse: bool = True
    """Whether its blocks come from the index and go there."""
    decode_on: int | None = None
    """Instance that will decode it, once the prompt is computed; None: this one."""
    order: float = 0.0
    """Waiting sequences start in this order, then by ticket."""
    chunk_tokens: int | None = None
    """As in `Submit`."""
    first_fetched_block: int = 0
    fetch: list[BlockRef] = field(default_factory=list)
    """Blocks from that number on that other instances hold; empty once they were asked for."""
    may_load: bool = True
    """Whether it may wait for bytes from elsewhere; not again once it did so in vain."""
    num_computed: int = 0
    blocks: "array[int]" = field(default_factory=lambda: array("i"))
    num_cached_tokens: int = 0
    """Prompt tokens whose prefill was skipped when it first ran."""
    num_loaded: Counter[Source] = field(default_factory=Counter)
    """Of those, the tokens that did not lie in the own HBM."""
    started_at: float | None = None
    """When it first got room for its prompt (monotonic clock)."""
    counted: bool = False
    """Whether these are known: what it finds later of what it has computed itself is no reuse."""
    num_published: int = 0
    """Blocks that the decode instance has been told of."""
    spread: bool = False
    """Whether its blocks lie on several instances: then `memserve.workers.parallel` keeps them, and
    the index has none of them."""
    follower: Follower | None = None
    """Of its grammar, from the first token on that is drawn here."""

    @property
    def num_outputs(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def answer(self) -> "array[int]":
        """A copy of those."""
        return self.tokens[self.num_prompt_tokens :]

    @property
    def num_new_outputs(self) -> int:
        """Of those, the ones that were generated since it was sent."""
        return self.num_outputs - self.num_given_outputs

    @property
    def num_pending(self) -> int:
        """Tokens that have no KV yet: 1 while decoding, more while prefilling."""
        return len(self.tokens) - self.num_computed

    @property
    def prefilling(self) -> bool:
        """Whether more than its newest own token is still to be computed."""
        return self.num_pending > 1 or self.num_new_outputs == 0

    def prefilled(self, now: float) -> Prefilled | None:
        """What is to be told with its first token; None if it never waited for room here."""
        if self.started_at is None:
            return None
        loaded = self.num_loaded
        return Prefilled(
            now - self.started_at, loaded[Source.HOST], loaded[Source.P2P], loaded[Source.DISK]
        )

    def newest(
        self, finish: str | None, logprob: float | None, top: tuple[tuple[int, float], ...]
    ) -> TokenEvent:
        """What is told of the newest token."""
        position = self.num_outputs - 1
        return TokenEvent(
            ticket=self.ticket,
            position=position,
            token=self.tokens[-1],
            finish=finish,
            logprob=logprob,
            top=top,
            num_cached_tokens=self.num_cached_tokens if position == 0 else 0,
            prefilled=self.prefilled(time.monotonic()) if position == 0 else None,
        )

    def finish_reason(self, eos_token_ids: frozenset[int]) -> str | None:
        """Why the newest token is the last one: `stop`, `length`, or None when it isn't.

        `max_tokens` is never more than the model's length allows; the front end sees to that. Before
        `min_tokens` the sampler can't draw a stopping token.
        """
        newest = self.tokens[-1]
        if newest in self.sampling.stop_token_ids:
            return "stop"
        if newest in eos_token_ids and not self.sampling.ignore_eos:
            return "stop"
        return "length" if self.num_outputs >= self.sampling.max_tokens else None


def submitted(message: Submit) -> Sequence:
    """The sequence that a worker is sent: it holds no blocks and nothing of it is computed."""
    tokens = known_tokens(message)
    return Sequence(
        ticket=message.ticket,
        choice=message.choice,
        tokens=tokens,
        num_prompt_tokens=len(tokens) - len(message.outputs),
        num_given_outputs=len(message.outputs),
        sampling=message.sampling,
        cache_salt=message.cache_salt,
        reuse=message.reuse,
        decode_on=message.decode_on,
        order=message.order,
        chunk_tokens=message.chunk_tokens,
        first_fetched_block=message.first_fetched_block,
        fetch=message.fetch,
    )


def handed_over(message: Expect, first_token: int, blocks: Items[int]) -> Sequence:
    """The sequence whose prompt another instance has computed, its KV in `blocks` here."""
    tokens = known_tokens(message)
    tokens.append(first_token)
    return Sequence(
        ticket=message.ticket,
        choice=message.choice,
        tokens=tokens,
        num_prompt_tokens=len(tokens) - 1 - len(message.outputs),
        num_given_outputs=len(message.outputs),
        sampling=message.sampling,
        cache_salt=message.cache_salt,
        reuse=message.reuse,
        num_computed=len(tokens) - 1,
        blocks=array("i", blocks),
    )


@dataclass(frozen=True, slots=True)
class Slice:
    """The part of a sequence that one step computes."""

    sequence: Sequence
    num_tokens: int
    num_skipped: int = 0
    """Tokens before it that have no KV yet; other instances compute them in the same step."""

    @property
    def start(self) -> int:
        """The position of its first token."""
        return self.sequence.num_computed + self.num_skipped

    @property
    def end(self) -> int:
        """The position behind its last token."""
        return self.start + self.num_tokens

    @property
    def samples(self) -> bool:
        """Whether the step yields a new token of the sequence."""
        return self.end == len(self.sequence.tokens)


def without(
    tickets: set[int], slices: Items[Slice], results: Items[T]
) -> tuple[list[Slice], list[T]]:
    """A step's slices, and the results of those that sample, less those of some tickets."""
    sampling = [part.sequence.ticket for part in slices if part.samples]
    kept = [one for ticket, one in zip(sampling, results, strict=True) if ticket not in tickets]
    return [part for part in slices if part.sequence.ticket not in tickets], kept
