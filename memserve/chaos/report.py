"""What a run of `scripts/chaos` has found, as lines for people and one line of JSON."""

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from memserve.chaos.watching import Growth, Holding

MOST_SHOWN = 10
"""Complaints of one kind."""
FILES_MORE = 1
"""Open files that a worker may have at the end more than any at the start: nothing runs then."""


class Pauses(msgspec.Struct, frozen=True, kw_only=True):
    """The longest gap between tokens of each stream that a death touched, in seconds."""

    streams: int
    p50: float | None
    p99: float | None
    longest: float | None


def pauses_of(gaps: Sequence[float]) -> Pauses:
    """Sum up."""
    if not gaps:
        return Pauses(streams=0, p50=None, p99=None, longest=None)
    p50, p99 = np.percentile(gaps, (50, 99))
    return Pauses(streams=len(gaps), p50=float(p50), p99=float(p99), longest=max(gaps))


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of one run."""

    model: str
    flags: list[str]
    """Of the server."""
    seed: int
    minutes: float
    requests: int
    left: int
    """Requests whose client went away early, on purpose."""
    blows: dict[str, int]
    server: dict[str, float]
    """What the server itself has counted: deaths, restarts, replayed choices, convictions."""
    wrong: list[str]
    ties: int
    """Answers that differ from the undisturbed one by a tie within rounding."""
    failed: list[str]
    pauses: Pauses
    pages_leaked: int
    audits: int
    """How often the books were recounted under load."""
    problems: list[str]
    """What the recounts found."""
    tracebacks: int
    """In the server's log: errors that nobody foresaw."""
    left_behind: list[str]
    """Processes that outlived the server."""
    launcher: tuple[Holding, Holding]
    """At the start and at the end."""
    workers: tuple[list[Holding], list[Holding]]
    growths: list[Growth]

    @property
    def violations(self) -> list[str]:
        """Why the run has failed; empty if it has not."""
        found = [
            f"{number} {what}"
            for what, number in (
                ("wrong answers", len(self.wrong)),
                ("failed requests", len(self.failed)),
                ("pages leaked", self.pages_leaked),
                ("problems in the books", len(self.problems)),
                ("tracebacks in the log", self.tracebacks),
                ("processes left behind", len(self.left_behind)),
                ("convicted requests", int(self.server.get("convicted_requests", 0))),
            )
            if number
        ]
        most = [max((one.num_files for one in held), default=0) for held in self.workers]
        if most[1] > most[0] + FILES_MORE:
            found.append(f"a worker with {most[1]} open files, where {most[0]} were enough")
        return found + [
            f"{each.what} has grown by {each.most:.1f}" for each in self.growths if each.grows
        ]


def render(report: Report) -> str:
    """Some lines for people."""
    blows = ", ".join(f"{number} × {name}" for name, number in report.blows.items())
    lines = [
        f"{report.requests} requests in {report.minutes:g} minutes, {report.left} left by clients",
        f"blows: {blows}; the server: {_counts(report.server)}",
        f"wrong answers: {len(report.wrong)} (and {report.ties} ties); failed: {len(report.failed)}",
        _pauses(report.pauses),
        f"pages leaked: {report.pages_leaked}; problems in {report.audits} recounts under load: "
        + str(len(report.problems)),
        f"tracebacks in the server's log: {report.tracebacks}",
        f"launcher: {_held([report.launcher[0]])} → {_held([report.launcher[1]])}",
        f"workers: {_held(report.workers[0])} → {_held(report.workers[1])}",
        *map(_growth, report.growths),
    ]
    for complaints in (report.wrong, report.failed, report.problems, report.left_behind):
        lines += complaints[:MOST_SHOWN]
    return "\n".join([*lines, f"violations: {', '.join(report.violations) or 'none'}"])


def _counts(counts: Mapping[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {number:g}" for name, number in counts.items())


def _pauses(pauses: Pauses) -> str:
    figures = (("P50", pauses.p50), ("P99", pauses.p99), ("longest", pauses.longest))
    shown = ", ".join(f"{name} {_seconds(value)}" for name, value in figures)
    return f"pauses of {pauses.streams} streams that a death touched: {shown}"


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f} s"


def _held(holdings: Sequence[Holding]) -> str:
    return " + ".join(
        f"{one.memory_mib:.0f} MiB, {one.num_files} files, {one.num_arenas} arenas"
        for one in holdings
    )


def _growth(growth: Growth) -> str:
    found = "too few samples to say" if growth.growth is None else f"{growth.growth:+.1f}"
    limits = f"mean {growth.mean:.1f}"
    if growth.tolerated is not None:
        limits += f", tolerated {growth.tolerated:.1f}"
    if growth.quarters is not None:
        limits = "first quarter {:.1f}, last {:.1f}, ".format(*growth.quarters) + limits
    return f"growth of {growth.what}: {found} ({limits})"
