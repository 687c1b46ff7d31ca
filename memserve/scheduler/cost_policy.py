"""The default policy: the least predicted delay to this request and to everyone it meets, in seconds.

The cost of a placement is the request's predicted JCT (the wait behind queued prefills, its own
prefill, the handover, its decode steps beside the others') plus what it adds to those who run there
already, plus a weight for each SLO that would probably be missed. Eq. 1 of the paper is the first half
of the first term, Eq. 2 the choice between fetching a prefix and computing it.

All instances are judged at once, in vectors over the slots of `Loads`: prefill there, decode there,
both there. Of pairs only the two best of each side can win, since a pair's cost is a sum.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memserve.scheduler.cost import CopyModel, StepModel
from memserve.scheduler.groups import GroupChooser, Outlook
from memserve.scheduler.interface import Ask, FetchPolicy, Prediction, SchedulerConfig
from memserve.scheduler.layout_model import Split
from memserve.scheduler.lengths import OutputLengths
from memserve.scheduler.loads import Loads
from memserve.scheduler.objectives import missed
from memserve.scheduler.policies import Choice, Floats, Question
from memserve.scheduler.waiting import State, behind, for_room, state_of

MAX_PRESSURE = 0.9

WORK_PRICE = 0.1
"""Seconds of delay to requests still to come that a second of computing is worth."""


@dataclass(slots=True)
class _Prefill:
    """Prefilling on each slot: everything in seconds."""

    own: Floats
    ttft: Floats
    harm: Floats
    num_fetched: Floats
    source: NDArray[np.int64]


@dataclass(slots=True)
class _Decode:
    """Decoding on each slot."""

    own: Floats
    step: Floats
    """Seconds between tokens."""
    harm: Floats


class LeastDelay:
    """Places by predicted completion. With `elastic` roles are no bounds."""

    def __init__(
        self,
        config: SchedulerConfig,
        steps: StepModel,
        copies: CopyModel,
        lengths: OutputLengths,
        groups: GroupChooser,
    ) -> None:
        self._config = config
        # Policies that go by roles are judged here too, for their admission.
        self._elastic = config.elastic_roles and config.routing_policy == "cost"
        self._steps = steps
        self._copies = copies
        self._lengths = lengths
        self._split = Split()
        self._groups = groups

    def choose(self, question: Question, loads: Loads) -> Choice:
        """See `policies.Policy.choose`."""
        rows = loads.rows
        num_tokens = len(question.ask.prompt)
        length = self._lengths.remaining(0, question.ask.max_tokens)
        state = self._state(loads)
        if self._config.elastic_roles:
            self._follow(loads, question.now)
        prefill = self._prefill(question, loads, state)
        decode = self._decode(question.ask, length, loads, state)
        prefills = self.takes_prompts(loads)
        decodes = rows["serves" if self._elastic else "decodes"]
        if not prefills.any() or not decodes.any():
            raise LookupError("no instance serves this role")

        idle = (rows["num_queued"] + rows["num_decoding"] == 0).astype(float)
        waking = idle * self._waking(loads, length, decode)
        missing = np.maximum(0.0, num_tokens - question.kept)
        handover = self._handover(missing, rows["block_bytes"])
        at_prefill = prefill.ttft + prefill.harm + waking
        pressure = self._pressure(loads, question.now)
        later = decode.own * self._split.stall(loads, pressure)
        at_decode = decode.own + decode.harm + waking + handover + self._interference(state)
        at_decode += later + self._in_the_way(loads, question.now)
        both = prefill.ttft + prefill.harm + decode.own + decode.harm + waking + later
        both = np.where(prefills & decodes, both, np.inf)

        best = int(np.argmin(both))
        pair = self._best_pair(
            np.where(prefills, at_prefill, np.inf), np.where(decodes, at_decode, np.inf)
        )
        if np.isfinite(both[best]):
            best = loads.least(both, np.isfinite(both))
        if pair is None or both[best] <= at_prefill[pair[0]] + at_decode[pair[1]]:
            pair = (best, best)
        alone = self._choice(pair, prefill, decode, float(handover[pair[1]]))
        if not self._groups.possible(question, loads):
            return alone
        outlook = self._outlook(question, loads, state, prefills, waking)
        outlook.decode = decode.own
        outlook.here = np.where(decodes, decode.own + decode.harm + later, np.inf)
        outlook.elsewhere = np.where(decodes, at_decode, np.inf)
        cost = both[best] if pair[0] == pair[1] else at_prefill[pair[0]] + at_decode[pair[1]]
        return self._shared(question, loads, outlook, float(cost)) or alone

    def _shared(
        self, question: Question, loads: Loads, outlook: Outlook, cost: float
    ) -> Choice | None:
        """The best group, if it is better than the best placement on one or two instances."""
        group = self._groups.best(question, loads, outlook, below=cost)
        if group is None and self._groups.required(question, loads):
            raise LookupError("no group of instances has the room for it")
        return group

    def _outlook(
        self,
        question: Question,
        loads: Loads,
        state: State,
        prefills: NDArray[np.bool_],
        waking: Floats,
    ) -> Outlook:
        """What a group depends on."""
        rows, nothing = loads.rows, np.zeros(len(loads))
        idle = rows["num_queued"] + rows["num_decoding"] == 0
        work_price, arrivals = self._prices(loads, question.now)
        return Outlook(
            speed=state.speed,
            step=state.step,
            beside=state.beside,
            wait=self._wait(loads, state, question.now),
            cold=self._steps.costs.waking * state.speed * idle,
            there=state.batch + np.minimum(rows["num_incoming"], rows["num_queued"]),
            rest=state.rest,
            prefills=prefills,
            here=nothing,
            elsewhere=nothing,
            decode=nothing,
            waking=waking,
            idle=idle.astype(float),
            work_price=work_price,
            arrivals=arrivals,
        )

    def takes_prompts(self, loads: Loads) -> NDArray[np.bool_]:
        """Where prompts may be sent."""
        takes: NDArray[np.bool_] = loads.rows["serves" if self._elastic else "prefills"]
        return takes

    def _choice(
        self, pair: tuple[int, int], prefill: _Prefill, decode: _Decode, handover: float
    ) -> Choice:
        p, d = pair
        ttft = float(prefill.ttft[p])
        jct = ttft + float(decode.own[d]) + (handover if p != d else 0.0)
        source = int(prefill.source[p])
        return Choice(
            p,
            d,
            source if source >= 0 else None,
            int(prefill.num_fetched[p]),
            Prediction(ttft, jct, float(prefill.own[p])),
        )

    def _best_pair(self, left: Floats, right: Floats) -> tuple[int, int] | None:
        """Different slots with the least sum."""
        first = np.argsort(left, kind="stable")[:2]
        second = np.argsort(right, kind="stable")[:2]
        pairs = [(int(p), int(d)) for p in first for d in second if p != d]
        best = min(pairs, key=lambda pair: left[pair[0]] + right[pair[1]], default=None)
        if best is None or not np.isfinite(left[best[0]] + right[best[1]]):
            return None
        return best

    def _state(self, loads: Loads) -> State:
        return state_of(loads, self._steps, self._config.max_num_batched_tokens)

    # Prefill

    def _prefill(self, question: Question, loads: Loads, state: State) -> _Prefill:
        rows, costs, speed = loads.rows, self._steps.costs, state.speed
        num_tokens = len(question.ask.prompt)
        chunk = max(1, self._config.max_num_batched_tokens)
        cached = question.cached
        own, num_steps = costs.prefill(*_new(num_tokens, cached, chunk), chunk)
        own = own * speed + self._swap_in(question, rows["block_bytes"])
        waking = costs.waking * speed * (rows["num_queued"] + rows["num_decoding"] == 0)
        fetched, source = np.zeros(len(rows)), np.full(len(rows), -1)
        if self._config.fetch_policy != "never" and len(rows) > 1:
            longest, source = _longest_elsewhere(question.held)
            gain = np.maximum(0.0, longest - cached)
            block_size = self._config.block_size
            copying = self._copies.seconds(gain / block_size * rows["block_bytes"])
            reached = np.maximum(cached, longest)
            rest, rest_steps = costs.prefill(*_new(num_tokens, reached, chunk), chunk)
            with_fetch = rest * speed + copying
            fetching = (gain > 0) & wanted(self._config.fetch_policy, with_fetch, own)
            own = np.where(fetching, with_fetch, own)
            num_steps = np.where(fetching, rest_steps, num_steps)
            fetched = np.where(fetching, gain, 0.0)
            source = np.where(fetching, source, -1)

        own = own + waking
        ttft = self._wait(loads, state, question.now) + own + num_steps * state.beside
        # While the prompt is computed, others get their tokens at the pace of its chunks.
        delay = np.maximum(0.0, own + num_steps * (state.beside - state.step))
        # Who is computed before it here decodes here by then; who comes from elsewhere comes later.
        there = state.batch + np.minimum(rows["num_incoming"], rows["num_queued"])
        harm = there * delay * np.minimum(1.0, state.rest / np.maximum(num_steps, 1.0))
        harm = harm + own * self._later_arrivals(loads, question.now, ttft)
        if (slo := self._config.slo_ttft) is not None:
            harm = harm + missed(ttft, slo)
        return _Prefill(own, ttft, harm, fetched, source)

    def _later_arrivals(self, loads: Loads, now: float, ttft: Floats) -> Floats:
        """How many requests yet to come will wait for a prefill that ends after `ttft`."""
        work_price, arrivals = self._prices(loads, now)
        waiting: Floats = work_price + arrivals * ttft
        return waiting

    def _prices(self, loads: Loads, now: float) -> tuple[float, float]:
        """What a second of computing costs, and what it costs more for each second until it ends."""
        rate = float((loads.rows["rate"] * loads.fading(now)).mean())
        pressure = float(self._pressure(loads, now).mean())
        return WORK_PRICE, rate / (1.0 - pressure)

    def _in_the_way(self, loads: Loads, now: float) -> Floats:
        """Seconds of prefills that one who is handed over at some time finds on each slot.

        The mean wait of a queue with one server (Pollaczek and Khinchine). Who stays where it was
        prefilled comes right after its own prefill, when none has begun.
        """
        residual = loads.rows["residual"] * loads.fading(now)
        waiting: Floats = residual / (1.0 - self._pressure(loads, now))
        return waiting

    def _pressure(self, loads: Loads, now: float) -> Floats:
        """The share of time that prefills take on each slot, if they go on as of late.

        Decoding there takes longer by as much. It is also what makes slots specialise: where
        prompts go, answers are better not generated, and the other way round.
        """
        measured = loads.rows["pressure"] * loads.fading(now)
        pressure: Floats = np.minimum(MAX_PRESSURE, self._split.pressure(loads, measured))
        return pressure

    def _follow(self, loads: Loads, now: float) -> None:
        chunk = max(1, self._config.max_num_batched_tokens)
        self._split.follow(
            loads,
            self._steps.costs,
            now,
            slowdown=self._steps.slowdown(loads.num_busy) * float(loads.rows["scale"].mean()),
            chunk=chunk,
            handover=float(
                self._handover(np.array([float(chunk)]), loads.rows["block_bytes"]).max()
            ),
        )

    def wait(self, loads: Loads, now: float) -> Floats:
        """Seconds until a prompt that is sent now would begin to be computed."""
        return self._wait(loads, self._state(loads), now)

    def first_token(self, question: Question, loads: Loads, ahead: Floats) -> tuple[Floats, Floats]:
        """Seconds to a prompt's first token on each slot: with nobody there, and behind these.

        `ahead` is the queue before it, as `Loads.ahead` tells it.
        """
        state = self._state(loads)
        prefill = self._prefill(question, loads, state)
        computing = prefill.ttft - self._wait(loads, state, question.now)
        chunk = max(1, self._config.max_num_batched_tokens)
        queue, queue_steps = self._steps.costs.prefill(ahead[1], ahead[2], ahead[3], chunk)
        before = dataclasses.replace(state, queue=queue * state.speed, queue_steps=queue_steps)
        wait = behind(ahead[0], loads, before, question.now)
        room = for_room(question.ask, ahead[0], self._config.max_num_seqs, loads, state)
        return prefill.own, np.maximum(wait, room) + computing

    def _wait(self, loads: Loads, state: State, now: float) -> Floats:
        return behind(loads.rows["num_queued"], loads, state, now)

    def _swap_in(self, question: Question, block_bytes: Floats) -> Floats:
        """Seconds until the cached part that lies in slower memory is there."""
        slow = np.minimum(question.slow, question.cached) / self._config.block_size
        return self._copies.seconds(slow * block_bytes)

    # Decode

    def _decode(self, ask: Ask, length: float, loads: Loads, state: State) -> _Decode:
        rows, costs, speed, mean_rest = loads.rows, self._steps.costs, state.speed, state.rest
        others = rows["num_decoding"] + rows["num_incoming"]
        own_context = ask.num_choices * (len(ask.prompt) + length / 2)
        before = costs.decoding(others, rows["context"]) * speed
        after = costs.decoding(others + ask.num_choices, rows["context"] + own_context) * speed
        # Who shares a step with a shorter answer is slowed down only until that has ended.
        together = np.minimum(length, mean_rest)
        harm = others * (after - before) * together
        alone = costs.decoding(
            np.full(len(rows), float(ask.num_choices)), np.full(len(rows), own_context)
        )
        own = after * together + (length - together) * np.minimum(alone * speed, after)
        own = np.where(others > 0, own, after * length)
        full = np.maximum(
            others + ask.num_choices - self._config.max_num_seqs,
            (rows["context"] + own_context - rows["capacity"])
            / np.maximum(rows["context"] / np.maximum(others, 1.0), 1.0),
        )
        own = own + np.where(full > 0, full, 0.0) * before * mean_rest / np.maximum(others, 1.0)
        if (slo := self._config.slo_tpot) is not None:
            harm = harm + missed(after, slo) + others * (missed(after, slo) - missed(before, slo))
        return _Decode(own, after, harm)

    def crowding(self, loads: Loads) -> Floats:
        """Seconds that a sequence decoding there loses to the others, until it ends."""
        rows, costs = loads.rows, self._steps.costs
        batch = np.maximum(rows["num_decoding"] + rows["num_incoming"], 1.0)
        alone = costs.decoding(np.ones(len(rows)), rows["context"] / batch)
        longer = costs.decoding(batch, rows["context"]) - alone
        lost: Floats = longer * rows["remaining"] / batch
        lost *= rows["scale"] * self._steps.slowdown(loads.num_busy)
        return lost

    def _interference(self, state: State) -> Floats:
        """Seconds that prefills queued on each slot will keep its decoding sequences from a step."""
        shared = state.queue_steps * self._steps.costs.step * state.speed
        return np.maximum(0.0, state.queue - shared)

    def _handover(self, num_tokens: Floats, block_bytes: Floats) -> Floats:
        """Seconds from the first token to decoding elsewhere: most of the copy overlaps the prefill."""
        last = np.minimum(num_tokens, self._config.max_num_batched_tokens)
        return self._copies.latency + self._copies.seconds(
            last / self._config.block_size * block_bytes
        )

    def _waking(self, loads: Loads, length: float, decode: _Decode) -> float:
        """Seconds that one more busy instance costs those who share the device with it."""
        contention = self._steps.contention
        if not contention:
            return 0.0
        running = float(loads.rows["num_decoding"].sum() + loads.rows["num_queued"].sum())
        share = contention / self._steps.slowdown(loads.num_busy)
        return running * share * length * float(decode.step.min(initial=0.0))


def wanted(policy: FetchPolicy, with_fetch: Floats, without: Floats) -> NDArray[np.bool_]:
    """Eq. 2: whether fetching pays."""
    if policy == "always":
        return np.ones(len(without), dtype=np.bool_)
    return with_fetch <= without


def _new(num_tokens: int, cached: Floats, chunk: int) -> tuple[Floats, Floats, Floats]:
    """Tokens to compute, the pairs that they attend to, and what stands before their chunks."""
    new = num_tokens - cached
    steps = np.ceil(new / chunk)
    read = steps * (cached + (steps - 1.0) * (chunk / 2))
    return new, new * (cached + (new + 1) / 2), read


def _longest_elsewhere(held: Floats) -> tuple[Floats, NDArray[np.int64]]:
    """For each slot the most that another slot holds, and which."""
    best = int(np.argmax(held))
    others = held.copy()
    others[best] = -1.0
    second = int(np.argmax(others))
    slots = np.arange(len(held))
    source = np.where(slots == best, second, best)
    return held[source], source
