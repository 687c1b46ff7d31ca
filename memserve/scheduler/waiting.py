"""What runs and waits on each instance, in seconds, and how long a prompt waits for it there.

Groups and other prompts take turns on every rank: a group's chunk, then one step of others
(`memserve.workers.turns`). So a prompt meets one chunk of a group for each of its own steps and of
those before it, and a group one step of others for each of its chunks, as far as there are any.

Vectors over the slots of `Loads`, as everywhere in the cost policy. Knows what has been dispatched, not
what is still to come.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memserve.scheduler.chunks import chunk_tokens, token_seconds
from memserve.scheduler.cost import StepCosts, StepModel
from memserve.scheduler.interface import Ask, SchedulerConfig
from memserve.scheduler.layout_model import expected_pressure
from memserve.scheduler.loads import Loads
from memserve.scheduler.policies import Floats


@dataclass(slots=True)
class State:
    """What runs and waits on each slot now; everything in seconds, at the pace of now."""

    speed: Floats
    """How much longer everything takes there than by the model."""
    chunk: Floats
    """Prompt tokens in a step beside those that decode."""
    token: Floats
    """What each of these takes; 0 without an objective that depends on it."""
    idle: NDArray[np.bool_]
    batch: Floats
    step: Floats
    """A step that only decodes."""
    beside: Floats
    """What decoding adds to a prefill's step."""
    rest: Floats
    """Tokens that a sequence there will still generate, in the mean."""
    queue: Floats
    """The queued prefills alone, without those of groups."""
    queue_steps: Floats
    fading: Floats
    """What is left of the memory of past prefills."""
    pressure: Floats
    """The share of time that prefills will take."""
    any_group: bool
    """Whether a group computes anywhere."""
    group: Floats
    """What groups compute there."""
    group_steps: Floats

    def between(self, first: Floats, steps: Floats) -> Floats:
        """The chunks of groups that come before so many steps, after `first` others."""
        chunk = self.group / np.maximum(self.group_steps, 1.0)
        seconds: Floats = np.clip(self.group_steps - first, 0.0, steps) * chunk
        return seconds


def state_of(
    loads: Loads, steps: StepModel, config: SchedulerConfig, num_tokens: int, now: float
) -> State:
    """The load as it is, to one who comes with a prompt of `num_tokens`."""
    rows, costs = loads.rows, steps.costs
    batch = rows["num_decoding"]
    idle = rows["num_queued"] + batch == 0
    speed = rows["scale"] * steps.slowdown(len(rows) - int(np.count_nonzero(idle)))
    sequences = np.maximum(batch + rows["num_incoming"], 1.0)
    context = rows["context"] * batch / sequences
    fading = loads.fading(now)
    pressure = expected_pressure(loads, fading)
    chunk, token = np.full(len(rows), float(config.max_num_batched_tokens)), np.zeros(len(rows))
    if (slo := config.slo_tpot) is not None:
        taken = pressure / loads.memory(now)
        chunk, token = _chunks(rows, costs, config, slo, speed, taken, num_tokens)
    queue, queue_steps = costs.prefill(
        rows["queued_tokens"], rows["queued_pairs"], rows["queued_read"], chunk
    )
    beside = costs.beside(batch, context) * speed
    return State(
        speed=speed,
        chunk=chunk,
        token=token,
        idle=idle,
        batch=batch,
        step=costs.decoding(batch, context) * speed,
        beside=beside,
        rest=rows["remaining"] / sequences,
        queue=queue * speed,
        queue_steps=queue_steps,
        fading=fading,
        pressure=pressure,
        any_group=bool(np.count_nonzero(rows["num_groups"])),
        group=rows["group_seconds"] * speed + rows["group_steps"] * beside,
        group_steps=rows["group_steps"],
    )


def _chunks(
    rows: NDArray[np.void],
    costs: StepCosts,
    config: SchedulerConfig,
    objective: float,
    speed: Floats,
    taken: Floats,
    num_tokens: int,
) -> tuple[Floats, Floats]:
    """Prompt tokens in a step that keeps the objective, and the seconds of each.

    Prefills have `taken` this share of the time of late; a prompt of `num_tokens` is to come, and all
    that are queued for these slots decode by the time it is computed.
    """
    sequences = np.maximum(rows["num_decoding"] + rows["num_incoming"], 1.0)
    there = rows["num_decoding"] + np.minimum(rows["num_incoming"], rows["num_queued"])
    length, most = rows["context"] / sequences, config.max_num_batched_tokens
    decoding = costs.decoding(there, length * there) * speed
    alone = costs.decoding(np.ones(len(rows)), length) * speed
    token = token_seconds(costs, there, most, num_tokens) * speed
    # What is queued already takes its part of the time in which the answers there are generated.
    queued = (rows["queued_tokens"] + num_tokens) * token
    soon = queued / np.maximum(queued, decoding * rows["remaining"] / sequences)
    share = np.maximum(soon, taken)
    return chunk_tokens(most, objective, alone, decoding, token, share), token


def behind(queued: Floats, loads: Loads, state: State, now: float) -> Floats:
    """Seconds until `queued` prompts, the queue of `state`, are computed; no group's among them."""
    seconds = state.queue + state.queue_steps * state.beside
    if not state.any_group:
        done = _done(queued, seconds, loads, now)
        # Even an idle queue waits for the step that runs.
        return np.where(queued > 0, seconds - done, state.step / 2)
    seconds = seconds + state.between(np.zeros(len(queued)), state.queue_steps)
    # After the last of them the group has its turn; of one under way half is to come.
    turn = state.between(state.queue_steps, np.where(queued > 0, 1.0, 0.5))
    following = np.where(queued + state.group_steps > 0, turn, state.step / 2)
    waiting: Floats = seconds - _done(queued, seconds, loads, now) + following
    return waiting


def until_groups_end(loads: Loads, state: State, now: float) -> tuple[Floats, Floats]:
    """Seconds until the groups there are computed, and the steps of others that this takes."""
    passing = np.minimum(state.group_steps, state.queue_steps)
    step = state.queue / np.maximum(state.queue_steps, 1.0) + state.beside
    seconds = state.group + passing * step
    num_groups = loads.rows["num_groups"]
    done = _done(num_groups, seconds, loads, now)
    return np.where(num_groups > 0, seconds - done, state.step / 2), passing


def _done(number: Floats, seconds: Floats, loads: Loads, now: float) -> Floats:
    """What of this is probably over already, if it takes so long for so many prompts."""
    elapsed = np.maximum(0.0, now - loads.rows["since"])
    done: Floats = np.minimum(elapsed, 0.9 * seconds / np.maximum(number, 1.0))
    return done


def for_room(ask: Ask, ahead: Floats, max_num_seqs: int, loads: Loads, state: State) -> Floats:
    """Seconds until so many sequences have ended that one more behind `ahead` may run."""
    rows = loads.rows
    known = np.maximum(rows["num_decoding"] + rows["num_incoming"], 1.0)
    others = rows["num_decoding"] + np.minimum(ahead, rows["num_incoming"])
    length = rows["context"] / known
    own = ask.num_choices * float(len(ask.prompt))
    many = others + ask.num_choices - max_num_seqs
    long = (length * others + own - rows["capacity"]) / np.maximum(length, 1.0)
    ending = np.maximum(0.0, np.maximum(many, long)) / np.maximum(state.batch, 1.0)
    waiting: Floats = ending * state.step * state.rest
    return waiting
