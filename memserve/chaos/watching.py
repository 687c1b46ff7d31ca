"""What a server holds while it runs: memory, open files and pages, sampled; and whether it grows.

Something grows if a straight line through all samples says so, or if the mean of the last quarter of
the run lies above that of the first: a leak is a line, and what rises in steps differs at the ends.

Memory is what belongs to a process alone (`RssAnon` of Linux): arenas are shared and of fixed size,
and which of a peer's pages a process happens to have mapped says nothing. Mappings of arenas are
counted: a former life's must go.
"""

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import msgspec
import numpy as np

WARM_UP_S = 60.0
"""Of a process's life: what it allocates first is not growth."""
LEAST_SAMPLES = 20
TOLERATED_SHARE = 0.05
TOLERATED_MIB = 16.0
TOLERATED_FILES = 8.0
TOLERATED_ARENAS = 1.0


class Holding(msgspec.Struct, frozen=True, kw_only=True):
    """What one process holds."""

    memory_mib: float
    num_files: int
    num_arenas: int
    """Mappings of KV blocks and their tables, its own and its peers'."""


@dataclass
class Life:
    """The samples of one process; times in seconds of the monotonic clock."""

    times: list[float] = field(default_factory=list)
    holdings: list[Holding] = field(default_factory=list)

    def look(self, pid: int) -> Holding | None:
        """Take a sample; None if the process has just ended."""
        try:
            holding = holding_of(pid)
        except OSError:
            return None
        self.times.append(time.monotonic())
        self.holdings.append(holding)
        return holding


def holding_of(pid: int) -> Holding:
    """What a process holds now. Raises `OSError` if it has ended."""
    folder = Path("/proc") / str(pid)
    status = (folder / "status").read_text()
    lines = dict(line.split(":", maxsplit=1) for line in status.splitlines() if ":" in line)
    if "RssAnon" not in lines:  # a zombie has no memory
        raise ProcessLookupError(pid)
    return Holding(
        memory_mib=int(lines["RssAnon"].split()[0]) / 1024,
        num_files=len(os.listdir(folder / "fd")),
        num_arenas=(folder / "maps").read_text().count("/memfd:memserve-arena"),
    )


class Growth(msgspec.Struct, frozen=True, kw_only=True):
    """How much something grew over the run."""

    what: str
    mean: float
    growth: float | None
    """By a straight line through the samples. None: too few after the warm-up to say."""
    quarters: tuple[float, float] | None
    """Means of the first and of the last quarter of the run; None as above."""
    tolerated: float | None
    """None: it is shown and not judged."""

    @property
    def most(self) -> float | None:
        """The larger growth of the two."""
        steps = [] if self.quarters is None else [self.quarters[1] - self.quarters[0]]
        lines = [] if self.growth is None else [self.growth]
        return max(lines + steps, default=None)

    @property
    def grows(self) -> bool:
        """Whether that is more than may be."""
        return self.most is not None and self.tolerated is not None and self.most > self.tolerated


def growths(who: str, lives: Sequence[Life]) -> list[Growth]:
    """The growth of memory, files and mappings over one or more lives of a process."""
    return [
        growth_of(f"{who} memory, MiB", _series(lives, lambda one: one.memory_mib), TOLERATED_MIB),
        growth_of(f"{who} open files", _series(lives, lambda one: one.num_files), TOLERATED_FILES),
        growth_of(
            f"{who} mapped arenas", _series(lives, lambda one: one.num_arenas), TOLERATED_ARENAS
        ),
    ]


Series: TypeAlias = tuple[Sequence[float], Sequence[float]]
"""Times in seconds of one clock, and values."""


def _series(lives: Sequence[Life], value: Callable[[Holding], float]) -> list[Series]:
    return [(life.times, [value(one) for one in life.holdings]) for life in lives]


def growth_of(what: str, series: Sequence[Series], tolerated: float | None) -> Growth:
    """Of one quantity; a share of its mean is tolerated in any case, None: whatever it is."""
    mean, growth = line_through(series)
    return Growth(
        what=what,
        mean=mean,
        growth=growth,
        quarters=quarters_of(series),
        tolerated=None if tolerated is None else max(tolerated, TOLERATED_SHARE * mean),
    )


def _warm(times: Sequence[float], values: Sequence[float]) -> list[tuple[float, float]]:
    """The samples of a series after its warm-up."""
    pairs = zip(times, values, strict=True)
    return [(at, value) for at, value in pairs if at - times[0] >= WARM_UP_S]


def quarters_of(series: Iterable[Series]) -> tuple[float, float] | None:
    """The means of the first and the last quarter of the time that all warm samples span."""
    warm = [sample for times, values in series for sample in _warm(times, values)]
    if len(warm) < LEAST_SAMPLES:
        return None
    at, value = np.array(warm).T
    quarter = (at.max() - at.min()) / 4
    ends = (value[at <= at.min() + quarter], value[at >= at.max() - quarter])
    return float(ends[0].mean()), float(ends[1].mean())


def line_through(series: Iterable[Series]) -> tuple[float, float | None]:
    """The mean of all values, and their growth over the longest series, by least squares.

    Every series (times, values) has its own level and all have one slope. Samples of the first
    `WARM_UP_S` seconds of a series don't count for the growth.
    """
    top = bottom = longest = 0.0
    num_samples = 0
    everything: list[float] = []
    for times, values in series:
        everything += values
        warm = _warm(times, values)
        if len(warm) < 2:
            continue
        at, value = np.array(warm).T
        top += float(((at - at.mean()) * (value - value.mean())).sum())
        bottom += float(((at - at.mean()) ** 2).sum())
        longest = max(longest, float(at[-1] - at[0]))
        num_samples += len(warm)
    mean = float(np.mean(everything)) if everything else 0.0
    return mean, top / bottom * longest if num_samples >= LEAST_SAMPLES and bottom else None
