"""Prometheus metrics: what clients experienced, and what each instance is doing.

Names, labels and buckets follow vLLM's, with the prefix `memserve:`, so that its dashboards need
the prefix changed and nothing else. What clients see is measured in the front end, under the engine
label `frontend`; the instances' own numbers are read out of their latest heartbeat when somebody
scrapes, one series per instance.

Each app has a registry of its own.
"""

from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from memserve.errors import Overloaded
from memserve.frontend.collectors import FRONTEND, PREFIX
from memserve.frontend.timeline import SOURCES, Moment, Slo, Timeline

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


REJECTIONS = (
    "num_requests", "num_tokens", "slo_ttft", "slo_tpot", "body_bytes", "no_worker", "shutting_down",
)  # fmt: skip
"""Codes of `Overloaded`, the errors with which requests are turned away."""


class Metrics:
    """The metrics of one app."""

    def __init__(
        self, model_name: str, max_model_len: int, collectors: Iterable[Collector], slo: Slo
    ) -> None:
        self._registry = CollectorRegistry()
        self._labels = (model_name, FRONTEND)
        self._slo = slo
        for collector in collectors:
            self._registry.register(collector)
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
        self._admission_time = self._histogram(
            "request_admission_time_seconds",
            "From arrival to admission: read, checked, encoded, placed.",
            FIRST_TOKEN_BUCKETS,
        )
        self._prefill_time = self._histogram(
            "request_prefill_time_seconds",
            "From the start of its prefill on a worker to the first token.",
            LATENCY_BUCKETS,
        )
        self._queue_time = self._histogram(
            "request_queue_time_seconds",
            "From arrival to the start of its prefill on a worker.",
            LATENCY_BUCKETS,
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
        self._cached_by_source = self._by_source(
            "prompt_tokens_cached_by_source", "The same, by where their KV lay.", SOURCES
        )
        self._prompt_by_source = self._by_source(
            "prompt_tokens_by_source",
            "Prompt tokens that were prefilled, by how.",
            ("local_compute", "local_cache_hit", "external_kv_transfer"),
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
        self._rejections = Counter(
            PREFIX + "admission_rejections",
            "Requests turned away with 503, by what there was too much of.",
            ("model_name", "engine", "reason"),
            registry=self._registry,
        )
        self._judged = Counter(
            PREFIX + "slo_requests",
            "Requests that kept or missed an objective, or all of them.",
            ("model_name", "engine", "slo", "outcome"),
            registry=self._registry,
        )
        for objective in slo.names:
            for outcome in ("kept", "missed"):
                self._judged.labels(*self._labels, objective, outcome)
        for reason in ("stop", "length", "abort", "error"):
            self._success.labels(*self._labels, reason)
        for end in (Moment.FINISHED, Moment.REFUSED, Moment.ABORTED, Moment.FAILED):
            self._ends.labels(*self._labels, end.value)
        for reason in REJECTIONS:
            self._rejections.labels(*self._labels, reason)

    def token_gap(self, seconds: float) -> None:
        """Two tokens of a choice came this far apart."""
        self._inter_token.observe(seconds)

    def rejected(self, overload: Overloaded) -> None:
        """A request was turned away; it ends too."""
        self._rejections.labels(*self._labels, overload.code or "other").inc()

    def ended(self, life: Timeline) -> None:
        """A request has ended: count it, once."""
        assert life.end is not None
        self._ends.labels(*self._labels, life.end.value).inc()
        if life.end is Moment.REFUSED:
            return
        self._prompt_tokens.inc(life.num_prompt_tokens)
        self._count_sources(life)
        self._output_tokens.inc(life.num_output_tokens)
        unfinished = "abort" if life.end is Moment.ABORTED else "error"
        if not life.choices:
            self._success.labels(*self._labels, unfinished).inc()
        for times in life.choices.values():
            self._success.labels(*self._labels, times.finish_reason or unfinished).inc()
            self._request_output.observe(times.num_tokens)
            _observe(self._per_output_token, times.per_output_token)
        if life.end is not Moment.ABORTED:
            for objective, kept in self._slo.verdicts(life).items():
                self._judged.labels(*self._labels, objective, "kept" if kept else "missed").inc()
        _observe(self._first_token, life.time_to_first_token)
        _observe(self._admission_time, life.seconds(Moment.ARRIVED, Moment.ADMITTED))
        _observe(self._queue_time, life.queue_time)
        _observe(self._prefill_time, life.prefill_time)
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

    def _count_sources(self, life: Timeline) -> None:
        """Where the KV of its prompts came from, of a request that has got that far."""
        if life.time_to_first_token is None:
            return
        cached = life.cached_by_source
        self._cached_tokens.inc(life.num_cached_tokens)
        for source, num in cached.items():
            self._cached_by_source[source].inc(num)
        by_source = self._prompt_by_source
        by_source["local_compute"].inc(life.num_prompt_tokens - life.num_cached_tokens)
        by_source["local_cache_hit"].inc(cached["device"] + cached["host"])
        by_source["external_kv_transfer"].inc(cached["p2p"] + cached["disk"])

    def _by_source(self, name: str, text: str, sources: Sequence[str]) -> dict[str, Counter]:
        family = Counter(
            PREFIX + name, text, ("model_name", "engine", "source"), registry=self._registry
        )
        return {source: family.labels(*self._labels, source) for source in sources}

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
