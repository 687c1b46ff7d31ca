"""One request of a simulated cluster on its way: who works on it, and what came of it so far."""

from dataclasses import dataclass

from memserve.scheduler.interface import Placement
from memserve.sim.dialogues import Dialogue, Request
from memserve.sim.groups import SimulatedGroup
from memserve.sim.instance import SimulatedInstance
from memserve.sim.outcome import Outcome


@dataclass(slots=True)
class Stream:
    """One request on its way."""

    ticket: int
    request: Request
    dialogue: Dialogue
    packed: bytes
    prefill: SimulatedInstance
    decode: SimulatedInstance
    placement: Placement
    owner: SimulatedInstance
    outcome: Outcome
    num_tokens: int = 0
    may_share: bool = True
    group: SimulatedGroup | None = None
