"""The engine of one worker: receive, schedule, run, absorb, send.

One instance serves prompts and answers alike; what it is sent decides what it does. All state of the
pool, the index and the sequences belongs to the thread that calls `run`. Every ticket that was
submitted ends here in exactly one way: its last token, a handover that the launcher settled, a
rejection, or an abort.
"""

import logging
import queue
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import assert_never

import msgspec

from memserve.config import EngineConfig
from memserve.errors import GroupBroken
from memserve.messages import (
    Abort,
    Calibrate,
    Calibrated,
    Configure,
    Expect,
    Inspect,
    Inspection,
    MapPeer,
    PoolAnswer,
    PoolCall,
    Published,
    Rejected,
    ReleasePeer,
    ReportIndex,
    ResetPrefixCache,
    Settle,
    Shutdown,
    Submit,
    TokenEvent,
    Tokens,
)
from memserve.model.sampling import Sampled
from memserve.parallel.messages import KeepBlocks, StartGroup
from memserve.pool.mempool import MemPool
from memserve.pool.progress import GroupProgress, StepProgress
from memserve.pool.service import PoolService, StartPull
from memserve.pool.space import BlockSpace
from memserve.stats import EngineStats
from memserve.workers.batching import Batcher
from memserve.workers.books import Books
from memserve.workers.calibration import CopyBlocks, calibrate
from memserve.workers.claims import Claims
from memserve.workers.fetching import Loads, StartFetch
from memserve.workers.handover import Arrivals, Departures, StartCopy
from memserve.workers.index_feed import IndexFeed
from memserve.workers.link import (
    CopyDone,
    CopyFailed,
    Event,
    FetchDone,
    Hangup,
    Link,
    PullDone,
    SwapDone,
)
from memserve.workers.mailbox import Mailbox
from memserve.workers.parallel import Groups
from memserve.workers.pulse import HEARTBEAT_S, Pulse
from memserve.workers.runner import StepRunner
from memserve.workers.samples import Samples, step_sample
from memserve.workers.sequence import Sequence, Slice, submitted, without
from memserve.workers.stalling import STALL_S
from memserve.workers.storing import DiskStore
from memserve.workers.swapping import StartSwap, Swapper

logger = logging.getLogger(__name__)


