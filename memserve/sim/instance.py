"""One simulated instance: the engine's loop over virtual time.

A step computes what the batcher says and takes what the profile says. Messages are looked at between
steps, as in `memserve.workers.engine`. Steps in which the same sequences decode are one event; whatever
arrives meanwhile ends that run at the step under way.

Contract: the cluster hears of index events before the tokens of the step that caused them, and of every
ticket's tokens in order.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from typing import Protocol

import msgspec
import numpy as np

from memserve.messages import CopySample, StepSample
from memserve.pool.events import IndexEvent
from memserve.scheduler.cost import num_pairs
from memserve.sim.batching import Batcher, Slice
from memserve.sim.cache import BlockCache
from memserve.sim.clock import Clock
from memserve.sim.copying import CopyThread
from memserve.sim.costs import Floats, Profile
from memserve.sim.groups import SimulatedGroup
from memserve.sim.handover import Arrivals, Departures
from memserve.sim.sequence import Sequence
from memserve.sim.steps import Run, Work, calibration_copies, calibration_steps

HEARTBEAT_S = 1.0
MAX_RUN = 512  # decode steps in one event
MAX_SHARED_RUN = 4  # the same where others on the device change the steps' time
MAX_SAMPLES = 64  # steps told with one heartbeat


class Outlet(Protocol):
    """What instances tell; the simulated cluster."""

    def indexed(self, instance: int, events: list[IndexEvent]) -> None:
        """The index has changed."""

    def token(self, instance: int, sequence: Sequence, time: float, *, last: bool) -> None:
        """A token was sampled at `time`, which may have passed."""

    def published(self, ticket: int, num_blocks: int, *, complete: bool) -> None:
        """So many blocks of a prompt can be pulled."""

    def pulled(self, ticket: int) -> None:
        """The decode instance holds the prompt."""

    def declined(self, ticket: int) -> None:
        """The decode instance has no room."""

    def withdrawn(self, ticket: int) -> None:
        """The prefill instance needed its blocks back."""

    def beat(self, instance: int, steps: list[StepSample], copies: list[CopySample]) -> None:
        """What a heartbeat tells."""

    def num_busy_beside(self, instance: int) -> int:
        """Other instances on the same device that compute now."""
        ...


class SimulatedInstance:
    """One worker."""

    def __init__(
        self,
        number: int,
        profile: Profile,
        clock: Clock,
        outlet: Outlet,
        *,
        block_size: int,
        seed: int,
        handover_timeout: float,
    ) -> None:
        self.number = number
        self.work = Work()
        self.num_blocks = (
            profile.kv_cache_tokens // block_size,
            profile.dram_cache_tokens // block_size,
        )
        self.cache = BlockCache(number, block_size, *self.num_blocks)
        self.block_bytes = profile.kv_bytes_per_token * block_size
        self.copies = CopyThread(clock, profile, self.block_bytes)
        self.batcher = Batcher(
            self.cache,
            max_num_seqs=profile.max_num_seqs,
            max_num_batched_tokens=profile.max_num_batched_tokens,
            load=self._load,
        )
        self.arrivals = Arrivals(
            self.cache,
            self.batcher,
            self.copies,
            self.deliver,
            max_num_seqs=profile.max_num_seqs,
            timeout=handover_timeout,
            pulled=outlet.pulled,
            declined=outlet.declined,
        )
        self.departures = Departures(
            self.batcher,
            block_size=block_size,
            published=lambda ticket, end, done: outlet.published(ticket, end, complete=done),
            withdrawn=outlet.withdrawn,
        )
        self.groups: list[SimulatedGroup] = []
        """Those that it is a rank of and that have started, in that order."""
        self.held: list[Sequence] = []
        """Stand for the blocks that it holds as a rank."""
        self._profile = profile
        self._timeout = handover_timeout
        self._clock = clock
        self._outlet = outlet
        self._random = np.random.default_rng([seed, number])
        self._inbox: list[Callable[[], None]] = []
        self._run: Run | None = None
        self._handling = False
        self._num_swapped = 0
        self._samples: list[StepSample] = []
        self._next_heartbeat = HEARTBEAT_S

    @property
    def busy(self) -> bool:
        """Whether a step is under way."""
        return self._run is not None

    def deliver(self, message: Callable[[], None]) -> None:
        """Act on a message now or, if a step is under way, when that ends."""
        self._inbox.append(message)
        if self._run is not None:
            self._cut(self._run)
        elif not self._handling:
            self._go_on()

    def publish(self, ticket: int, num_blocks: int, *, complete: bool) -> None:
        """A message: blocks of an expected prompt can be pulled."""
        now = self._clock.now
        if self.arrivals.published(ticket, num_blocks, complete=complete, now=now):
            self._clock.at(now + self._timeout, lambda: self.deliver(lambda: None))

    def sync(self) -> None:
        """Tell the tokens of all steps that have ended by now."""
        run = self._run
        if run is not None and not run.prefills:
            self._tell_decoded(run, bisect_right(run.ends, self._clock.now, hi=len(run.ends) - 1))

    def calibrate(self) -> None:
        """Tell how long a few steps and copies take on an idle instance, as workers do at start."""
        steps = calibration_steps(self._profile, lambda: float(self._factor(1)[0]))
        self._outlet.beat(self.number, steps, calibration_copies(self._profile, self.block_bytes))

    # The loop

    def _go_on(self) -> None:
        """Handle what has arrived, and start the next step if there is anything to compute."""
        self._handling = True
        while self._inbox:
            inbox, self._inbox = self._inbox, []
            for message in inbox:
                message()
        self.arrivals.expire(self._clock.now)
        self.arrivals.reserve()
        group = self.groups[0] if self.groups else None
        passing = group is None or group.gives_way(self.number)
        slices = self.batcher.schedule(prefill=passing)
        self._handling = False
        waits = False
        if group is not None and group in self.groups:
            if passing and any(sequence.prefilling for sequence, _ in slices):
                group.give_way(self.number)
            else:
                waits = group.meet(self)
        self._charge_swaps()
        self._tell_index()
        if slices and not waits:
            self._run = self._started(slices)
            self._end_at(self._run)

    def _started(self, slices: list[Slice]) -> Run:
        """The next step; if it only decodes, as many like it as nothing else is to be done."""
        prefills = [(s, n) for s, n in slices if s.prefilling]
        num_decodes = len(slices) - len(prefills)
        decode_pairs = sum(s.num_computed + 1 for s, _ in slices if s.num_pending == 1)
        decode_pairs -= sum(s.num_computed + 1 for s, _ in prefills if s.num_pending == 1)
        num_prefill = sum(num for _, num in prefills)
        pairs = sum(num_pairs(num, s.num_computed) for s, num in prefills)
        context = sum(s.num_computed for s, _ in prefills)
        now = self._clock.now
        if prefills:
            seconds = self._profile.step_seconds(num_prefill, pairs, num_decodes, decode_pairs)
            ends = [now + seconds * float(self._factor(1)[0])]
        else:
            num_steps = self._num_alike(slices)
            times = self._profile.decode_seconds(num_decodes, decode_pairs, num_steps)
            ends = [float(end) for end in now + np.cumsum(times * self._factor(num_steps))]
        sample = StepSample(
            num_prefill,
            pairs,
            num_decodes,
            decode_pairs,
            ends[0] - now,
            num_prefill_context=context,
        )
        return Run(slices, now, ends, sample, prefills=bool(prefills))

    # Groups

    def share(self, num_tokens: int, num_pairs: int) -> Run:
        """A step with this share of a group's chunk, and with all that decodes here."""
        slices = self.batcher.schedule(prefill=False)
        pairs = sum(sequence.num_computed + 1 for sequence, _ in slices)
        seconds = self._profile.step_seconds(num_tokens, num_pairs, len(slices), pairs)
        now = self._clock.now
        end = now + seconds * float(self._factor(1)[0])
        sample = StepSample(num_tokens, num_pairs, len(slices), pairs, end - now)
        return Run(slices, now, [end], sample, prefills=True)

    def begin_share(self, run: Run, seconds: float, num_ranks: int) -> None:
        """Begin such a step; the group knows when it ends."""
        run.ends = [run.start + seconds]
        run.sample = msgspec.structs.replace(run.sample, seconds=seconds, num_ranks=num_ranks)
        self._run = run
        self.work.num_prefill_tokens += run.sample.num_prefill_tokens

    def end_share(self) -> None:
        """Record it; what comes of its tokens waits in the inbox until `go_on`."""
        run = self._run
        assert run is not None
        self._record(run)
        self._handling = True
        self._run = None
        self._absorb(run)

    def go_on(self) -> None:
        """Go on after such a step."""
        self._beat()
        self._go_on()

    def first_token(self, sequence: Sequence) -> None:
        """A group's prompt is computed, and this instance leads: sample, and go on with it."""
        sequence.num_outputs += 1
        self.batcher.run(sequence)
        last = sequence.num_outputs >= sequence.max_outputs
        if last:
            self.batcher.finish(sequence)
        else:
            self.batcher.share(sequence)
        self._tell_index()
        self._outlet.token(self.number, sequence, self._clock.now, last=last)
        if not last and sequence.decode_on is not None:
            self.departures.publish(sequence)

    def _record(self, run: Run) -> None:
        self.work.num_steps += len(run.ends)
        self.work.busy += run.ends[-1] - run.start
        if len(self._samples) < MAX_SAMPLES:
            self._samples.append(run.sample)

    def _num_alike(self, slices: list[Slice]) -> int:
        """How many steps may follow each other in which exactly these sequences decode."""
        if len(slices) < len(self.batcher.running):
            return 1  # somebody sits this step out for want of room
        longest = MAX_SHARED_RUN if self._profile.contention else MAX_RUN
        num_left = min(sequence.max_outputs - sequence.num_outputs for sequence, _ in slices)
        return self.batcher.reserve_steps(min(num_left, longest))

    def _factor(self, num_steps: int) -> Floats:
        """What noise and others on the device make of a step's time."""
        factor = np.ones(num_steps)
        if self._profile.noise:
            factor = np.exp(self._random.normal(0.0, self._profile.noise, num_steps))
        if self._profile.contention:
            beside = self._outlet.num_busy_beside(self.number)
            factor = factor * (1 + self._profile.contention * beside)
        return factor

    def _end_at(self, run: Run) -> None:
        time = run.ends[-1]
        self._clock.at(time, lambda: self._end(run, time))

    def _cut(self, run: Run) -> None:
        """Let a run end with the step under way."""
        last = bisect_left(run.ends, self._clock.now, hi=len(run.ends) - 1)
        if last < len(run.ends) - 1:
            del run.ends[last + 1 :]
            self._end_at(run)

    def _end(self, run: Run, time: float) -> None:
        """A run's last step has ended: record it, and go on."""
        if self._run is not run or run.ends[-1] != time:
            return  # it was cut and has ended before
        self._record(run)
        self._handling = True  # what comes of the tokens waits in the inbox
        self._run = None
        if run.prefills:
            self._absorb(run)
        else:
            self._tell_decoded(run, len(run.ends))
        self._beat()
        self._go_on()

    def _tell_decoded(self, run: Run, num_steps: int) -> None:
        """Record and tell the tokens of a run's first `num_steps` steps."""
        times = run.ends[run.num_told : num_steps]
        if not times:
            return
        run.num_told = num_steps
        self.work.num_decode_tokens += len(times) * len(run.slices)
        finished = set()
        for sequence, _ in run.slices:
            sequence.num_computed += len(times)
            sequence.num_outputs += len(times)
            if sequence.num_outputs >= sequence.max_outputs:
                finished.add(sequence.ticket)
                self.batcher.finish(sequence)
        self._tell_index()
        for time in times:
            for sequence, _ in run.slices:
                last = time is times[-1] and sequence.ticket in finished
                self._outlet.token(self.number, sequence, time, last=last)

    def _absorb(self, run: Run) -> None:
        """Record and tell a step with prompt chunks."""
        sampled, prefilled = [], []
        for sequence, num_tokens in run.slices:
            if num_tokens == sequence.num_pending:
                sampled.append(sequence)
            if sequence.prefilling:
                prefilled.append(sequence)
                self.work.num_prefill_tokens += num_tokens
            else:
                self.work.num_decode_tokens += 1
            sequence.num_computed += num_tokens
        finished = set()
        for sequence in sampled:
            sequence.num_outputs += 1
            if sequence.num_outputs >= sequence.max_outputs:
                finished.add(sequence.ticket)
                self.batcher.finish(sequence)
        going_on = [sequence for sequence in prefilled if sequence.ticket not in finished]
        for sequence in going_on:
            self.batcher.share(sequence)
        self._tell_index()
        for sequence in sampled:
            last = sequence.ticket in finished
            self._outlet.token(self.number, sequence, self._clock.now, last=last)
        for sequence in going_on:
            if sequence.decode_on is not None:
                self.departures.publish(sequence)

    def _load(self, sequence: Sequence, in_dram: list[int]) -> None:
        self.copies.swap(
            len(in_dram), lambda: self.deliver(lambda: self.batcher.loaded(sequence, in_dram))
        )

    def _charge_swaps(self) -> None:
        """Let the copy thread be busy with what has left HBM for DRAM."""
        num_new = self.cache.num_swapped_out - self._num_swapped
        if num_new:
            self._num_swapped += num_new
            self.copies.swap(num_new)

    def _tell_index(self) -> None:
        if self.cache.events:
            events, self.cache.events = self.cache.events, []
            self._outlet.indexed(self.number, events)

    def _beat(self) -> None:
        if self._clock.now >= self._next_heartbeat:
            self._next_heartbeat = self._clock.now + HEARTBEAT_S
            self._outlet.beat(self.number, self._samples, self.copies.samples)
            self._samples, self.copies.samples = [], []

    def audit(self) -> list[str]:
        """Recount every block; what is wrong, in words. Only for an instance without copies."""
        batcher = self.batcher
        held = [*batcher.running, *batcher.loading, *self.departures.sequences]
        held += self.arrivals.sequences
        held += self.held
        pins = [block for sequence in held for block in sequence.pinned]
        return self.cache.audit(sum(sequence.num_private for sequence in held), pins)
