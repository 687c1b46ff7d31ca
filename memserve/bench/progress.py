"""The progress of a load on one line of a terminal; nothing where the stream is none."""

import time
from typing import TextIO

from memserve.bench.load import Record

BAR = 30
REFRESH_S = 0.1


class LoadProgress:
    """A bar of ended requests out of `total`, redrawn a few times a second."""

    def __init__(self, stream: TextIO, total: int) -> None:
        self._stream = stream
        self._total = total
        self._live = stream.isatty()
        self._begin = time.perf_counter()
        self._next = 0.0

    def __call__(self, record: Record) -> None:
        """Show how far the load has come."""
        now = time.perf_counter()
        done = len(record.outcomes) + record.num_skipped
        if not self._live or (now < self._next and done < self._total):
            return
        self._next = now + REFRESH_S
        filled = round(BAR * min(1.0, done / self._total))
        failed = sum(outcome.error is not None for outcome in record.outcomes)
        text = (
            f"\r{'█' * filled:░<{BAR}} {done}/{self._total} requests, "
            f"{record.num_running} running, {failed} failed, {now - self._begin:.0f} s"
        )
        self._stream.write(f"{text}  ")
        self._stream.flush()

    def close(self) -> None:
        """End the line, if one was begun."""
        if self._live and self._next:
            self._stream.write("\n")
            self._stream.flush()
