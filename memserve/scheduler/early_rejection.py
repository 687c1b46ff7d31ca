"""Early rejection: who would miss an objective only for what others have sent is turned away at once.

Past saturation a queue grows until everyone in it waits for longer than the objective allows, and the
server works on nothing but misses (Mooncake, arXiv 2407.00079, has both name and idea). A request is
judged before it is placed, where it would find least in its way: its predicted time to the first token
against its allowance, which is the objective or, for a prompt that takes longer all by itself, that
time and `MARGIN` on top; and likewise the seconds between tokens with it in the batch, which are its
own and those of everyone there. That prompts don't hold up the batch for too long is the business of
`chunks`; here it is the batch itself that may be too large.

Contract: never turned away for its first token is a request that is predicted to keep that allowance,
nor any while some instance that takes prompts has none waiting; nor any at all while some instance
has nothing to do. Ahead of a request is what goes before it in the fair order, so one tenant's flood
does not turn away another. Predictions err, so the first to be turned away for their first token must
miss by the factor `MARGIN`; from then on everyone who is predicted to miss is, until the queue has
shrunk to the share `RELIEF` of the objective: with one bound alone, requests would be let in that all
wait for just a little too long. A batch has room for errors within the objective (`chunks.SHARE`),
since all who run in it would miss together.
"""

from collections.abc import Iterable
from typing import final

import numpy as np

from memserve.scheduler.chunks import SHARE
from memserve.scheduler.cost_policy import LeastDelay
from memserve.scheduler.interface import Late
from memserve.scheduler.loads import Loads, Ticket
from memserve.scheduler.policies import Question

MARGIN = 1.25
RELIEF = 0.5


@final
class EarlyRejection:
    """Judges requests by the cost model's predictions; remembers whether the server is overloaded."""

    def __init__(
        self, delays: LeastDelay, slo_ttft: float | None, slo_tpot: float | None = None
    ) -> None:
        """An objective that is None turns nobody away."""
        self._delays = delays
        self._slo_ttft = slo_ttft
        self._slo_tpot = slo_tpot
        self._overloaded = False

    def judge(
        self, question: Question, order: float, loads: Loads, tickets: Iterable[Ticket]
    ) -> Late | None:
        """The objective that a request would break, if it is to be turned away.

        `order` is its place in the fair order; `tickets` are all that run and wait.
        """
        late = None
        if self._slo_ttft is not None:
            late = self._late(question, order, loads, tickets, self._slo_ttft)
        if late is None and self._slo_tpot is not None:
            late = self._crowded(question, loads, self._slo_tpot)
        return late

    def _late(
        self, question: Question, order: float, loads: Loads, tickets: Iterable[Ticket], slo: float
    ) -> Late | None:
        """Whether its first token would come too late, and by how many seconds."""
        takes = self._delays.takes_prompts(loads)
        if not takes.any() or (loads.rows["num_queued"][takes] == 0).any():
            self._overloaded = False
            return None
        if float(self._delays.wait(question, loads)[takes].min()) < RELIEF * slo:
            self._overloaded = False
        ahead = loads.ahead(tickets, order)
        alone, behind = self._delays.first_token(question, loads, ahead)
        allowed = max(slo, MARGIN * float(np.min(alone[takes])))
        predicted = float(np.min(behind[takes]))
        if predicted > MARGIN * allowed:
            self._overloaded = True
        if not self._overloaded or predicted <= allowed:
            return None
        return Late("slo_ttft", predicted - allowed)

    def _crowded(self, question: Question, loads: Loads, slo: float) -> Late | None:
        """Whether the batch would be too large with it wherever it may decode."""
        takes = self._delays.takes_answers(loads)
        alone, beside, half = self._delays.pace(question, loads)
        allowed = np.maximum(SHARE * slo, MARGIN * alone)
        if not takes.any() or (beside <= allowed)[takes].any():
            return None
        return Late("slo_tpot", float(half[takes].min()))
