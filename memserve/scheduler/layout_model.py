"""Which split of the instances into prefill and decode would serve today's traffic best.

A request that is placed by its own delay and the harm it does never moves a balanced cluster: where
prompts come everywhere alike, no single answer gains by going elsewhere, though all would if some
instances had no prompts. So the split is found for the traffic as a whole, in its steady state: the
wait in a queue with several servers (Sakasegawa's approximation of M/G/c), a batch by Little's law,
and prompt chunks that hold up who decodes beside them.

`Split` marks who is to prefill; `expected_pressure` says how much prefilling each slot is to expect. It
binds nobody under the policy `cost`, which only expects it to happen: each request may still go
elsewhere. The roles that instances have follow the split (`planner`).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memserve.scheduler.cost import StepCosts
from memserve.scheduler.loads import PRESSURE_SECONDS, Loads

Floats = NDArray[np.float64]

INTERVAL = 0.5
"""Seconds between two looks at the traffic."""

ENTER, LEAVE = 0.95, 0.98
"""Instances specialise if that promises at most this share of the mean JCT of all mixed, and mix again
if it promises no less than that one."""

CHANGE = 0.97
"""The same for another split."""

NUM_ROUNDS = 40
"""Of the fixed point of batch and step time."""

MAX_BATCH = 1e4
MAX_PRESSURE = 0.9
OVERLOADED = 1e6


@dataclass(frozen=True, slots=True)
class Traffic:
    """What comes in, over all instances, of late."""

    rate: float
    """Prompts per second."""
    work: float
    """Seconds of prefilling per second."""
    residual: float
    """Seconds of prefill that one server for all of it would be found busy with."""
    answer: float
    """Tokens of an answer."""
    context: float
    """Tokens that a decoding sequence attends to."""
    cached: float
    """The share of prompt tokens that need no computing."""


def traffic(loads: Loads, now: float, slowdown: float) -> Traffic | None:
    """The traffic of the last seconds; None if there is next to none."""
    rows = loads.rows
    fading = loads.fading(now) / loads.memory(now)
    rate, answers = float((rows["rate"] * fading).sum()), float((rows["answers"] * fading).sum())
    sequences = float((rows["num_decoding"] + rows["num_incoming"]).sum())
    if rate * PRESSURE_SECONDS < len(rows) or sequences < 1.0:
        return None
    return Traffic(
        rate=rate,
        work=float((rows["pressure"] * fading).sum()) * slowdown,
        residual=float((rows["residual"] * fading).sum()) * slowdown**2,
        answer=answers / rate,
        context=float(rows["context"].sum()) / sequences,
        cached=float((rows["cached"] * fading).sum() / (rows["prompts"] * fading).sum()),
    )


def expected_jct(
    seen: Traffic,
    costs: StepCosts,
    num: int,
    *,
    slowdown: float,
    chunk: int,
    capacity: float,
    handover: float,
) -> Floats:
    """Mean JCTs, `[num]`: all mixed, then with 1, 2 … of the `num` instances for prefill alone.

    Where prompts or contexts (of `capacity` tokens an instance) would pile up, `OVERLOADED` or more:
    the more they would.
    """
    split = np.arange(num)
    mixed = split == 0
    prefills, decodes = np.where(mixed, num, split), num - split
    own = seen.work / seen.rate
    full = (costs.step + float(costs.rows(np.array(float(chunk))))) * slowdown
    chunk_seconds = min(own, full)
    chunk_rate = seen.work / prefills / chunk_seconds
    batch = np.ones(num)
    for _ in range(NUM_ROUNDS):
        context = batch * seen.context
        step = costs.decoding(np.maximum(batch, 1.0), context) * slowdown
        beside = np.where(mixed, costs.beside(batch, context) * slowdown, 0.0)
        busy = chunk_rate * (chunk_seconds + beside)
        # Each step with a chunk also gives everyone beside it a token.
        token = np.where(mixed, 1 / (np.maximum(1 - busy, 0.01) / step + chunk_rate), step)
        batch = np.minimum(MAX_BATCH, seen.rate / decodes * seen.answer * token)
    queue = np.minimum(busy, 0.99)
    # Who goes where its prefix lies doesn't choose the shortest queue.
    pooling = (1 - seen.cached) * (np.sqrt(2 * (prefills + 1)) - 2)
    wait = seen.residual / prefills / (1 - queue) * queue**pooling
    jct = wait + own * (1 + beside / chunk_seconds) + seen.answer * token
    jct += np.where(mixed, step / 2, handover)
    load = np.maximum(busy, batch * seen.context / capacity)
    return np.where(load >= 1.0, OVERLOADED * load, jct)


def expected_pressure(loads: Loads, fading: Floats) -> Floats:
    """The share of time that prefills will take on each slot, given what they took of late."""
    rows = loads.rows
    pressure: Floats = rows["pressure"] * fading
    num_special = np.count_nonzero(rows["special"])
    if num_special:
        pressure = np.where(rows["special"], pressure.sum() / num_special, 0.0)
    return np.minimum(MAX_PRESSURE, pressure)


def stall(loads: Loads, pressure: Floats) -> Floats:
    """What prefills add to the time of decoding, as a share, where they take such a part of it.

    They come to a slot that is for prefill whoever decodes there; others they avoid meanwhile.
    """
    if not np.count_nonzero(loads.rows["special"]):
        return pressure
    return np.where(loads.rows["special"], pressure / (1.0 - pressure), pressure)


class Split:
    """Finds how many instances are for prefill alone, and which; none: all are mixed.

    They are marked in the rows, as `special`.
    """

    def __init__(self) -> None:
        self._next = 0.0
        self.known = False
        """Whether there was any traffic to find a split for when it was last looked at."""

    def due(self, now: float) -> bool:
        """Whether it is time to look at the traffic again."""
        return now >= self._next

    def follow(
        self,
        loads: Loads,
        costs: StepCosts,
        now: float,
        *,
        slowdown: float,
        chunk: int,
        handover: float,
    ) -> None:
        """Look at the traffic again."""
        self._next = now + INTERVAL
        rows = loads.rows
        slots = np.flatnonzero(rows["serves"])
        seen = traffic(loads, now, slowdown)
        self.known = len(slots) > 1 and seen is not None
        if len(slots) < 2 or seen is None:
            rows["special"] = False
            return
        jct = expected_jct(
            seen,
            costs,
            len(slots),
            slowdown=slowdown,
            chunk=chunk,
            capacity=float(rows["capacity"][slots].min()),
            handover=handover,
        )
        special = rows["special"]
        before = int(np.count_nonzero(special))
        best = _choose(jct, min(before, len(slots) - 1))  # the others may have gone
        if best != before:
            # Who prefills already goes on to; then those with the most of it.
            order = np.lexsort((-rows["pressure"][slots], ~special[slots]))
            special[:] = False
            special[slots[order[:best]]] = True


def _choose(jct: Floats, before: int) -> int:
    """The number of instances for prefill alone, given the expected JCTs and the number till now."""
    best = int(np.argmin(jct))
    if jct[best] > (LEAVE if before else ENTER) * jct[0]:
        return 0
    return best if not before or jct[best] < CHANGE * jct[before] else before
