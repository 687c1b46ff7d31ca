"""Heartbeats: the engine loop's own sign of life, about one a second.

Contract: only the thread that runs the engine sends them, between steps and, within a step, between
layers. So a worker that is stopped or stuck falls silent, and one that computes a long step does not:
the launcher needs no guess of how long a step may take. Knows nothing of what is computed.
"""

import time
from collections.abc import Callable
from typing import final

import msgspec

from memserve.messages import Heartbeat
from memserve.model.step import LayerWritten
from memserve.stats import EngineStats
from memserve.workers.samples import Samples

HEARTBEAT_S = 1.0


@final
class Pulse:
    """Sends a heartbeat whenever one is due."""

    def __init__(
        self,
        send: Callable[[msgspec.Struct], None],
        stats: Callable[[], EngineStats],
        samples: Samples,
        sign: Callable[[], None] | None = None,
    ) -> None:
        """`sign`: give peers a sign of life, at every beat."""
        self._send = send
        self._sign = sign
        self._stats = stats
        self._samples = samples
        self._next = 0.0

    def beat(self) -> None:
        """The engine is alive."""
        if self._sign is not None:
            self._sign()
        now = time.monotonic()
        if now >= self._next:
            self._next = now + HEARTBEAT_S
            steps, copies = self._samples.take()
            self._send(Heartbeat(self._stats(), steps, copies))

    def written(self, num_layers: int) -> None:  # noqa: ARG002
        """A step has got one layer further."""
        self.beat()

    def after(self, *others: LayerWritten) -> LayerWritten:
        """Tell others of each layer first, in this order."""

        def tell(num_layers: int) -> None:
            for written in others:
                written(num_layers)
            self.beat()

        return tell
