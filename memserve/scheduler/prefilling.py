"""What computing a prompt takes on each slot: alone, and after fetching what others hold of it.

The choice between the two is the paper's Eq. 2 (PAPER §4). Vectors over the slots of `Loads`, in
seconds; knows nothing of what waits and runs there.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memserve.scheduler.cost import CopyModel, Floats, StepCosts
from memserve.scheduler.interface import FetchPolicy, SchedulerConfig
from memserve.scheduler.loads import Loads
from memserve.scheduler.policies import Question
from memserve.scheduler.spread import SpreadPrefix


@dataclass(slots=True)
class Computing:
    """Computing a prompt on each slot."""

    seconds: Floats
    """With the copies before it."""
    num_steps: Floats
    num_fetched: Floats
    """Tokens."""
    holders: tuple[int, int]
    """Who has most to be fetched, and who has most of it for that one."""


def computing(
    question: Question,
    loads: Loads,
    config: SchedulerConfig,
    costs: StepCosts,
    copies: CopyModel,
    speed: Floats,
    chunk: Floats,
) -> Computing:
    """What a prompt takes in chunks of `chunk` tokens, where everything takes `speed` times as long."""
    block_bytes, size = loads.rows["block_bytes"], config.block_size
    num_tokens, cached = len(question.ask.prompt), question.cached
    own, num_steps = costs.prefill(*_new(num_tokens, cached, chunk), chunk)
    own = own * speed + _swap_in(question, block_bytes, size, copies)
    longest, holders = _longest_elsewhere(question.held)
    if question.spread is not None:
        longest = np.maximum(longest, _spread(question.spread, loads, size))
    fetched = np.maximum(0.0, longest - cached)
    if config.fetch_policy == "never" or not np.count_nonzero(fetched):
        return Computing(own, num_steps, np.zeros(len(loads)), holders)
    copying = copies.seconds(fetched / size * block_bytes)
    rest, rest_steps = costs.prefill(*_new(num_tokens, cached + fetched, chunk), chunk)
    with_fetch = rest * speed + copying
    fetching = (fetched > 0) & wanted(config.fetch_policy, with_fetch, own)
    return Computing(
        np.where(fetching, with_fetch, own),
        np.where(fetching, rest_steps, num_steps),
        np.where(fetching, fetched, 0.0),
        holders,
    )


def wanted(policy: FetchPolicy, with_fetch: Floats, without: Floats) -> NDArray[np.bool_]:
    """Eq. 2: whether fetching pays."""
    if policy == "always":
        return np.ones(len(without), dtype=np.bool_)
    return with_fetch <= without


def _new(num_tokens: int, cached: Floats, chunk: Floats) -> tuple[Floats, Floats, Floats]:
    """Tokens to compute, the pairs that they attend to, and what stands before their chunks."""
    new = num_tokens - cached
    steps = np.ceil(new / chunk)
    read = steps * (cached + (steps - 1.0) * (chunk / 2))
    return new, new * (cached + (new + 1) / 2), read


def _swap_in(question: Question, block_bytes: Floats, size: int, copies: CopyModel) -> Floats:
    """Seconds until the cached part that lies in slower memory is there."""
    if not np.count_nonzero(question.slow):
        return question.slow
    slow = np.minimum(question.slow, question.cached) / size
    return copies.seconds(slow * block_bytes)


def _spread(spread: SpreadPrefix, loads: Loads, size: int) -> Floats:
    """What each slot may fetch of a prefix from all who hold a part; not who is one of them."""
    owners = np.isin(loads.rows["instance"], list(spread.instances))
    return np.where(owners, 0.0, len(spread.refs) * size)


def _longest_elsewhere(held: Floats) -> tuple[Floats, tuple[int, int]]:
    """For each slot the most that another slot holds: who holds the most, and for that one who."""
    best = int(held.argmax())
    others = held.copy()
    others[best] = -1.0
    second = int(others.argmax())
    longest = np.full(len(held), held[best])
    longest[best] = others[second]
    return longest, (best, second)
