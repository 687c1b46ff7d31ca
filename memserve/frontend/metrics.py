"""Prometheus metrics: what clients experienced, and what each instance is doing.

Names, labels and buckets follow vLLM's, with the prefix `memserve:`, so that its dashboards need
the prefix changed and nothing else. What clients see is measured in the front end, under the engine
label `frontend`; the instances' own numbers are read out of their latest heartbeat when somebody
scrapes, one series per instance.

Each app has a registry of its own.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from memserve.frontend.timeline import Moment, Timeline
from memserve.messages import EngineStats
from memserve.openai.memo import ChatMemo

PREFIX = "memserve:"
FRONTEND = "frontend"

# vLLM's buckets, in seconds.
FIRST_TOKEN_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
NEXT_TOKEN_BUCKETS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
)  # fmt: skip
LATENCY_BUCKETS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip


class InstanceView(Protocol):
    """One instance as the metrics see it."""

    @property
    def number(self) -> int:
        """Its number; label `engine`."""
        ...

    @property
    def name(self) -> str:
        """Name for people, such as `prefill-0`."""
        ...

    @property
    def epoch(self) -> int:
        """Counts its lives."""
        ...

    @property
    def leaving(self) -> bool:
        """Whether it gets no new work."""
        ...

    @property
    def role(self) -> str:
        """What the scheduler sends to it; label `role`."""
        ...

    @property
    def stats(self) -> EngineStats:
        """Its latest counters and gauges."""
        ...


Instances = Callable[[], Sequence[InstanceView]]


class Metrics:
    """The metrics of one app."""

    def __init__(
        self, model_name: str, max_model_len: int, instances: Instances, memo: ChatMemo
    ) -> None:
        self._registry = CollectorRegistry()
        self._labels = (model_name, FRONTEND)
        self._registry.register(InstanceCollector(model_name, instances))
        self._registry.register(MemoCollector(model_name, memo))
        lengths = one_two_five(max_model_len)
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", FIRST_TOKEN_BUCKETS
        )
        self._inter_token = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of a choice.", NEXT_TOKEN_BUCKETS
        )
        self._per_output_token = self._histogram(
            "request_time_per_output_token_seconds",
            "Mean time per token after the first, by choice.",
            NEXT_TOKEN_BUCKETS,
        )
        self._latency = self._histogram(
            "e2e_request_latency_seconds", "From arrival to the end.", LATENCY_BUCKETS
        )
        self._decode_time = self._histogram(
            "request_decode_time_seconds", "From the first token to the last.", LATENCY_BUCKETS
        )
        self._request_prompt = self._histogram(
            "request_prompt_tokens", "Prompt tokens of a request.", lengths
        )
        self._request_output = self._histogram(
            "request_generation_tokens", "Generated tokens of a choice.", lengths
        )
        self._request_max_tokens = self._histogram(
            "request_params_max_tokens", "The max_tokens of a request.", lengths
        )
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of admitted requests.")
        self._cached_tokens = self._counter(
            "prompt_tokens_cached", "Prompt tokens whose prefill was skipped."
        )
        self._output_tokens = self._counter("generation_tokens", "Generated tokens.")
        self._success = Counter(
            PREFIX + "request_success",
            "Choices that have ended, by reason.",
            ("model_name", "engine", "finished_reason"),
            registry=self._registry,
        )
        self._ends = Counter(
            PREFIX + "requests",
            "Requests that have ended, by how.",
            ("model_name", "engine", "end"),
            registry=self._registry,
        )
        for reason in ("stop", "length", "abort", "error"):
            self._success.labels(*self._labels, reason)
        for end in (Moment.FINISHED, Moment.REFUSED, Moment.ABORTED, Moment.FAILED):
            self._ends.labels(*self._labels, end.value)

    def token_gap(self, seconds: float) -> None:
        """Two tokens of a choice came this far apart."""
        self._inter_token.observe(seconds)

    def ended(self, life: Timeline) -> None:
        """A request has ended: count it, once."""
        assert life.end is not None
        self._ends.labels(*self._labels, life.end.value).inc()
        if life.end is Moment.REFUSED:
            return
        self._prompt_tokens.inc(life.num_prompt_tokens)
        self._cached_tokens.inc(life.num_cached_tokens)
        self._output_tokens.inc(life.num_output_tokens)
        unfinished = "abort" if life.end is Moment.ABORTED else "error"
        if not life.choices:
            self._success.labels(*self._labels, unfinished).inc()
        for times in life.choices.values():
            self._success.labels(*self._labels, times.finish_reason or unfinished).inc()
            self._request_output.observe(times.num_tokens)
            _observe(self._per_output_token, times.per_output_token)
        _observe(self._first_token, life.time_to_first_token)
        self._request_prompt.observe(life.num_prompt_tokens)
        self._request_max_tokens.observe(life.max_tokens)
        if life.end is Moment.FINISHED:
            _observe(self._latency, life.duration)
            _observe(self._decode_time, life.seconds(Moment.FIRST_TOKEN, Moment.LAST_TOKEN))

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """The metrics as text, and its content type, in the format that a scraper accepts."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        family = Histogram(
            PREFIX + name, text, ("model_name", "engine"), buckets=buckets, registry=self._registry
        )
        return family.labels(*self._labels)

    def _counter(self, name: str, text: str) -> Counter:
        family = Counter(PREFIX + name, text, ("model_name", "engine"), registry=self._registry)
        return family.labels(*self._labels)


def _observe(histogram: Histogram, seconds: float | None) -> None:
    if seconds is not None:
        histogram.observe(seconds)


