"""Early rejection: who would miss the TTFT objective only for the queue is turned away at once.

Past saturation a queue grows until everyone in it waits for longer than the objective allows, and the
server works on nothing but misses (Mooncake, arXiv 2407.00079, has both name and idea). A request is
judged before it is placed: its predicted time to the first token, where that is least, against its
allowance, which is the objective or, for a prompt that takes longer all by itself, that time and
`MARGIN` on top.

Contract: never turned away is a request that is predicted to keep its allowance, nor any while some
instance that takes prompts has none waiting. Ahead of a request is what goes before it in the fair
order, so one tenant's flood does not turn away another. Predictions err, so the first to be turned
away must miss by the factor `MARGIN`; from then on everyone who is predicted to miss is, until the
queue has shrunk to the share `RELIEF` of the objective: with one bound alone, requests would be let in
that all wait for just a little too long.
"""

from collections.abc import Iterable
from typing import final

import numpy as np

from memserve.scheduler.cost_policy import LeastDelay
from memserve.scheduler.loads import Loads, Ticket
from memserve.scheduler.policies import Question

MARGIN = 1.25
RELIEF = 0.5


@final
class EarlyRejection:
    """Judges requests by the cost model's predictions; remembers whether the server is overloaded."""

    def __init__(self, delays: LeastDelay, slo_ttft: float) -> None:
        self._delays = delays
        self._slo_ttft = slo_ttft
        self._overloaded = False

    def judge(
        self, question: Question, order: float, loads: Loads, tickets: Iterable[Ticket]
    ) -> float | None:
        """Seconds by which a request would miss its allowance, if it is to be turned away.

        `order` is its place in the fair order; `tickets` are all that run and wait.
        """
        takes = self._delays.takes_prompts(loads)
        if not takes.any() or (loads.rows["num_queued"][takes] == 0).any():
            self._overloaded = False
            return None
        if float(self._delays.wait(loads, question.now)[takes].min()) < RELIEF * self._slo_ttft:
            self._overloaded = False
        ahead = loads.ahead(tickets, order)
        alone, behind = self._delays.first_token(question, loads, ahead)
        allowed = max(self._slo_ttft, MARGIN * float(np.min(alone[takes])))
        predicted = float(np.min(behind[takes]))
        if predicted > MARGIN * allowed:
            self._overloaded = True
        return predicted - allowed if self._overloaded and predicted > allowed else None
