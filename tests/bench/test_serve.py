"""The load client against a server that can misbehave; its figures, lines and JSON."""

import json
import math
import socket
from pathlib import Path
from typing import Any

import pytest

from memserve.bench.client import CHAT
from memserve.bench.flags import make_options, parse_metrics
from memserve.bench.lines import WIDTH, result_lines
from memserve.bench.load import Outcome, Record
from memserve.bench.results import METRICS, Result, Setup, as_json, summarize, write_json
from memserve.bench.scrape import Look, ServerFigures, between
from memserve.bench.serve import ServeOptions, bench_serve
from memserve.bench.words import text_of
from memserve.errors import UsageError
from memserve.workloads import Limits, Workload, drawn_answer, make_sessions
from memserve.workloads.synthetic import RandomLengths
from tests.bench.fake_openai import FakeServer, running

SHORT = Limits(scale=0.02)
CHATS = Workload(name="sharegpt", num_requests=12, limits=SHORT)
RANDOM = Workload(name="random", num_requests=10, random=RandomLengths(input_len=30, output_len=4))


async def load(fake: FakeServer, workload: Workload, **changes: Any) -> tuple[Result, Record]:
    async with running(fake) as url:
        settings: dict[str, Any] = {"num_warmups": 0, **changes}
        options = ServeOptions(base_url=url, workload=workload, **settings)
        return await bench_serve(options, lambda _: None)


def session_prompts(fake: FakeServer) -> dict[str, list[Any]]:
    """Prompts that the server got, by session, in order."""
    prompts: dict[str, list[Any]] = {}
    for headers, prompt in zip(fake.headers, fake.prompts, strict=True):
        prompts.setdefault(headers["X-Session-Id"], []).append(prompt)
    return prompts


async def test_each_turn_brings_the_servers_own_answers_back() -> None:
    fake = FakeServer()
    result, _ = await load(fake, CHATS)
    prompts = session_prompts(fake)
    for session in make_sessions(CHATS):
        ids = [[90_000 + t for t in range(turn.output_length)] for turn in session.turns]
        expected = [session.prompt(ids[:turn]) for turn in range(len(session.turns))]
        assert prompts.pop(session.session_id) == expected
    assert not prompts
    assert (result.completed, result.failed, result.answer_ids) == (12, 0, "server")


async def test_answers_without_token_ids_are_tokenized_by_the_server_or_drawn() -> None:
    session = next(s for s in make_sessions(CHATS) if len(s.turns) > 1)
    length, new = len(session.turns[0].tokens), session.turns[0].output_length
    for has_tokenizer, origin in ((True, "tokenize"), (False, "drawn")):
        fake = FakeServer(gives_ids=False, has_tokenizer=has_tokenizer)
        result, _ = await load(fake, CHATS)
        assert result.answer_ids == origin
        second = session_prompts(fake)[session.session_id][1]
        answer = [80_000 + len(f"t{t}") for t in range(new)]
        if not has_tokenizer:
            answer = drawn_answer(CHATS.vocab, session, 0)
        assert second[length : length + new] == answer


async def test_the_chat_api_gets_the_conversation_as_text() -> None:
    fake = FakeServer()
    result, _ = await load(fake, CHATS, endpoint=CHAT)
    assert result.completed == 12
    session = next(s for s in make_sessions(CHATS) if len(s.turns) > 1)
    first, second = session_prompts(fake)[session.session_id][:2]
    assert first == [{"role": "user", "content": text_of(session.turns[0].tokens)}]
    assert [message["role"] for message in second] == ["user", "assistant", "user"]
    assert second[1]["content"].split()[0] == "t0"
    assert "return_token_ids" not in fake.bodies[0]


async def test_lengths_are_forced_and_only_known_fields_are_sent() -> None:
    fake = FakeServer()
    result, record = await load(fake, RANDOM, extra_body={"top_k": 3})
    for body in fake.bodies:
        assert set(body) == {
            "model", "prompt", "max_tokens", "stream", "stream_options", "temperature",
            "ignore_eos", "return_token_ids", "top_k",
        }  # fmt: skip
        assert (body["model"], body["max_tokens"], body["ignore_eos"]) == ("fake/model", 4, True)
    assert result.total_input_tokens == 300
    assert result.total_output_tokens == 40
    assert result.total_cached_tokens == 150
    assert result.hit_rate == 0.5
    assert [len(outcome.gaps) for outcome in record.outcomes] == [3] * 10
    for outcome in record.outcomes:
        assert outcome.ttft is not None
        assert outcome.ttft + sum(outcome.gaps) <= outcome.latency


async def test_a_server_that_counts_no_cached_tokens_has_no_hit_rate() -> None:
    result, _ = await load(FakeServer(gives_cached=False), RANDOM)
    assert result.hit_rate is None
    assert "Cache hit rate (%):                      n/a" in result_lines(result, METRICS)


async def test_no_more_requests_run_at_once_than_allowed() -> None:
    fake = FakeServer(token_delay=0.005)
    result, _ = await load(fake, RANDOM, max_concurrency=3)
    assert fake.peak_running == 3
    assert result.max_concurrent_requests == 3


