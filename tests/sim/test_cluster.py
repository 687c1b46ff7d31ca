"""Simulations end, repeat themselves, and take the time that can be computed by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memserve.errors import UsageError
from memserve.sim.cluster import SimulatedCluster, simulate
from memserve.sim.dialogues import Dialogue
from tests.sim.clusters import chat, problems, profile, scheduler_config, setting, single

LAYOUTS = ["1M", "2M", "1P1D", "2P1D", "1P1D1M"]


def run(layout: str, dialogues: list[Dialogue], **changes: float) -> SimulatedCluster:
    cluster = SimulatedCluster(
        setting(layout, profile(**changes)),  # type: ignore[arg-type]
        iter(dialogues),
    )
    cluster.run()
    return cluster


def test_a_lone_request_takes_its_steps() -> None:
    cluster = run("1M", [single(2.0, 1, 100, 5)])
    (outcome,) = cluster.outcomes.requests
    # Chunks of 64 and 36 tokens, then four decode steps.
    assert outcome.ttft == pytest.approx((0.01 + 0.0064) + (0.01 + 0.0036))
    assert outcome.jct == pytest.approx(outcome.ttft + 4 * 0.011)
    assert cluster.instances[0].work.busy == pytest.approx(outcome.jct)


def test_a_prompt_slows_those_that_decode() -> None:
    cluster = run("1M", [single(0.0, 1, 32, 40), single(0.1, 2, 63, 1)])
    first, second = sorted(cluster.outcomes.requests, key=lambda outcome: outcome.sent)
    # 1 + 39 steps; one of them also computes the other's 63 tokens.
    assert first.jct == pytest.approx(0.01 + 0.0032 + 39 * 0.011 + 0.0063)
    # It arrives in the eighth decode step (it ends at .0132 + 8 * .011) and runs in the next.
    assert second.ttft == pytest.approx(0.0132 + 8 * 0.011 - 0.1 + 0.011 + 0.0063)


def test_a_handover_takes_its_copies() -> None:
    cluster = run("1P1D", [single(0.0, 1, 64, 3)])
    (outcome,) = cluster.outcomes.requests
    assert outcome.ttft == pytest.approx(0.0164)
    # Four blocks of 16,000 bytes, a millisecond before the first.
    copy = 0.001 + 4 * 16_000 / 1e9
    assert outcome.jct == pytest.approx(0.0164 + copy + 2 * 0.011)
    assert (outcome.prefilled_on, outcome.decoded_on) == (0, 1)


def test_a_second_turn_computes_only_what_is_new() -> None:
    cluster = run("1M", [chat(0.0, 1, [(40, 24), (20, 4)])])
    first, second = cluster.outcomes.requests
    assert first.num_cached_tokens == 0
    assert second.num_cached_tokens == 48  # three blocks; the answer's last token has no KV
    assert second.ttft == pytest.approx(0.01 + (84 - 48) * 1e-4)


def test_generated_blocks_come_back_to_prefill_in_the_third_design_alone() -> None:
    returned = {}
    for design in ("off", "1", "2", "3"):
        config = scheduler_config(context_caching=design)
        cluster = SimulatedCluster(
            setting("1P1D", profile(), config=config), iter([chat(0.0, 1, [(40, 40), (20, 4)])])
        )
        cluster.run()
        returned[design] = cluster.instances[0].arrivals.num_returned_blocks
    # Prefill has two blocks of 40 tokens; with 39 more there are four. The next answer fills none.
    assert returned == {"off": 0, "1": 0, "2": 0, "3": 2}


def test_a_late_joiner_ends_a_run_of_decode_steps_at_the_step_under_way() -> None:
    alone = run("1M", [single(0.0, 1, 32, 400)])
    together = run("1M", [single(0.0, 1, 32, 400), single(1.0, 2, 32, 1)])
    assert alone.clock.num_events < 20
    one, two = (cluster.outcomes for cluster in (alone, together))
    longer = max(outcome.jct for outcome in two.requests)
    assert longer == pytest.approx(one.requests[0].jct + 32e-4)


def test_instances_on_one_device_slow_each_other() -> None:
    dialogues = [single(0.0, 1, 32, 100), single(0.0, 2, 32, 100)]
    machine = profile(contention=0.5)
    shared = simulate(setting("2M", machine, num_devices=1), iter(dialogues)).figures()
    own = simulate(
        setting("2M", machine), iter([single(0.0, 1, 32, 100), single(0.0, 2, 32, 100)])
    ).figures()
    assert 1.3 * own.jct_mean < shared.jct_mean < 1.6 * own.jct_mean


def test_a_full_cache_preempts_the_youngest_and_all_end() -> None:
    dialogues = [single(0.01 * i, i, 90, 60) for i in range(1, 9)]
    cluster = run("1M", dialogues, kv_cache_tokens=320)
    assert len(cluster.outcomes.requests) == 8
    assert cluster.instances[0].batcher.num_preemptions > 0
    assert problems(cluster) == []


def test_a_request_that_fits_no_instance_is_refused() -> None:
    cluster = run("1M", [single(0.0, 1, 500, 60), single(0.0, 2, 50, 6)], kv_cache_tokens=320)
    assert cluster.outcomes.num_refused == 1
    assert len(cluster.outcomes.requests) == 1


def test_a_layout_in_which_nobody_decodes_is_refused() -> None:
    with pytest.raises(UsageError, match="needs instances"):
        setting("2P", profile())


def mix(seed: int, num: int) -> list[Dialogue]:
    rng = np.random.default_rng(seed)
    found = []
    start = 0.0
    for name in range(num):
        start += float(rng.exponential(0.05))
        turns = [
            (int(rng.integers(1, 120)), int(rng.integers(1, 40)))
            for _ in range(int(rng.integers(1, 4)))
        ]
        found.append(chat(start, name % (num // 2 + 1), turns))
    return found


def test_equal_seeds_give_equal_figures() -> None:
    runs = [
        simulate(
            setting("1P1D1M", profile(noise=0.1), config=scheduler_config(), seed=seed),
            iter(mix(3, 20)),
        ).figures()
        for seed in (5, 5, 6)
    ]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    layout=st.sampled_from(LAYOUTS),
    design=st.sampled_from(["off", "1", "2", "3"]),
    policy=st.sampled_from(["round-robin", "least-load", "session", "prompt-tree", "cost"]),
    capacity=st.sampled_from([640, 1024, 8192]),
    dram=st.sampled_from([0, 512]),
)
def test_every_request_ends_once_and_the_books_agree(
    seed: int, layout: str, design: str, policy: str, capacity: int, dram: int
) -> None:
    config = scheduler_config(
        context_caching=design, routing_policy=policy, elastic_roles=policy == "cost"
    )
    machine = profile(kv_cache_tokens=capacity, dram_cache_tokens=dram, noise=0.05)
    dialogues = mix(seed, 12)
    cluster = Watched(setting(layout, machine, config=config, seed=seed), iter(dialogues))
    cluster.run()
    num_ended = len(cluster.outcomes.requests) + cluster.outcomes.num_refused
    assert num_ended == cluster.num_asked
    assert len(set(map(id, cluster.outcomes.requests))) == len(cluster.outcomes.requests)
    assert problems(cluster) == []
    assert cluster.times == sorted(cluster.times)
    for outcome in cluster.outcomes.requests:
        assert outcome.sent < outcome.first_token <= outcome.end


class Watched(SimulatedCluster):
    """Looks at virtual time and at the caches whenever a request is sent."""

    num_asked = 0

    def __init__(self, *arguments: object) -> None:
        self.times: list[float] = []
        super().__init__(*arguments)  # type: ignore[arg-type]

    def _send(self, *arguments: object) -> None:
        self.num_asked += 1
        self.times.append(self.clock.now)
        for instance in self.instances:
            used = instance.cache.num_private + instance.cache.num_indexed
            assert used <= instance.num_blocks[0]
            assert instance.cache.num_free >= 0
        super()._send(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", ["1M", "2M", "1P1D"])
def test_past_saturation_more_keep_the_objective_if_others_are_turned_away(layout: str) -> None:
    slo = 0.25
    kept, turned_away = {}, {}
    for admission in ("none", "reject"):
        config = scheduler_config(
            routing_policy="cost", slo_ttft=slo, slo_admission=admission, elastic_roles=True
        )
        dialogues = [single(number * 0.02, number, 300, 4) for number in range(300)]
        machine = profile(max_num_batched_tokens=64)
        cluster = SimulatedCluster(setting(layout, machine, config=config), iter(dialogues))
        outcomes = cluster.run()
        kept[admission] = outcomes.num_kept(slo, None)
        turned_away[admission] = outcomes.num_rejected
        assert len(outcomes.requests) + outcomes.num_rejected == 300
        assert problems(cluster) == []
    assert turned_away["none"] == 0
    assert turned_away["reject"] > 50
    assert kept["reject"] > 2 * kept["none"]


@pytest.mark.parametrize("layout", ["1M", "2M"])
def test_running_answers_keep_their_pace_beside_prompts_without_end(layout: str) -> None:
    slo = 0.04
    figures = {}
    for objective in (None, slo):
        config = scheduler_config(
            routing_policy="cost",
            max_num_batched_tokens=1024,
            slo_tpot=objective,
            elastic_roles=True,
        )
        dialogues = [single(number * 0.015, number, 300, 20) for number in range(200)]
        machine = profile(max_num_batched_tokens=1024, kv_cache_tokens=16_000)
        cluster = SimulatedCluster(setting(layout, machine, config=config), iter(dialogues))
        outcomes = cluster.run()
        assert len(outcomes.requests) == 200  # they wait, and nobody is turned away
        assert problems(cluster) == []
        figures[objective] = outcomes.num_kept(None, slo)
    assert figures[slo] > 180
    assert figures[None] < 100


def test_a_batch_is_kept_as_small_as_its_pace_demands() -> None:
    slo = 0.018  # a step takes 10 ms, and 1 ms for each that decodes
    kept, turned_away = {}, {}
    for admission in ("none", "reject"):
        config = scheduler_config(routing_policy="cost", slo_tpot=slo, slo_admission=admission)
        dialogues = [single(number * 0.05, number, 16, 60) for number in range(200)]
        outcomes = SimulatedCluster(setting("1M", profile(), config=config), iter(dialogues)).run()
        kept[admission] = outcomes.num_kept(None, slo)
        turned_away[admission] = outcomes.num_rejected
    assert turned_away["none"] == 0
    assert 0 < turned_away["reject"] < 150
    assert kept["reject"] > 2 * kept["none"]


def test_below_saturation_nobody_is_turned_away() -> None:
    config = scheduler_config(
        routing_policy="cost", slo_ttft=0.3, slo_tpot=0.05, slo_admission="reject"
    )
    dialogues = [single(number * 0.2, number, 300, 4) for number in range(100)]
    cluster = SimulatedCluster(setting("1M", profile(), config=config), iter(dialogues))
    assert cluster.run().num_rejected == 0
