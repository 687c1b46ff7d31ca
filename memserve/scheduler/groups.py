"""Whether several instances should prefill a prompt together, how many, and which.

Candidates are, for each size, the least loaded instances; the same with one of them in front: where
the answer is best generated, or that which holds the longest prefix, or all that hold that together.
A group starts when its last rank is free, takes at each chunk as long as its slowest rank and what the
synchronisation costs, and delays whoever runs on any of its ranks. All sizes are judged at once, from
the mean share of a rank; what is chosen is judged again from the very slices.

Contract: costs are in the same seconds as those of `cost_policy`, which passes in what it knows of
every slot; so one instance and a group compare. Knows no tickets and sends nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

from memserve.parallel.work import GroupWork, group_work
from memserve.scheduler.cost import StepModel
from memserve.scheduler.group_cost import GroupModel
from memserve.scheduler.interface import Prediction, SchedulerConfig
from memserve.scheduler.loads import Loads
from memserve.scheduler.objectives import missed
from memserve.scheduler.policies import Choice, Floats, GroupChoice, Question

Slots = NDArray[np.int64]


@dataclass(slots=True, kw_only=True)
class Outlook:
    """What is known of each slot, in seconds."""

    speed: Floats
    """How much longer everything takes there than by the model."""
    step: Floats
    """A step that only decodes."""
    beside: Floats
    """What decoding adds to a prefill's step."""
    wait: Floats
    """Until a prompt sent now would begin."""
    cold: Floats
    """What the first step after idling takes longer."""
    there: Floats
    """Sequences that decode there while a prompt is computed."""
    rest: Floats
    """Tokens that each of those will still generate."""
    prefills: NDArray[np.bool_]
    here: Floats
    """Cost of decoding there what was prefilled there."""
    elsewhere: Floats
    """Cost of decoding there what was prefilled on others."""
    decode: Floats
    """Of both, the time until the answer is complete."""
    waking: Floats
    """Cost of one more busy instance to those who share the device; 0 if it is busy."""
    idle: Floats
    work_price: float
    arrivals: float
    """What a second of computing costs those still to come: `work_price` + `arrivals` * TTFT."""


@dataclass(slots=True)
class _Candidates:
    """Groups of the first so many slots of an order."""

    order: Slots
    sizes: NDArray[np.int64]
    cached: Floats
    """Tokens used in place, by size."""
    holder: Slots
    """Who holds them, by size; -1: they are spread."""
    cost: Floats
    leader: Slots
    decode: Slots
    """Where the answer is generated; the leader or an outsider."""


