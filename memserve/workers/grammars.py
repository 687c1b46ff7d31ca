"""The grammars of one worker: compiled beside the engine, followed token by token.

What a grammar allows next is a function of the grammar and the answer so far, so a sequence that is
handed over, preempted or dispatched again after a death goes on exactly: its new `Follower` takes the
tokens that are there. The tokenizer's table of bytes is built when the first grammar comes, and takes
tens of megabytes and a second or more; so messages about a prompt wait outside the engine until its
grammar is compiled (`Porter`).
"""

import logging
import threading
import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import final

import llguidance
import numpy as np
from numpy.typing import NDArray

from memserve.grammar import GrammarError, deep_thread, limits, shortened
from memserve.messages import Abort, Expect, Settle, Submit, ToWorker
from memserve.parallel.messages import KeepBlocks, StartGroup

logger = logging.getLogger(__name__)

MAX_KEPT = 32
"""Compiled grammars that are kept for requests to come."""

Allowed = NDArray[np.bool_]
"""[vocab_size]: which tokens may come next."""


@final
class Grammars:
    """Compiles grammars for one tokenizer on a thread of its own; the ones used last are kept.

    Safe to use from several threads.
    """

    def __init__(self, tokenizer: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """`tokenizer` is a `tokenizer.json`."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._lock = threading.Lock()
        self._thread = deep_thread()
        self._table: llguidance.LLTokenizer | None = None
        self._compiled: OrderedDict[str, Future[llguidance.LLMatcher]] = OrderedDict()

    def close(self) -> None:
        """Compile no more."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def compile(self, grammar: str) -> "Future[llguidance.LLMatcher]":
        """Compile a grammar unless it is; the result is a matcher to copy, or a `GrammarError`."""
        with self._lock:
            future = self._compiled.get(grammar)
            if future is None:
                future = self._compiled[grammar] = self._thread.submit(self._compile, grammar)
                if len(self._compiled) > MAX_KEPT:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(grammar)
        return future

    def follower(self, grammar: str) -> "Follower":
        """Follows an answer from its start; waits for the grammar. Raises `GrammarError`."""
        matcher = self.compile(grammar).result().deep_copy()
        return Follower(matcher, self._vocab_size, self._eos_token_ids)

    def _compile(self, grammar: str) -> llguidance.LLMatcher:
        if not self._eos_token_ids:
            raise GrammarError("this model has no token that ends an answer")
        if self._table is None:
            self._table = self._build_table()
        matcher = llguidance.LLMatcher(self._table, grammar, log_level=0, limits=limits())
        if matcher.is_error():
            raise GrammarError(shortened(matcher.get_error()))
        return matcher

    def _build_table(self) -> llguidance.LLTokenizer:
        start = time.monotonic()
        try:
            table = llguidance.LLTokenizer(
                self._tokenizer.read_text(encoding="utf-8"),
                n_vocab=self._vocab_size,
                eos_token=self._eos_token_ids,
            )
        except ValueError as error:
            logger.error("no grammars: llguidance can't use the tokenizer: %s", error)  # noqa: TRY400
            raise GrammarError("this model's tokenizer can't be used for grammars") from error
        logger.info("built the tokenizer's table for grammars in %.1f s", time.monotonic() - start)
        return table


@final
class Follower:
    """One answer along its grammar."""

    def __init__(
        self, matcher: llguidance.LLMatcher, vocab_size: int, eos_token_ids: Sequence[int]
    ) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._num_taken = 0

    def allowed(self, answer: "array[int]") -> Allowed:
        """What may follow `answer`, which goes on from that of the last call.

        Once it is complete that is the end, and nothing else. Raises `GrammarError` if the answer
        does not match, or the library's limits are reached.
        """
        matcher = self._matcher
        for token in answer[self._num_taken :]:
            if matcher.is_stopped():  # what comes after the end is nobody's business
                break
            if not matcher.consume_tokens([token]):
                raise self._failure()
        self._num_taken = len(answer)
        if matcher.is_stopped() and not matcher.is_error():
            allowed = np.zeros(self._vocab_size, np.bool_)
            allowed[self._eos_token_ids] = True
            return allowed
        mask = matcher.compute_bitmask()
        if matcher.is_error():
            raise self._failure()
        bits = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")
        return bits[: self._vocab_size].view(np.bool_)

    def _failure(self) -> GrammarError:
        reason = shortened(self._matcher.get_error())
        return GrammarError(f"the answer can't be held to its grammar: {reason}")


@final
class Porter:
    """Lets messages in to the engine in their order, those about a prompt when its grammar is compiled.

    `receive` is called by one thread.
    """

    def __init__(self, grammars: Grammars, let_in: Callable[[ToWorker], None]) -> None:
        self._grammars = grammars
        self._let_in = let_in
        self._lock = threading.Lock()
        self._waiting: dict[int, list[ToWorker]] = {}

    def receive(self, message: ToWorker) -> None:
        """A message has come from the launcher."""
        compiling = None
        match message:
            case Submit(ticket=ticket) if message.sampling.grammar:
                compiling = self._grammars.compile(message.sampling.grammar)
            case Expect() if message.sampling.grammar:  # it decodes no sooner than its prefill ends
                self._grammars.compile(message.sampling.grammar)
        with self._lock:
            match message:
                case Submit(ticket=ticket) if compiling is not None and not compiling.done():
                    self._waiting[ticket] = [message]
                case (
                    Abort(ticket=ticket)
                    | Settle(ticket=ticket)
                    | StartGroup(ticket=ticket)
                    | KeepBlocks(ticket=ticket)
                ) if ticket in self._waiting:
                    self._waiting[ticket].append(message)
                    return
                case _:
                    self._let_in(message)
                    return
        assert compiling is not None
        compiling.add_done_callback(lambda _: self._admit(ticket))

    def _admit(self, ticket: int) -> None:
        with self._lock:
            for message in self._waiting.pop(ticket):
                self._let_in(message)
