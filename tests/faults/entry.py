"""A worker process with faults: `python -m tests.faults.entry CONTROL DESCRIPTORS PARENT CORES FAULTS`.

The first four arguments are those of `memserve.workers.entry`. The fifth is an inherited socket over
which the test arms faults and hears of those that have struck, one line of JSON each.
"""

import signal
import socket
import sys
import threading

import msgspec

from memserve.machine import die_with_parent
from tests.faults.plan import Fault, Faults


class Order(msgspec.Struct):
    """What the test wants: a fault, or none any more; `release` lets go of what is held."""

    arm: Fault | None = None
    release: bool = False


class Struck(msgspec.Struct):
    """Where a fault has struck; empty: an order was carried out."""

    place: str


def obey(orders: socket.socket, faults: Faults) -> None:
    """Until the test has gone."""
    with orders.makefile("rb") as lines:
        for line in lines:
            order = msgspec.json.decode(line, type=Order)
            if order.arm is not None:
                faults.arm(order.arm)
            if order.release:
                faults.release()
            orders.sendall(msgspec.json.encode(Struck("")) + b"\n")


def main(arguments: list[str]) -> None:
    control, descriptors, parent, _, told = arguments
    die_with_parent(int(parent))
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    from memserve.workers import worker
    from memserve.workers.memory import WorkerMemory
    from tests.faults.wrapping import FaultyLink, wrap

    faults = Faults()
    orders = socket.socket(fileno=int(told))
    faults.on_meeting = lambda place: orders.sendall(msgspec.json.encode(Struck(place)) + b"\n")
    threading.Thread(target=obey, args=(orders, faults), daemon=True).start()

    class FaultyMemory(WorkerMemory):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)  # type: ignore[arg-type]
            wrap(self, faults)

    faulty = {"Link": lambda socket_: FaultyLink(socket_, faults), "WorkerMemory": FaultyMemory}
    vars(worker).update(faulty)  # the product has no seam for this, on purpose
    worker.run_worker(socket.socket(fileno=int(control)), socket.socket(fileno=int(descriptors)))


if __name__ == "__main__":
    main(sys.argv[1:])
