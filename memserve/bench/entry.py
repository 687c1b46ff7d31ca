"""Where a measuring process begins: `python -m memserve.bench.entry PARENT`, a `Task` on its input.

Settles cores and threads as `memserve.workers.entry` and `memserve.workers.worker` do for a worker (the
OpenMP variables are in the environment already), before torch is imported. The answer is one JSON
line on standard output: a `Worker`, or a `Profile` if the task asks for one. Exit status 2, with one
line on standard error, for what the operator can mend.
"""

import logging
import os
import sys

import msgspec

from memserve.bench.records import Task
from memserve.errors import UsageError
from memserve.machine import die_with_parent

log = logging.getLogger(__name__)


def main(arguments: list[str]) -> int:
    """Measure and answer; the exit status."""
    (parent,) = arguments
    die_with_parent(int(parent))
    task = msgspec.json.decode(sys.stdin.buffer.read(), type=Task)
    os.sched_setaffinity(0, set(task.cores))
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("memserve.bench").setLevel(logging.INFO)
    with os.fdopen(os.dup(1), "wb") as answer:
        os.dup2(2, 1)  # libraries print; only the answer goes to the parent

        import torch

        from memserve.bench.measure import measure, profile_decode

        torch.set_num_threads(len(task.cores))
        torch.set_grad_enabled(False)
        try:
            result = profile_decode(task) if task.profile else measure(task)
        except UsageError as error:
            log.error("%s", error)  # noqa: TRY400 (the operator's mistake needs no traceback)
            return 2
        answer.write(msgspec.json.encode(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
