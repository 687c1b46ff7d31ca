"""Starts the other ranks of an instance, before rank 0 has loaded torch: all load it at the same time.

Contract: the kernel ends them when the thread that started them ends. What they are to do they are
told over their sockets (`memserve.tensor.leading`). No torch here.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from memserve.machine import thread_environment


@dataclass(frozen=True, slots=True)
class StartedRank:
    """A process of rank `number`, and this process's ends of the sockets to it."""

    number: int
    process: "subprocess.Popen[bytes]"
    setup: socket.socket
    steps: socket.socket
    copies: socket.socket


@dataclass(frozen=True, slots=True)
class StartedRanks:
    """The ranks from 1 on, and the file without a name at which all will meet."""

    ranks: list[StartedRank]
    meeting_point: int


def start_ranks(cores: Sequence[Sequence[int]]) -> StartedRanks:
    """Start one rank on each of these sets of cores."""
    meeting_point = os.memfd_create("memserve-meeting")
    ranks = [_start(number, own, meeting_point) for number, own in enumerate(cores, start=1)]
    return StartedRanks(ranks, meeting_point)


def _start(number: int, cores: Sequence[int], meeting_point: int) -> StartedRank:
    pairs = [socket.socketpair() for _ in range(3)]
    inherited = (*(theirs.fileno() for _, theirs in pairs), meeting_point)
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "memserve.tensor.entry",
            *map(str, inherited),
            str(os.getpid()),
            ",".join(map(str, cores)),
        ],
        stdin=subprocess.DEVNULL,
        pass_fds=inherited,
        env=os.environ | thread_environment(cores),
    )
    for _, theirs in pairs:
        theirs.close()
    setup, steps, copies = (ours for ours, _ in pairs)
    return StartedRank(number, process, setup, steps, copies)
