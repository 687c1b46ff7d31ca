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
from collections.abc import Sequence as Items
from typing import Protocol, assert_never

import msgspec

from memserve.config import EngineConfig
from memserve.messages import (
    Abort,
    Calibrate,
    Calibrated,
    Configure,
    CopySample,
    EngineStats,
    Expect,
    Inspect,
    Inspection,
    MapPeer,
    PoolAnswer,
    PoolCall,
    Published,
    ReleasePeer,
    ReportIndex,
    ResetPrefixCache,
    Settle,
    Shutdown,
    StepSample,
    Submit,
    TokenEvent,
    Tokens,
)
from memserve.model.sampling import Sampled
from memserve.model.step import LayerWritten
from memserve.parallel.messages import KeepBlocks, StartGroup
from memserve.pool.mempool import MemPool
from memserve.pool.progress import StepProgress
from memserve.pool.service import PoolService, StartPull
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
from memserve.workers.pulse import HEARTBEAT_S, Pulse
from memserve.workers.samples import Samples, step_sample
from memserve.workers.sequence import Sequence, Slice, submitted
from memserve.workers.stalling import STALL_S
from memserve.workers.storing import DiskStore
from memserve.workers.swapping import StartSwap, Swapper

logger = logging.getLogger(__name__)


class StepRunner(Protocol):
    """Computes a step: `memserve.workers.runner.Runner`."""

    def run(self, slices: Items[Slice], written: LayerWritten | None = None) -> list[Sampled]:
        """Write the KV of all slices; one result for each that samples, in their order.

        `written` may be told of the layers as they are written.
        """
        ...


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
    ) -> None:
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
        self._stopping = False
        self._idled = True
        self._books = Books(
            pool, self._batcher, loads, self._departures, self._arrivals, self._service, store
        )
        self._pulse = Pulse(link.send, self._books.stats, samples)

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
        self._arrivals.reserve()
        self._swapper.tend()
        slices = self._batcher.schedule()
        if slices:
            self._run(slices)
        else:
            self._idled = True
        self._feed.flush()
        self._pulse.beat()
        return bool(slices)

    def _run(self, slices: list[Slice]) -> None:
        """Compute a step, timed, and record what came out."""
        start = time.perf_counter()
        sampled = self._compute(slices)
        seconds = time.perf_counter() - start
        self._samples.add_step(step_sample(slices, seconds, after_idling=self._idled))
        self._idled = False
        self._absorb(slices, sampled)

    def _compute(self, slices: list[Slice]) -> list[Sampled]:
        """Run a step; if peers were told that they may follow it, let them."""
        progress = self._progress
        if progress is None or not self._departures.announce(slices, progress.next_step):
            return self._runner.run(slices, self._pulse.written)
        progress.begin()
        sampled = self._runner.run(slices, self._pulse.also(progress.written))
        progress.end()
        return sampled

    def _send(self, message: msgspec.Struct) -> None:
        """Send a message, after all that is to be told of the index up to now."""
        self._feed.flush()
        self._link.send(message)

    def _receive(self, *, wait: bool) -> None:
        """Handle everything that has arrived; with `wait`, sleep until something does."""
        inbox = self._link.inbox
        if wait and inbox.empty():
            try:
                self._handle(inbox.get(timeout=self._patience()))
            except queue.Empty:
                return
        while not inbox.empty():
            self._handle(inbox.get())

    def _patience(self) -> float:
        """Seconds that an idle engine may sleep before a deadline or a heartbeat wants it."""
        waits = self._departures or self._arrivals or self._service or self._loads
        return 0.05 if waits else HEARTBEAT_S

    def _handle(self, event: Event) -> None:
        match event:
            case Submit():
                self._batcher.add(submitted(event))
            case Expect():
                self._arrivals.expect(event)
            case Published():
                self._arrivals.published(event, time.monotonic())
            case CopyDone():
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
                self._departures.abort(ticket)
                self._arrivals.abort(ticket)
                self._batcher.abort(ticket)
            case MapPeer() | ReleasePeer():
                self._map_peer(event)
            case Inspect() | ReportIndex() | Calibrate():
                self._answer(event)
            case ResetPrefixCache():
                self._pool.reset()
                if self._store is not None:
                    self._store.clear()
            case Shutdown() | Hangup():
                self._stopping = True
            case Configure() | StartGroup() | KeepBlocks():
                raise AssertionError(f"not expected here: {event}")
            case _:
                assert_never(event)

    def _answer(self, question: Inspect | ReportIndex | Calibrate) -> None:
        """Tell the launcher what it wants to know of this worker."""
        match question:
            case Inspect(query):
                self._send(Inspection(query, self._books.stats(), self._books.audit()))
            case ReportIndex():
                self._feed.report()
            case Calibrate(query):
                self._send(Calibrated(query, *self._calibrate()))

    def _settle(self, message: Settle) -> None:
        if self._departures.settle(message.ticket, accepted=message.accepted):
            return
        if message.accepted:  # withdrawn here, but the decode instance was first
            self._batcher.abort(message.ticket)
        else:  # declined before its prefill has ended
            self._batcher.keep(message.ticket)

    def _absorb(self, slices: list[Slice], sampled: list[Sampled]) -> None:
        """Record what a step computed, in the order of its slices, and send its tokens."""
        events: list[TokenEvent] = []
        results = iter(sampled)
        prefilled: list[Sequence] = []
        self._books.count_step(slices)
        for part in slices:
            sequence = part.sequence
            if sequence.prefilling:
                prefilled.append(sequence)
            samples = part.samples
            sequence.num_computed += part.num_tokens
            if samples:
                events.append(self._append(sequence, next(results)))
        finished = {event.ticket for event in events if event.finish is not None}
        prefilled = [sequence for sequence in prefilled if sequence.ticket not in finished]
        for sequence in prefilled:
            self._batcher.share(sequence)
        if events:
            self._send(Tokens(events))
        now = time.monotonic()
        for sequence in prefilled:
            if sequence.decode_on is not None:
                self._departures.publish(sequence, now)

    def _append(self, sequence: Sequence, sampled: Sampled) -> TokenEvent:
        """Add a sampled token to its sequence and end the sequence if it was the last."""
        sequence.tokens.append(sampled.token)
        position = sequence.num_outputs - 1
        finish = sequence.finish_reason(self._eos_token_ids)
        if finish is not None:
            self._batcher.finish(sequence)
        return TokenEvent(
            ticket=sequence.ticket,
            position=position,
            token=sampled.token,
            finish=finish,
            logprob=sampled.logprob,
            top=sampled.top,
            num_cached_tokens=sequence.num_cached_tokens if position == 0 else 0,
        )

    def _calibrate(self) -> tuple[list[StepSample], list[CopySample]]:
        """Time some steps. Nothing else is served meanwhile, so only the launcher's start asks."""
        return calibrate(
            self._pool,
            self._runner.run,
            self._copy_within,
            max_tokens=self._config.max_num_batched_tokens,
            max_rows=self._config.max_num_seqs,
            max_len=self._config.max_model_len,
        )

    def audit(self) -> list[str]:
        """See `memserve.workers.books.Books.audit`."""
        return self._books.audit()

    def stats(self) -> EngineStats:
        """See `memserve.workers.books.Books.stats`."""
        return self._books.stats()
