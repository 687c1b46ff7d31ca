"""What is to go wrong in one worker, where, and how often.

A *place* is a kind of copy (`handover`, `layer`, `fetch`, `pull`, `swap out`, `swap in`, `file read`,
`file write`) or a message by the name of its type: `to Abort` is one that the worker receives, the
ends of its own copies (`to CopyDone`) included, and `from Tokens` one that it sends.
"""

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from enum import StrEnum

import msgspec

from memserve.errors import OutOfBlocks, PoolError, StaleReference

LONGEST_HOLD_S = 60.0
ERRORS: dict[str, Callable[[], Exception]] = {
    "PoolError": lambda: PoolError("injected"),
    "StaleReference": lambda: StaleReference("injected"),
    "OutOfBlocks": lambda: OutOfBlocks("injected"),
    "OSError": lambda: OSError(5, "injected"),
    "MemoryError": lambda: MemoryError("injected"),
}


class Action(StrEnum):
    """What happens at a place."""

    HOLD = "hold"
    """A copy stops where it is, a message is kept back, until `Faults.release`."""
    DELAY = "delay"
    FAIL = "fail"
    """Raise `Fault.error`; copies only."""
    TEAR = "tear"
    """Of a copy half is done, in the middle of a block, and the rest is reported as not verified."""
    DROP = "drop"
    """Messages only, like the next two."""
    TWICE = "twice"
    LATER = "later"
    """After the next message of the same direction."""
    KILL = "kill"
    STOP = "stop"


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of accident."""

    at: str
    action: Action
    skip: int = 0
    """So many times it goes well before."""
    times: int = 1
    seconds: float = 0.0
    error: str = "PoolError"


class Faults:
    """The accidents of one worker; every thread of it may come by."""

    def __init__(self, signal_self: Callable[[int], None] | None = None) -> None:
        self._signal_self = signal_self or (lambda number: os.kill(os.getpid(), number))
        self._lock = threading.Condition()
        self._armed: list[Fault] = []
        self._num_passed: Counter[int] = Counter()
        self._gate = threading.Event()
        self._kept: list[Callable[[], None]] = []
        self.met: Counter[str] = Counter()
        """By place, how many faults have struck."""
        self.on_meeting: Callable[[str], None] = lambda _: None

    def arm(self, fault: Fault) -> None:
        """From now on this happens."""
        with self._lock:
            self._gate = threading.Event()
            self._armed.append(fault)

    def disarm(self) -> None:
        """Nothing more happens; what is held goes on."""
        with self._lock:
            self._armed.clear()
            self._num_passed.clear()
        self.release()

    def release(self) -> None:
        """Let everything go on that is held."""
        with self._lock:
            kept, self._kept = self._kept, []
            self._gate.set()
        for deliver in kept:
            deliver()

    def wait_for(self, place: str, times: int = 1) -> None:
        """Return when so many faults have struck there."""
        with self._lock:
            assert self._lock.wait_for(lambda: self.met[place] >= times, LONGEST_HOLD_S), place

    def meet(self, place: str) -> Fault | None:
        """Somebody comes by; the fault that strikes, of which he has to do what is left."""
        with self._lock:
            fault = self._strike(place)
            if fault is None:
                return None
            self.met[place] += 1
            gate = self._gate
            self._lock.notify_all()
        self.on_meeting(place)
        match fault.action:
            case Action.DELAY:
                time.sleep(fault.seconds)
            case Action.KILL:
                self._signal_self(signal.SIGKILL)
            case Action.STOP:
                self._signal_self(signal.SIGSTOP)
            case Action.HOLD if not place.startswith(("to ", "from ")):
                assert gate.wait(LONGEST_HOLD_S), f"nobody has released {place}"
            case Action.FAIL:
                raise ERRORS[fault.error]()
        return fault

    def keep(self, deliver: Callable[[], None]) -> None:
        """Call this at the next `release`."""
        with self._lock:
            self._kept.append(deliver)

    def _strike(self, place: str) -> Fault | None:
        struck = None
        for number, fault in enumerate(self._armed):
            if fault.at == place:
                self._num_passed[number] += 1
                if fault.skip < self._num_passed[number] <= fault.skip + fault.times:
                    struck = struck or fault
        return struck
