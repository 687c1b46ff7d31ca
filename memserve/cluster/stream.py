"""One dispatched choice of a request, as the cluster keeps it."""

import asyncio
from dataclasses import dataclass, field

from memserve.cluster.instance import Instance
from memserve.errors import RequestError
from memserve.generation import ChoiceToken


@dataclass(slots=True, eq=False)
class Stream:
    """One dispatched choice: who works on it, and where its tokens go."""

    ticket: int
    choice: int
    num_uncached_tokens: int
    prefill: Instance
    decode: Instance
    outlet: "asyncio.Queue[ChoiceToken | RequestError]"
    owner: Instance
    """Whose tokens count; the prefill instance until the decode instance has pulled."""
    holders: set[int] = field(default_factory=set)
    """Instances that hold something for the ticket."""
    num_tokens: int = 0