async def test_overload_is_counted_and_ends_its_session() -> None:
    fake = FakeServer(busy_from=4)
    result, _ = await load(fake, CHATS, max_concurrency=1)
    assert result.completed == 4
    assert result.errors == {"503: too many requests": result.failed}
    assert result.completed + result.failed + result.skipped == 12
    assert result.failed
    assert result.skipped


async def test_a_connection_that_breaks_in_mid_stream_is_a_failure() -> None:
    result, record = await load(FakeServer(broken_after=7), RANDOM, max_concurrency=1)
    assert (result.completed, result.failed) == (7, 3)
    assert all(error.startswith("connection: ") for error in result.errors)
    assert {outcome.output_tokens for outcome in record.outcomes[7:]} == {2}


async def test_an_error_in_the_stream_and_a_late_answer_are_failures() -> None:
    result, _ = await load(FakeServer(error_in_stream=True), RANDOM)
    assert result.errors == {"in the stream: a worker died": 10}
    slow = FakeServer(token_delay=5)
    result, _ = await load(slow, RANDOM, timeout=0.2)
    assert result.errors == {"no answer in time": 10}


async def test_no_server_and_a_failed_warm_up_are_mistakes() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # nobody listens
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(UsageError, match="no server answers"):
            await bench_serve(ServeOptions(base_url=url, workload=RANDOM), lambda _: None)
    with pytest.raises(UsageError, match="warm-up request failed: 503: too many"):
        await load(FakeServer(busy_from=0), RANDOM, num_warmups=1)


async def test_prompts_stay_within_the_servers_model() -> None:
    fake = FakeServer()
    long = Workload(name="random", num_requests=2, random=RandomLengths(input_len=9000))
    await load(fake, long)
    assert [len(prompt) for prompt in fake.prompts] == [4000 - 128] * 2


async def test_the_servers_counters_are_those_of_the_load_alone() -> None:
    fake = FakeServer(is_memserve=True)
    result, _ = await load(fake, RANDOM, num_warmups=1)
    assert result.server is not None
    assert len(fake.bodies) == 11
    assert result.server.counters == {"engine_prefill_tokens": 300}
    assert result.server.mean_seconds == {"request_decode_time": 0.25}
    lines = result_lines(result, METRICS)
    assert "engine prefill tokens:                   300" in lines
    assert "request decode time (ms):                250.00" in lines


def test_a_phase_that_did_not_happen_has_no_mean() -> None:
    before = Look({"pulls": 2}, {"queue": 1.0, "decode": 1.0}, {"queue": 4, "decode": 2})
    after = Look({"pulls": 5}, {"queue": 1.0, "decode": 3.0}, {"queue": 4, "decode": 4})
    assert between(before, after) == ServerFigures(
        counters={"pulls": 3}, mean_seconds={"decode": 1.0}
    )


async def test_documents_of_a_file_are_asked_about_in_the_servers_tokens(tmp_path: Path) -> None:
    path = tmp_path / "documents.jsonl"
    pairs = str([{"Q": "who is it", "A": "x"}, {"Q": "why", "A": "y"}])
    path.write_text(json.dumps({"input": "a bb ccc " * 900, "qa_pairs": pairs}) + "\n")
    fake = FakeServer()
    workload = Workload(name="loogle", num_requests=5)
    await load(fake, workload, documents=path)
    for prompt in fake.prompts:
        assert prompt[:6] == [80_001, 80_002, 80_003] * 2
        assert prompt[-3:] in ([80_003, 80_002, 80_002], [*prompt[-3:-1], 80_003])
    path.write_text('{"input": "text", "qa_pairs": "["}\n')
    with pytest.raises(UsageError, match="line 1"):
        await load(fake, workload, documents=path)


SETUP = Setup(
    date="2026-01-02T03:04:05+00:00",
    label=None,
    base_url="http://localhost:1",
    endpoint="/v1/completions",
    model_id="org/model",
    dataset_name="random",
    num_prompts=3,
    request_rate=2.0,
    burstiness=1.0,
    max_concurrency=None,
    seed=0,
    ignore_eos=True,
    scale=1.0,
)


def outcome(ttft: float, latency: float, tokens: int, **changes: Any) -> Outcome:
    fields: dict[str, Any] = {
        "session_id": f"s{ttft}",
        "turn": 0,
        "start": 0.0,
        "gaps": [(latency - ttft) / (tokens - 1)] * (tokens - 1) if tokens > 1 else [],
        "prompt_tokens": 100,
        "cached_tokens": 25,
        "error": None,
    }
    fields |= {"ttft": ttft, "latency": latency, "output_tokens": tokens, **changes}
    return Outcome(**fields)


def known_result(**limits: float) -> tuple[Result, Record]:
    """Three requests, of which one failed, in ten seconds."""
    record = Record(
        outcomes=[
            outcome(0.1, 1.1, 11),
            outcome(0.3, 0.3, 1),
            outcome(9.0, 9.0, 1, error="503: busy"),
        ],
        duration=10.0,
    )
    goodput: Any = limits
    return summarize(SETUP, record, None, percentiles=[50, 99.9], limits=goodput), record