def one_two_five(limit: int) -> list[float]:
    """Buckets 1, 2, 5, 10, 20, 50 ... up to `limit`."""
    buckets: list[float] = []
    power = 1
    while True:
        for mantissa in (1, 2, 5):
            if mantissa * power > limit:
                return buckets or [1.0]
            buckets.append(float(mantissa * power))
        power *= 10


class InstanceCollector(Collector):
    """The instances' own numbers, read when somebody scrapes."""

    LABELS = ("model_name", "engine", "role")

    def __init__(self, model_name: str, instances: Instances) -> None:
        self._model_name = model_name
        self._instances = instances

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering must not ask the instances."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """One series per instance of every gauge and counter."""
        stats = [
            ((self._model_name, str(instance.number), instance.role), instance.stats)
            for instance in self._instances()
        ]
        for name, text, read in GAUGES:
            gauge = GaugeMetricFamily(PREFIX + name, text, labels=self.LABELS)
            for labels, of_instance in stats:
                gauge.add_metric(labels, read(of_instance))
            yield gauge
        for name, text, read in COUNTERS:
            counter = CounterMetricFamily(PREFIX + name, text, labels=self.LABELS)
            for labels, of_instance in stats:
                counter.add_metric(labels, read(of_instance))
            yield counter
        yield self._blocks(stats)

    def _blocks(self, stats: list[tuple[tuple[str, str, str], EngineStats]]) -> Metric:
        blocks = GaugeMetricFamily(
            PREFIX + "kv_blocks",
            "KV blocks, by tier and state.",
            labels=(*self.LABELS, "tier", "state"),
        )
        for labels, of_instance in stats:
            for name, tier in (("hbm", of_instance.hbm), ("dram", of_instance.dram)):
                if tier is not None:
                    blocks.add_metric((*labels, name, "free"), tier.free)
                    blocks.add_metric((*labels, name, "active"), tier.active)
                    blocks.add_metric((*labels, name, "historical"), tier.historical)
                    blocks.add_metric((*labels, name, "in_flight"), tier.in_flight)
        return blocks


class MemoCollector(Collector):
    """The numbers of the chat memo, read when somebody scrapes."""

    def __init__(self, model_name: str, memo: ChatMemo) -> None:
        self._labels = (model_name, FRONTEND)
        self._memo = memo

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering must not read."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Every counter and gauge."""
        stats, names = self._memo.stats, ("model_name", "engine")
        for name, text, count in (
            ("chat_memo_queries", "Chats with an earlier answer.", stats.num_queries),
            ("chat_memo_hits", "Chats whose earlier answer was remembered.", stats.num_hits),
            ("chat_memo_tokens", "Prompt tokens taken as they were served.", stats.num_tokens),
        ):
            counter = CounterMetricFamily(PREFIX + name, text, labels=names)
            counter.add_metric(self._labels, count)
            yield counter
        size = GaugeMetricFamily(PREFIX + "chat_memo_bytes", "Size of the memo.", labels=names)
        size.add_metric(self._labels, stats.num_bytes)
        yield size


def kv_cache_usage(stats: EngineStats) -> float:
    """Share of the arena, 0 to 1, that running requests and transfers hold.

    Historical blocks count as free, as vLLM counts them: they go when the room is needed.
    """
    if stats.hbm is None or stats.hbm.total == 0:
        return 0.0
    return (stats.hbm.active + stats.hbm.in_flight) / stats.hbm.total


Series = tuple[str, str, Callable[[EngineStats], float]]

GAUGES: tuple[Series, ...] = (
    ("num_requests_running", "Sequences in the running batch.", lambda s: s.num_running),
    ("num_requests_waiting", "Sequences that wait to run.", lambda s: s.num_waiting),
    ("num_requests_incoming", "Sequences to be handed over to here.", lambda s: s.num_incoming),
    ("kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1.", kv_cache_usage),
)

COUNTERS: tuple[Series, ...] = (
    ("num_preemptions", "Sequences that had to give way.", lambda s: s.num_preemptions),
    ("prefix_cache_queries", "Prompt tokens looked up.", lambda s: s.num_queried_tokens),
    ("prefix_cache_hits", "Prompt tokens found.", lambda s: s.num_cached_tokens),
    ("engine_steps", "Steps run.", lambda s: s.num_steps),
    ("engine_prefill_tokens", "Prompt tokens computed.", lambda s: s.num_prefill_tokens),
    ("engine_decode_tokens", "Tokens decoded.", lambda s: s.num_decode_tokens),
    ("pulls", "Copies started to take requests over.", lambda s: s.num_pulls),
    ("pulled_blocks", "Blocks copied from other instances.", lambda s: s.num_pulled_blocks),
    ("pulled_bytes", "Bytes copied from other instances.", lambda s: s.num_pulled_bytes),
    ("failed_pulls", "Copies whose source was gone.", lambda s: s.num_failed_pulls),
    ("fetched_blocks", "Cached blocks had from other instances.", lambda s: s.num_fetched_blocks),
    ("failed_fetches", "Fetches that found less than named.", lambda s: s.num_failed_fetches),
    ("handovers", "Requests taken over from another instance.", lambda s: s.num_handovers),
    ("declined_handovers", "Requests not taken over.", lambda s: s.num_declined),
    ("swapped_out_blocks", "Blocks moved from HBM to DRAM.", lambda s: s.num_swapped_out_blocks),
    ("swapped_in_blocks", "Blocks moved from DRAM to HBM.", lambda s: s.num_swapped_in_blocks),
    ("swapped_bytes", "Bytes moved between the tiers.", lambda s: s.num_swapped_bytes),
    ("evicted_blocks", "Historical blocks that had to go.", lambda s: s.num_evictions),
)