class Engine:
    """Runs the sequences of one instance."""

    def __init__(
        self,
        config: EngineConfig,
        link: Link,
        pool: MemPool,
        runner: StepRunner,
        *,
        start_copy: StartCopy,
        start_swap: StartSwap,
        start_pull: StartPull,
        start_fetch: StartFetch,
        progress: StepProgress | None,
        map_peer: Callable[[MapPeer | ReleasePeer], None],
        copy_within: CopyBlocks,
        samples: Samples,
        store: DiskStore | None = None,
        stall_s: float = STALL_S,
        space: BlockSpace | None = None,
        group_progress: GroupProgress | None = None,
    ) -> None:
        """Without `space` and `group_progress` the instance takes part in no group."""
        self._config = config
        self._link = link
        self._pool = pool
        self._runner = runner
        self._copy_within = copy_within
        self._samples = samples
        self._feed = IndexFeed(pool, link.send)
        self._progress = progress
        self._store = store
        self._eos_token_ids = frozenset(config.eos_token_ids)
        self._map_peer = map_peer
        self._swapper = Swapper(pool, start_swap, patience=stall_s)
        self._service = PoolService(
            pool, lambda number, reply: self._send(PoolAnswer(number, reply)), start_pull
        )
        claims = Claims(pool, self._swapper)
        loads = self._loads = Loads(pool, self._swapper, start_fetch, store, patience=stall_s)
        self._batcher = Batcher(
            pool,
            claims,
            self._swapper,
            loads,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
        )
        self._departures = Departures(
            pool,
            self._batcher,
            claims,
            self._send,
            timeout=config.handover_timeout,
            granularity=config.transfer_granularity,
        )
        self._arrivals = Arrivals(
            pool,
            self._batcher,
            claims,
            self._swapper,
            self._send,
            start_copy,
            max_num_seqs=config.max_num_seqs,
            timeout=config.handover_timeout,
        )
        self._mail = Mailbox(link.inbox)
        self._groups = Groups(
            pool,
            self._batcher,
            self._departures,
            claims,
            self._swapper,
            self._mail,
            self._send,
            start_copy,
            space=space,
            progress=group_progress,
            beat=self._beat,
            config=config,
        )
        self._turns = self._groups.turns
        self._stopping = False
        self._idled = True
        self._books = Books(
            pool,
            self._batcher,
            loads,
            self._departures,
            self._arrivals,
            self._service,
            self._groups,
            store,
        )
        sign = None if group_progress is None else group_progress.beat
        self._pulse = Pulse(link.send, self._books.stats, samples, sign)

    def run(self) -> None:
        """Serve until the launcher says so or has gone."""
        busy = True
        while not self._stopping:
            busy = self.step(wait=not busy)

    def step(self, *, wait: bool = False) -> bool:
        """One turn of the loop; False if there was nothing to compute.

        With `wait`, sleeps until something arrives or a deadline wants attention.
        """
        self._receive(wait=wait)
        now = time.monotonic()
        self._departures.expire(now)
        self._arrivals.expire(now)
        self._service.expire(now)
        self._batcher.expire(now)
        self._groups.expire(now)
        self._arrivals.reserve()
        self._groups.reserve()
        self._groups.gather()
        self._swapper.tend()
        slices = self._turns.schedule(self._batcher)
        if slices:
            self._run(slices)
        elif self._turns:
            self._turns.pause()
        else:
            self._idled = True
        self._feed.flush()
        self._pulse.beat()
        return bool(slices) or bool(self._turns)

    def _run(self, slices: list[Slice]) -> None:
        """Compute a step, timed, and record what came out."""
        start = time.perf_counter()
        try:
            sampled = self._compute(slices)
        except GroupBroken as error:  # the other rows of the step are computed again
            self._turns.broke(error)
            return
        seconds = time.perf_counter() - start
        num_ranks = self._turns.num_ranks
        sample = step_sample(slices, seconds, num_ranks=num_ranks, after_idling=self._idled)
        self._samples.add_step(sample)
        self._idled = False
        changed = self._groups.verified(slices)
        if changed:
            slices, sampled = without(changed, slices, sampled)
        self._absorb(slices, sampled)

    def _compute(self, slices: list[Slice]) -> list[Sampled]:
        """Run a step; if peers were told that they may follow it, let them."""
        others = [self._turns.written] if self._turns.num_ranks > 1 else []
        progress = self._progress
        if progress is None or not self._departures.announce(slices, progress.next_step):
            return self._runner.run(slices, self._pulse.after(*others), is_followed=bool(others))
        progress.begin()
        sampled = self._runner.run(slices, self._pulse.after(progress.written, *others))
        progress.end()
        return sampled

    def _beat(self) -> None:
        self._pulse.beat()

    def _send(self, message: msgspec.Struct) -> None:
        """Send a message, after all that is to be told of the index up to now."""
        self._feed.flush()
        self._link.send(message)

    def _receive(self, *, wait: bool) -> None:
        """Handle everything that has arrived; with `wait`, sleep until something does."""
        mail = self._mail
        if wait and mail.empty():
            try:
                self._handle(mail.get(timeout=self._patience()))
            except queue.Empty:
                return
        while not mail.empty():
            self._handle(mail.get())

    def _patience(self) -> float:
        """Seconds that an idle engine may sleep before a deadline or a heartbeat wants it."""
        waits = self._departures or self._arrivals or self._service or self._loads
        return 0.05 if waits or self._groups.num_unfinished else HEARTBEAT_S

    def _handle(self, event: Event) -> None:
        match event:
            case Submit(group=None):
                self._batcher.add(submitted(event))
            case Submit() | StartGroup() | KeepBlocks():
                self._groups.handle(event, time.monotonic())
            case Expect():
                self._arrivals.expect(event)
            case Published():
                self._arrivals.published(event, time.monotonic())
            case CopyDone():
                if not self._groups.copied(event):
                    self._arrivals.copied(event)
            case PoolCall(number, request):
                self._service.handle(number, request, time.monotonic())
            case PullDone(number, verified):
                self._service.pulled(number, verified, time.monotonic())
            case SwapDone(swap):
                swap.commit()
                self._batcher.swapped(swap)
            case FetchDone(fetch, num_good):
                self._batcher.fetched(fetch, num_good)
            case CopyFailed(error):
                raise RuntimeError("a copy failed, and what it has written is unknown") from error
            case Settle():
                self._settle(event)
            case Abort(ticket):
                self._abort(ticket)
            case MapPeer() | ReleasePeer():
                self._remap(event)
            case Inspect() | ReportIndex() | Calibrate():
                self._answer(event)
            case ResetPrefixCache():
                self._forget_history()
            case Shutdown() | Hangup():
                self._stopping = True
            case Configure():
                raise AssertionError(f"not expected here: {event}")
            case _:
                assert_never(event)

    def _abort(self, ticket: int) -> None:
        for room in (self._departures, self._arrivals, self._batcher, self._groups):
            room.abort(ticket)

    def _forget_history(self) -> None:
        self._pool.reset()
        self._groups.reset()
        if self._store is not None:
            self._store.clear()

    def _remap(self, message: MapPeer | ReleasePeer) -> None:
        lost = message.arena if isinstance(message, MapPeer) else message
        self._groups.lose(lost.instance)
        self._map_peer(message)

    def _answer(self, question: Inspect | ReportIndex | Calibrate) -> None:
        """Tell the launcher what it wants to know of this worker."""
        match question:
            case Inspect(query):
                self._send(Inspection(query, self._books.stats(), self._books.audit()))
            case ReportIndex():
                self._feed.report()
            case Calibrate(query):
                # Nothing else is served meanwhile, so only the launcher's start asks.
                run, copy = self._runner.run, self._copy_within
                self._send(Calibrated(query, *calibrate(self._pool, run, copy, self._config)))

    def _settle(self, message: Settle) -> None:
        ticket = message.ticket
        waited = self._departures.settle(ticket, accepted=message.accepted)
        if message.accepted:
            self._batcher.abort(ticket)  # in case it was withdrawn: the decode instance was first
            self._groups.abort(ticket)
        elif not waited:  # declined before its prefill has ended
            self._batcher.keep(ticket)
            self._groups.decode_here(ticket)

    def _absorb(self, slices: list[Slice], sampled: list[Sampled]) -> None:
        """Record what a step computed, in the order of its slices, and send its tokens."""
        events: list[TokenEvent] = []
        failed: list[Rejected] = []
        results = iter(sampled)
        prefilled: list[Sequence] = []
        self._books.count_step(slices)
        for part in slices:
            sequence = part.sequence
            samples = part.samples
            if sequence.spread and sequence.prefilling:
                if self._turns.computed(part):
                    prefilled.append(sequence)
            else:
                if sequence.prefilling:
                    prefilled.append(sequence)
                sequence.num_computed += part.num_tokens
            if samples and (result := next(results)).failure:
                failed.append(Rejected(sequence.ticket, result.failure, HTTPStatus.BAD_REQUEST))
            elif samples:
                events.append(self._append(sequence, result))
        ended = {event.ticket for event in events if event.finish is not None}
        ended.update(rejection.ticket for rejection in failed)
        prefilled = [sequence for sequence in prefilled if sequence.ticket not in ended]
        for sequence in prefilled:
            self._batcher.share(sequence)
        if events:
            self._send(Tokens(events))
        for rejection in failed:
            self._send(rejection)
            self._abort(rejection.ticket)
        now = time.monotonic()
        for sequence in prefilled:
            if sequence.decode_on is not None:
                keeper = self._groups if sequence.spread else self._departures
                keeper.publish(sequence, now)

    def _append(self, sequence: Sequence, sampled: Sampled) -> TokenEvent:
        """Add a sampled token to its sequence and end the sequence if it was the last."""
        sequence.tokens.append(sampled.token)
        finish = sequence.finish_reason(self._eos_token_ids)
        if finish is not None:
            self._batcher.finish(sequence)
        return sequence.newest(finish, sampled.logprob, sampled.top)

    def audit(self) -> list[str]:
        """See `memserve.workers.books.Books.audit`."""
        return self._books.audit()

    def stats(self) -> EngineStats:
        """See `memserve.workers.books.Books.stats`."""
        return self._books.stats()
