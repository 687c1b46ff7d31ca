"""A load's result as lines of text, in the layout of `vllm bench serve`, with sections of its own."""

from collections.abc import Sequence

from memserve.bench.results import Metric, Result, attainment

WIDTH = 50
TITLES: dict[Metric, str] = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}
SHOWN_ERRORS = 5


def result_lines(result: Result, metrics: Sequence[Metric]) -> list[str]:
    """The whole report, with the latencies named in `metrics`."""
    lines = [title("Serving Benchmark Result", "="), *_counts(result)]
    for metric in metrics:
        if figures := result.latencies.get(metric):
            name = metric.upper()
            lines += [
                title(TITLES[metric]),
                line(f"Mean {name} (ms):", figures.mean),
                line(f"Median {name} (ms):", figures.median),
                *(
                    line(f"P{share:g} {name} (ms):", value)
                    for share, value in figures.percentiles.items()
                ),
            ]
    lines += _caching(result)
    lines += _server(result)
    if result.errors:
        lines += [title("Errors"), *_errors(result)]
    return [*lines, "=" * WIDTH]


def title(text: str, rule: str = "-") -> str:
    """A heading in the middle of a rule."""
    return f"{f' {text} ' if rule == '=' else text:{rule}^{WIDTH}}"


def line(name: str, value: float | str | None) -> str:
    """A name and its value; whole numbers without decimals."""
    text = f"{value:.2f}" if isinstance(value, float) else str("n/a" if value is None else value)
    return f"{name:<40} {text:<10}".rstrip()


def _counts(result: Result) -> list[str]:
    setup = result.setup
    lines = [
        line("Successful requests:", result.completed),
        line("Failed requests:", result.failed),
    ]
    if result.skipped:
        lines.append(line("Requests not sent (earlier turn failed):", result.skipped))
    if setup.max_concurrency is not None:
        lines.append(line("Maximum request concurrency:", setup.max_concurrency))
    if setup.request_rate is not None:
        lines.append(line("Session rate configured (1/s):", setup.request_rate))
    lines += [
        line("Sessions:", result.num_sessions),
        line("Benchmark duration (s):", result.duration),
        line("Total input tokens:", result.total_input_tokens),
        line("Total generated tokens:", result.total_output_tokens),
        line("Request throughput (req/s):", result.per_second(result.completed)),
    ]
    if result.good is not None:
        lines.append(line("Request goodput (req/s):", result.per_second(result.good)))
    total = result.total_input_tokens + result.total_output_tokens
    return [
        *lines,
        line("Output token throughput (tok/s):", result.per_second(result.total_output_tokens)),
        line("Total token throughput (tok/s):", result.per_second(total)),
        line("Peak concurrent requests:", result.max_concurrent_requests),
    ]


def _caching(result: Result) -> list[str]:
    share = result.hit_rate
    lines = [
        title("Context Caching and Job Completion"),
        line("Total cached input tokens:", result.total_cached_tokens),
        line("Cache hit rate (%):", None if share is None else 100 * share),
    ]
    if result.answer_ids != "server":
        origin = {"tokenize": "retokenized text", "drawn": "drawn, not the server's"}
        lines.append(line("Answers in later prompts:", origin[result.answer_ids]))
    if jct := result.latencies.get("e2el"):
        lines.append(line("Mean JCT (s):", jct.mean / 1e3))
        lines += [line(f"P{p:g} JCT (s):", value / 1e3) for p, value in jct.percentiles.items()]
    if (attained := attainment(result)) is not None:
        lines.append(line("SLO attainment (%):", 100 * attained))
    return lines


def _server(result: Result) -> list[str]:
    """The server's own means and counters, those that moved."""
    if result.server is None:
        return []
    return [
        title("Server: Mean Times"),
        *(
            line(f"{name.replace('_', ' ')} (ms):", seconds * 1e3)
            for name, seconds in sorted(result.server.mean_seconds.items())
        ),
        title("Server: Counters"),
        *(
            line(f"{name.replace('_', ' ')}:", value if value % 1 else round(value))
            for name, value in sorted(result.server.counters.items())
            if value
        ),
    ]


def _errors(result: Result) -> list[str]:
    commonest = sorted(result.errors.items(), key=lambda item: -item[1])
    lines = [f"{count} x {error}" for error, count in commonest[:SHOWN_ERRORS]]
    if len(commonest) > SHOWN_ERRORS:
        lines.append(f"… and {len(commonest) - SHOWN_ERRORS} other errors")
    return lines
