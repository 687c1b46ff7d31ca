"""The ranks of a group go through a chunk layer by layer together: who has come how far.

Contract: every rank says how far it is in its own slot, and looks at the others'. All must have
said that they are ready for a chunk before one enters it, and after its K and V of a layer each
waits for theirs. One that takes its word back just when another enters keeps that one waiting,
nothing worse. Who waits looks at the clock and asks its caller, at least every `GLANCE_S`, whether
to go on. A rank that gives no sign of life for `patience` seconds is named in the error; one that
is busy is waited for.

Knows words and headers, neither blocks nor messages.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import final

from memserve.errors import GroupBroken
from memserve.pool.progress import GroupProgress, group_word

GLANCE_S = 0.05
"""How soon a rank that waits notices that the group has no future."""


@dataclass(slots=True)
class _Peer:
    instance: int
    header: int
    """Address of its arena's header."""
    seen: tuple[int, int] = (-1, -1)
    """Its word and its signs of life when they last changed."""
    since: float = 0.0


@final
class Lockstep:
    """One rank's way through one started group."""

    def __init__(
        self,
        progress: GroupProgress,
        number: int,
        headers: Mapping[int, int],
        *,
        patience: float,
    ) -> None:
        """`headers`: by instance, those of the other ranks. `number` is above that of any before."""
        self._progress = progress
        self._number = number
        self._peers = [_Peer(instance, header) for instance, header in headers.items()]
        self._patience = patience

    def tell(self, chunk: int, num_layers: int = 0) -> None:
        """All chunks before this one are written here, and so many layers of it."""
        self._progress.tell(self._number, chunk, num_layers)

    def hold_back(self, chunk: int) -> None:
        """All chunks before this one are written here, but this rank is not ready to enter it."""
        self._progress.hold_back(self._number, chunk)

    def met(self) -> bool:
        """Whether all others work on this group, ready or not, and on no older one."""
        wanted = group_word(self._number, 0, 0) - 1
        words = (
            self._progress.hear(each.header, self._number, wanted, 0.0) for each in self._peers
        )
        return all(word >= wanted for word in words)

    def reached(self, chunk: int, num_layers: int = 0, *, seconds: float = 0.0) -> bool:
        """Whether all others have come so far; waits up to `seconds` for the first that has not.

        Raises GroupBroken where one never will.
        """
        wanted = group_word(self._number, chunk, num_layers)
        for peer in self._peers:
            word = self._progress.hear(peer.header, self._number, wanted, seconds)
            if word < wanted:
                self._look_after(peer, word)
                return False
            if word >= group_word(self._number + 1, 0, 0):
                raise GroupBroken(f"instance {peer.instance} has left the group behind")
        return True

    def wait(self, chunk: int, num_layers: int, go_on: Callable[[], None]) -> None:
        """Return when all others have come so far; `go_on` may raise GroupBroken too."""
        while not self.reached(chunk, num_layers, seconds=GLANCE_S):
            go_on()

    def _look_after(self, peer: _Peer, word: int) -> None:
        now = time.monotonic()
        seen = (word, self._progress.life(peer.header))
        if seen != peer.seen:
            peer.seen, peer.since = seen, now
        elif now - peer.since > self._patience:
            raise GroupBroken(
                f"instance {peer.instance} gave no sign of life for {self._patience:g} s",
                waited_for=peer.instance,
            )
