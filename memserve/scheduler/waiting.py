"""What runs and waits on each instance, in seconds, and how long a prompt waits for it there.

Vectors over the slots of `Loads`, as everywhere in the cost policy. Knows what has been dispatched, not
what is still to come.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memserve.scheduler.cost import StepModel
from memserve.scheduler.interface import Ask
from memserve.scheduler.layout_model import expected_pressure
from memserve.scheduler.loads import Loads
from memserve.scheduler.policies import Floats


@dataclass(slots=True)
class State:
    """What runs and waits on each slot now; everything in seconds, at the pace of now."""

    speed: Floats
    """How much longer everything takes there than by the model."""
    idle: NDArray[np.bool_]
    batch: Floats
    step: Floats
    """A step that only decodes."""
    beside: Floats
    """What decoding adds to a prefill's step."""
    rest: Floats
    """Tokens that a sequence there will still generate, in the mean."""
    queue: Floats
    """The queued prefills alone."""
    queue_steps: Floats
    fading: Floats
    """What is left of the memory of past prefills."""
    pressure: Floats
    """The share of time that prefills will take."""


def state_of(loads: Loads, steps: StepModel, chunk: int, now: float) -> State:
    """The load as it is; prompts are computed in chunks of so many tokens."""
    rows, costs = loads.rows, steps.costs
    batch = rows["num_decoding"]
    idle = rows["num_queued"] + batch == 0
    speed = rows["scale"] * steps.slowdown(len(rows) - int(np.count_nonzero(idle)))
    sequences = np.maximum(batch + rows["num_incoming"], 1.0)
    context = rows["context"] * batch / sequences
    queue, queue_steps = costs.prefill(
        rows["queued_tokens"], rows["queued_pairs"], rows["queued_read"], chunk
    )
    fading = loads.fading(now)
    return State(
        speed=speed,
        idle=idle,
        batch=batch,
        step=costs.decoding(batch, context) * speed,
        beside=costs.beside(batch, context) * speed,
        rest=rows["remaining"] / sequences,
        queue=queue * speed,
        queue_steps=queue_steps,
        fading=fading,
        pressure=expected_pressure(loads, fading),
    )


def behind(queued: Floats, loads: Loads, state: State, now: float) -> Floats:
    """Seconds until `queued` prompts, the queue of `state`, are computed."""
    seconds = state.queue + state.queue_steps * state.beside
    since = loads.rows["since"]
    done = np.minimum(np.maximum(0.0, now - since), 0.9 * seconds / np.maximum(queued, 1.0))
    # Even an idle queue waits for the step that runs.
    waiting: Floats = np.where(queued > 0, seconds - done, state.step / 2)
    return waiting


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
