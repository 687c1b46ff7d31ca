"""The tables of `scripts/bench_parallel`."""

from collections.abc import Iterator

import msgspec

from memserve.bench.parallel import FirstToken
from memserve.bench.parallel_mixed import Mixed


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All that was measured."""

    model: str
    num_workers: int
    repeats: int
    first_tokens: list[FirstToken]
    mixed: list[Mixed]


MIXED_HEAD = (
    "| max_sp | groups | documents' TTFT p50, p99 (s) | chats' TTFT p99 (s) "
    "| chats' TPOT p50, p99 (ms) | longest gap (ms) |"
)


def render(report: Report) -> str:
    """Three tables: by length and ranks, what the cost model chose, and chats beside documents."""
    lines = [f"{report.model}: TTFT of one prompt, median of {report.repeats}", ""]
    lines += [
        "| tokens | m | TTFT (s) | speed-up | read of others (MB) | plan | each once | balance |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in report.first_tokens:
        lines += _by_ranks(row)
    lines += ["", "| tokens | one worker, all cores (s) | chosen m | loss |", "|---|---|---|---|"]
    lines += [
        f"| {row.num_tokens} | {row.all_cores:.3f} | {row.chosen} | {row.loss:.2f} |"
        for row in report.first_tokens
    ]
    if report.mixed:
        lines += ["", MIXED_HEAD, "|---|---|---|---|---|---|"]
    lines += [_mixed(each) for each in report.mixed]
    return "\n".join(lines)


def _by_ranks(row: FirstToken) -> Iterator[str]:
    for each in row.shared:
        speedup = row.shared[0].seconds / each.seconds
        numbers = (each.remote_bytes, each.planned_bytes, each.formula_bytes)
        exchanged = " | ".join(f"{number / 1e6:.1f}" for number in numbers)
        yield (
            f"| {row.num_tokens} | {each.num_ranks} | {each.seconds:.3f} | {speedup:.2f} | "
            f"{exchanged} | {each.balance:.2f} |"
        )


def _mixed(each: Mixed) -> str:
    return (
        f"| {each.max_sp} | {each.num_groups} | {each.long_ttft_p50:.2f}, "
        f"{each.long_ttft_p99:.2f} | {each.short_ttft_p99:.2f} | "
        f"{1e3 * each.short_tpot_p50:.0f}, {1e3 * each.short_tpot_p99:.0f} | "
        f"{1e3 * each.short_longest_gap:.0f} |"
    )
