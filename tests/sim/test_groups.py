"""Prompts that several simulated instances prefill together."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memserve.scheduler import group_chunks
from memserve.sim.cluster import SimulatedCluster
from tests.sim.clusters import chat, problems, profile, scheduler_config, setting, single
from tests.sim.test_cluster import mix

SYNC = 1e-3


def run(layout: str, dialogues: list, *, max_sp: int = 0, **changes: float) -> SimulatedCluster:  # type: ignore[type-arg]
    config = scheduler_config(
        max_sp=max_sp, sp_min_tokens=64, routing_policy="cost", elastic_roles=True
    )
    cluster = SimulatedCluster(
        setting(layout, profile(**changes), config=config),  # type: ignore[arg-type]
        iter(dialogues),
    )
    cluster.run()
    assert problems(cluster) == []
    return cluster


def test_two_instances_take_half_of_the_rows_each_and_the_synchronisation() -> None:
    cluster = run("2M", [single(0.0, 1, 1024, 5)])
    (outcome,) = cluster.outcomes.requests
    assert cluster.outcomes.num_groups == 1
    # Eight chunks of 64 tokens for each; pairs cost nothing here.
    assert outcome.ttft == pytest.approx(8 * (0.01 + 0.0064 + SYNC))
    assert outcome.jct == pytest.approx(outcome.ttft + 4 * 0.011)
    assert [one.work.num_prefill_tokens for one in cluster.instances] == [512, 512]
    alone = run("2M", [single(0.0, 1, 1024, 5)], max_sp=1)
    assert alone.outcomes.num_groups == 0
    assert alone.outcomes.requests[0].ttft == pytest.approx(16 * (0.01 + 0.0064))


def test_what_decodes_on_a_rank_goes_on_beside_its_share() -> None:
    cluster = run("2M", [single(0.0, 1, 32, 60), single(0.1, 2, 512, 1)])
    first, _ = sorted(cluster.outcomes.requests, key=lambda outcome: outcome.sent)
    assert cluster.outcomes.num_groups == 1
    alone = 0.01 + 0.0032 + 59 * 0.011
    # Four chunks, in each of which one of its tokens is computed.
    assert first.jct == pytest.approx(alone + 4 * (0.0064 + SYNC), abs=0.012)


def test_other_prompts_take_turns_with_its_chunks() -> None:
    others = [single(0.03 + number / 100, 2 + number, 48, 1) for number in range(6)]
    cluster = run("2M", [single(0.0, 1, 1024, 5), *others])
    assert cluster.outcomes.num_groups == 1
    long, *short = sorted(cluster.outcomes.requests, key=lambda outcome: outcome.sent)
    chunk, step = 0.01 + 0.0064 + SYNC, 0.01 + 0.0096 + 0.001
    # Each waits for the chunk under way and, three of them on each instance, for those before it.
    for place, outcome in enumerate(short):
        assert outcome.ttft <= (place // 2 + 1) * (chunk + step)
        assert outcome.first_token < long.first_token
    # Before each of at most six chunks one or both instances computed others.
    assert 8 * chunk < long.ttft <= 8 * chunk + 6 * step


def test_a_second_turn_uses_what_the_first_left_on_its_leader() -> None:
    cluster = run("2M", [chat(0.0, 1, [(640, 5), (320, 4)])])
    _, second = sorted(cluster.outcomes.requests, key=lambda outcome: outcome.sent)
    assert cluster.outcomes.num_groups == 2
    assert second.num_cached_tokens >= 640


def test_a_rank_without_room_dissolves_the_group_and_the_prompt_is_computed_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Else it would not be worth a group's while to compute beside a stream here.
    monkeypatch.setattr(group_chunks, "ABOUT", math.inf)
    first, second = single(0.0, 1, 800, 200), single(0.5, 2, 800, 5)
    cluster = run("2M", [first, second], kv_cache_tokens=1024)
    assert len(cluster.outcomes.requests) == 2
    assert (cluster.outcomes.num_groups, cluster.outcomes.num_dissolved) == (2, 1)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    layout=st.sampled_from(["2M", "3M", "1P1D", "2P1D", "1P1D1M"]),
    capacity=st.sampled_from([640, 1024, 8192]),
    dram=st.sampled_from([0, 512]),
)
def test_every_request_ends_and_the_books_agree(
    seed: int, layout: str, capacity: int, dram: int
) -> None:
    dialogues = mix(seed, 12)
    cluster = run(layout, dialogues, kv_cache_tokens=capacity, dram_cache_tokens=dram, noise=0.05)
    for outcome in cluster.outcomes.requests:
        assert outcome.sent < outcome.first_token <= outcome.end
