"""Servers to compare: `memserve serve` with different flags, all up at once, idle but for one.

An idle server takes no measurable share of a core, so what runs is alone on the machine as far as the
servers go; leaving the context stops every server that was started.
"""

import contextlib
import logging
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from memserve.bench.plans import COMMON, FOLDER, Variant
from memserve.errors import UsageError

log = logging.getLogger(__name__)

STOP_TIMEOUT_S = 30
SHOWN_LOG = 400
"""Characters of a failed server's log."""


@contextlib.contextmanager
def running(variants: Sequence[Variant], model: str | None) -> Iterator[dict[str, str]]:
    """The URL of every variant, by name. Raises `UsageError` if a server doesn't start."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as servers:
        urls = {}
        for number, variant in enumerate(variants):
            if variant.url is not None:
                urls[variant.name] = variant.url
                continue
            log.info("starting %s: %s", variant.name, " ".join(variant.flags))
            own = Path(folder) / str(number)
            own.mkdir()
            flags = [flag.replace(FOLDER, str(own)) for flag in (*COMMON, *variant.flags)]
            server = started(variant.name, model, flags, Path(folder) / f"{number}.log")
            urls[variant.name] = servers.enter_context(server).url
        yield urls


@dataclass(frozen=True)
class Started:
    """A server that serves."""

    url: str
    process: "subprocess.Popen[bytes]"


@contextlib.contextmanager
def started(
    name: str, model: str | None, flags: Sequence[str], log_file: Path
) -> Iterator[Started]:
    """`memserve serve` until the block is left; `log_file` gets all that it writes.

    Raises `UsageError` with the end of that if it doesn't start.
    """
    command = [sys.executable, "-m", "memserve", "serve", *([model] if model else [])]
    command += ["--port", "0", *flags]
    with (
        log_file.open("wb") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors) as process,
    ):
        try:
            assert process.stdout is not None
            found = re.search(r"http://\S+", process.stdout.readline().decode())
            if not found:
                words = log_file.read_text(errors="replace")[-SHOWN_LOG:].strip()
                raise UsageError(f"the server {name!r} did not start: {words}")
            yield Started(found.group(), process)
        finally:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            finally:
                process.kill()