def test_figures_are_those_of_the_completed_requests() -> None:
    result, _ = known_result()
    assert result.latencies["ttft"].mean == pytest.approx(200)
    assert result.latencies["ttft"].std == pytest.approx(100)
    assert result.latencies["ttft"].percentiles == pytest.approx({50: 200, 99.9: 299.8})
    assert result.latencies["tpot"].mean == pytest.approx(100)  # a single token has none
    assert result.latencies["itl"].median == pytest.approx(100)
    assert result.latencies["e2el"].mean == pytest.approx(700)
    assert result.hit_rate == 0.25
    assert (result.completed, result.failed, result.errors) == (2, 1, {"503: busy": 1})


@pytest.mark.parametrize(
    ("limits", "good"),
    [({"ttft": 200}, 1), ({"ttft": 300}, 2), ({"tpot": 99}, 1), ({"ttft": 300, "e2el": 200}, 0)],
)
def test_goodput_counts_requests_that_keep_every_limit(limits: dict[str, float], good: int) -> None:
    result, _ = known_result(**limits)
    assert result.good == good
    body = as_json(result)
    assert body["request_goodput"] == pytest.approx(good / 10)
    assert body["slo_attainment"] == pytest.approx(good / 3)  # a failed request attains nothing


def test_lines_are_laid_out_as_users_of_vllm_know_them() -> None:
    result, _ = known_result(ttft=200)
    lines = result_lines(result, ["ttft", "e2el"])
    assert lines[0] == " Serving Benchmark Result ".center(WIDTH, "=")
    assert lines[-1] == "=" * WIDTH
    for expected in (
        "Successful requests:                     2",
        "Failed requests:                         1",
        "Benchmark duration (s):                  10.00",
        "Request throughput (req/s):              0.20",
        "Request goodput (req/s):                 0.10",
        "---------------Time to First Token----------------",
        "Median TTFT (ms):                        200.00",
        "P99.9 TTFT (ms):                         299.80",
        "Mean JCT (s):                            0.70",
        "Cache hit rate (%):                      25.00",
        "1 x 503: busy",
    ):
        assert expected in lines
    assert not any("TPOT" in text for text in lines)


def test_a_result_file_has_vllms_names_and_every_request_if_asked(tmp_path: Path) -> None:
    result, record = known_result()
    path = write_json(tmp_path / "new", None, SETUP, as_json(result, record))
    assert path.name == "memserve-2qps-model-2026-01-02T030405.json"
    body = json.loads(path.read_text())
    for name in (
        "date", "model_id", "num_prompts", "request_rate", "burstiness", "duration", "completed",
        "failed", "total_input_tokens", "total_output_tokens", "request_throughput",
        "output_throughput", "total_token_throughput", "mean_ttft_ms", "median_tpot_ms",
        "std_itl_ms", "p99.9_e2el_ms", "cache_hit_rate", "error_counts", "server",
    ):  # fmt: skip
        assert name in body
    assert body["ttfts"] == [0.1, 0.3, 9.0]
    assert body["errors"] == [None, None, "503: busy"]
    assert "ttfts" not in as_json(result)
    with pytest.raises(UsageError, match="can't write the result"):
        write_json(path, "x", SETUP, {})


def flags(**changes: Any) -> dict[str, Any]:
    """What click hands over when no flag is given, but for the changes."""
    from memserve.bench.command import serve

    given = {parameter.name: parameter.get_default(_context()) for parameter in serve.params}
    return {name: value for name, value in given.items() if name} | changes


def _context() -> Any:
    from memserve.bench.command import serve

    return serve.make_context("serve", [])


def test_flags_become_options() -> None:
    options = make_options(
        flags(
            dataset_name="prefix_repetition",
            goodput=("ttft:500 tpot:50", "e2el:9000"),
            metric_percentiles="50,99",
            host="box",
            port=9,
        )
    )
    assert options.base_url == "http://box:9"
    assert options.workload.name == "prefix-repetition"
    assert math.isinf(options.workload.rate)
    assert options.goodput == {"ttft": 500, "tpot": 50, "e2el": 9000}
    assert options.percentiles == [50, 99]
    assert parse_metrics("ttft, E2EL") == ["ttft", "e2el"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"goodput": ("ttft",)}, "as ttft:500"),
        ({"goodput": ("speed:3",)}, "no latency 'speed'"),
        ({"metric_percentiles": "101"}, "from 0 to 100"),
        ({"metric_percentiles": "most"}, "must be numbers"),
        ({"extra_body": "[1]"}, "must be a JSON object"),
        ({"vocab_range": (9, 9)}, "no token ids"),
        ({"dataset_name": "poems"}, "no workload 'poems'"),
    ],
)
def test_mistakes_in_flags_are_told_in_one_sentence(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        make_options(flags(**changes))