@final
class GroupChooser:
    """Judges groups by the models of steps and of synchronisation."""

    def __init__(self, config: SchedulerConfig, steps: StepModel, groups: GroupModel) -> None:
        self._config = config
        self._steps = steps
        self._groups = groups

    def required(self, question: Question, loads: Loads) -> bool:
        """Whether the prompt and its answer fit no instance alone, but perhaps a group."""
        if self._config.max_sp == 1:
            return False
        needed = len(question.ask.prompt) + question.ask.max_tokens
        return needed > float(loads.rows["capacity"].max(initial=0.0))

    def possible(self, question: Question, loads: Loads) -> bool:
        """Whether a group may be worth its while."""
        config, ask = self._config, question.ask
        if self.required(question, loads):
            return True
        if config.max_sp == 1 or len(loads) < 2:
            return False
        num_new = len(ask.prompt) - question.cached.max(initial=0.0)
        return ask.may_share and ask.num_choices == 1 and num_new >= config.sp_min_tokens

    def best(
        self, question: Question, loads: Loads, outlook: Outlook, *, below: float
    ) -> Choice | None:
        """The group of least cost, if that is less than `below` or nothing else is possible."""
        required = self.required(question, loads)
        below = np.inf if required else below
        found = [
            (float(candidates.cost[i]), candidates, int(i))
            for candidates in self._candidates(question, loads, outlook, required=required)
            for i in np.flatnonzero(candidates.cost < below)
        ]
        for _, candidates, i in sorted(found, key=lambda each: each[0]):
            choice = self._choice(question, loads, outlook, candidates, i)
            if choice is not None:
                return choice
        return None

    def work(self, num_cached: int, num_tokens: int, num_ranks: int) -> GroupWork:
        """What each rank computes in each chunk."""
        return group_work(
            num_cached,
            num_tokens,
            num_ranks=num_ranks,
            chunk_tokens=self._config.max_num_batched_tokens,
            block_size=self._config.block_size,
        )

    def seconds(self, work: GroupWork, speed: Floats, beside: Floats) -> float:
        """The time of a group's chunks, at these ranks' speeds, beside what they decode."""
        costs = self._steps.costs
        rows = costs.rows(work.num_tokens.astype(np.float64))
        shares = costs.step + rows + costs.prefill_pair * work.num_pairs
        shares = shares + costs.prefill_read * work.num_before
        longest = (shares * speed + beside).max(axis=1, initial=0.0)
        num_ranks = np.array(float(work.num_tokens.shape[1]))
        return float(self._groups.seconds(longest, num_ranks, costs.step).sum())

    # Candidates

    def _candidates(
        self, question: Question, loads: Loads, outlook: Outlook, *, required: bool
    ) -> Iterator[_Candidates]:
        slots = np.flatnonzero(outlook.prefills)
        if len(slots) < 2:
            return
        held = question.held - (0.0 if self._config.dram_in_place else question.slow)
        # For about half of a prefill a rank is busy, delays who decodes there, and is waited for.
        own = len(question.ask.prompt) * self._steps.costs.high_row / 2
        burden = outlook.wait + (1.0 + outlook.there) * own * outlook.speed
        order = slots[np.argsort(burden[slots], kind="stable")]
        reach = np.maximum.accumulate(held[order])
        # Of those with equally much, the first.
        who = order[np.argmax(held[order][None, :] >= reach[:, None], axis=1)]
        yield self._judged(question, loads, outlook, order, reach, who, required=required)
        leader = int(order[np.argmin((burden + outlook.here)[order])])
        if np.isfinite(outlook.here[leader]) and leader != order[0]:
            led = np.concatenate([[leader], order[order != leader]])
            reach = np.maximum.accumulate(held[led])
            who = led[np.argmax(held[led][None, :] >= reach[:, None], axis=1)]
            yield self._judged(question, loads, outlook, led, reach, who, required=required)
        best = int(slots[np.argmax(held[slots])])
        if held[best] > reach[1]:
            order = np.concatenate([[best], order[order != best]])
            reach, who = np.full(len(order), held[best]), np.full(len(order), best)
            yield self._judged(question, loads, outlook, order, reach, who, required=required)
        if question.spread is not None:
            yield from self._around(question, loads, outlook, order, required=required)

    def _around(
        self, question: Question, loads: Loads, outlook: Outlook, order: Slots, *, required: bool
    ) -> Iterator[_Candidates]:
        """Groups of all that a prefix is spread over, and others."""
        assert question.spread is not None
        owners = [loads.slot_by_instance.get(one, -1) for one in question.spread.instances]
        if not np.isin(owners, order).all():
            return
        order = np.concatenate([owners, order[~np.isin(order, owners)]])
        cached = len(question.spread.refs) * self._config.block_size
        reach, who = np.full(len(order), float(cached)), np.full(len(order), -1)
        judged = self._judged(
            question, loads, outlook, order, reach, who, required=required, however_short=True
        )
        judged.cost[judged.sizes < len(owners)] = np.inf
        yield judged

    def _judged(
        self,
        question: Question,
        loads: Loads,
        outlook: Outlook,
        order: Slots,
        reach: Floats,
        holder: Slots,
        *,
        required: bool,
        however_short: bool = False,
    ) -> _Candidates:
        """The costs of the groups of the first 2, 3, ... slots of an order."""
        size = self._config.block_size
        most = min(len(order), self._config.max_sp or len(order))
        num_tokens = len(question.ask.prompt)
        sizes = np.arange(2, most + 1)
        last = sizes - 1
        new = num_tokens - reach[last]
        num_blocks = np.ceil(new / size)
        num_chunks = np.ceil(
            num_blocks / np.maximum(1, sizes * self._config.max_num_batched_tokens // size)
        )
        costs = self._steps.costs
        rows = np.ceil(num_blocks / num_chunks / sizes) * size
        pairs = (new * reach[last] + new * (new + 1) / 2) / sizes / num_chunks
        # Each rank's two slices stand, in the mean, behind half of the new tokens.
        before = 2.0 * reach[last] + new
        share = costs.step + costs.rows(rows) + costs.prefill_pair * pairs
        share = share + costs.prefill_read * before
        pace = self._pace(loads, outlook, order)[last]
        speed, beside = _most(outlook.speed, order, last) * pace, _most(outlook.beside, order, last)
        step = self._groups.seconds(share * speed + beside, sizes.astype(float), costs.step)
        total = num_chunks * step
        ttft = _most(outlook.wait + outlook.cold, order, last) + total
        cost = ttft + self._harm(outlook, order, sizes, total, num_chunks)
        price = outlook.work_price + outlook.arrivals * ttft
        cost = cost + sizes * num_chunks * (step - beside) * price
        cost = cost + np.cumsum(outlook.waking[order])[last]
        if (slo := self._config.slo_ttft) is not None:
            cost = cost + missed(ttft, slo)
        leader, decode, decoding = _decoding(outlook, order, last, required=required)
        cost = cost + decoding
        if not required and not however_short:
            enough = (new >= self._config.sp_min_tokens) & (num_blocks >= 2 * sizes)
            cost = np.where(enough, cost, np.inf)
        return _Candidates(order, sizes, reach[last], holder[last], cost, leader, decode)

    def _pace(self, loads: Loads, outlook: Outlook, order: Slots) -> Floats:
        """By the number of ranks, how much slower than now it is when all of them compute."""
        busy = loads.num_busy + np.cumsum(outlook.idle[order])
        slowdown = 1.0 + self._steps.contention * np.maximum(0.0, busy - 1.0)
        pace: Floats = slowdown / slowdown[0]
        return pace

    def _harm(
        self, outlook: Outlook, order: Slots, sizes: Slots, total: Floats, num_chunks: Floats
    ) -> Floats:
        """Seconds that those who decode on any of the ranks are delayed."""
        delay = np.maximum(0.0, total[:, None] - num_chunks[:, None] * outlook.step[order])
        share = np.minimum(1.0, outlook.rest[order] / num_chunks[:, None])
        ranks = np.arange(len(order)) < sizes[:, None]
        harm: Floats = np.where(ranks, outlook.there[order] * delay * share, 0.0).sum(axis=1)
        return harm

    # The chosen one

    def _choice(
        self,
        question: Question,
        loads: Loads,
        outlook: Outlook,
        candidates: _Candidates,
        i: int,
    ) -> Choice | None:
        """The placement of candidate `i`; None if it has no room, by the exact slices."""
        size, leader = int(candidates.sizes[i]), int(candidates.leader[i])
        ranks = [int(slot) for slot in candidates.order[:size]]
        ranks.remove(leader)
        ranks.insert(0, leader)
        cached, holder = int(candidates.cached[i]), int(candidates.holder[i])
        ask, decode = question.ask, int(candidates.decode[i])
        work = self.work(cached, len(ask.prompt), size)
        answer = ask.max_tokens if decode == leader else 1
        if not self._has_room(loads, ranks, work, cached, holder, answer):
            return None
        pace = float(self._pace(loads, outlook, candidates.order)[size - 1])
        total = self.seconds(work, outlook.speed[ranks] * pace, outlook.beside[ranks])
        ttft = float((outlook.wait + outlook.cold)[ranks].max()) + total
        return Choice(
            leader,
            decode,
            prediction=Prediction(ttft, ttft + float(outlook.decode[decode]), total),
            group=GroupChoice(ranks, cached, holder if holder >= 0 else None),
        )

    def _has_room(
        self,
        loads: Loads,
        ranks: list[int],
        work: GroupWork,
        cached: int,
        holder: int,
        max_tokens: int,
    ) -> bool:
        """Whether every rank's arena could hold its part, the leader's the answer too."""
        size = self._config.block_size
        blocks = work.num_blocks.sum(axis=0) * size
        blocks[0] += -(-max_tokens // size) * size
        if holder in ranks:
            blocks[ranks.index(holder)] += cached
        elif holder < 0:
            blocks += -(-cached // len(ranks))
        return bool((blocks <= loads.rows["capacity"][ranks]).all())


def _most(values: Floats, order: Slots, last: Slots) -> Floats:
    """The largest of the first so many of an order."""
    largest: Floats = np.maximum.accumulate(values[order])[last]
    return largest


def _decoding(
    outlook: Outlook, order: Slots, last: Slots, *, required: bool
) -> tuple[Slots, Slots, Floats]:
    """For each size who leads, who decodes, and what that costs.

    What fits no arena is decoded by its leader, whatever that one's role is.
    """
    here, others = outlook.here[order], outlook.elsewhere.copy()
    others[order] = np.inf
    if required:
        here, others = np.where(np.isfinite(here), here, outlook.decode[order]), others + np.inf
    best_here = np.minimum.accumulate(here)
    leaders = np.array([int(np.argmin(here[: n + 1])) for n in last])
    # Whoever is no rank may take it over: those of no order, and the rest of this one.
    outsider = int(np.argmin(others))
    rest = np.append(outlook.elsewhere[order], np.inf)
    taking = np.array([n + 1 + int(np.argmin(rest[n + 1 :])) for n in last])
    handed = np.full(len(last), np.inf) if required else np.minimum(rest[taking], others[outsider])
    inside = order[np.minimum(taking, len(order) - 1)]
    elsewhere = np.where(rest[taking] <= others[outsider], inside, outsider)
    colocated = best_here[last] <= handed
    leader = order[leaders]
    return (
        leader,
        np.where(colocated, leader, elsewhere),
        np.where(colocated, best_here[last], handed),
    )
