"""Where a worker process begins: `python -m memserve.workers.entry CONTROL DESCRIPTORS PARENT CORES`.

The arguments are two inherited socket descriptors, the launcher's process id, and the processor cores
to stay on. Everything that must be settled before torch starts its threads is settled here; the
OpenMP variables are in the environment already. Torch is imported by `memserve.workers.worker`.
"""

import ctypes
import os
import signal
import socket
import sys

PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the launcher's main thread ends; leave if it has."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        sys.exit(0)


def main(arguments: list[str]) -> None:
    """Settle the process, then run the engine until the launcher says so or goes away."""
    control, descriptors, parent, cores = arguments
    die_with_parent(int(parent))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the launcher's to handle
    os.sched_setaffinity(0, {int(core) for core in cores.split(",")})

    from memserve.workers.worker import run_worker

    run_worker(socket.socket(fileno=int(control)), socket.socket(fileno=int(descriptors)))


if __name__ == "__main__":
    main(sys.argv[1:])
