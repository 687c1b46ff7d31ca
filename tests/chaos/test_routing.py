"""Where requests go when loads and knowledge are lopsided (scenarios E1 to E3, E5, E6).

E1 to E3 and E6 ask the scheduler alone, whose time is passed in; E5 runs engines over an oracle.
"""

import dataclasses
from collections import Counter
from contextlib import suppress

import pytest

from memserve.messages import IndexEvents
from memserve.pool.events import Inserted
from memserve.pool.index import pack_tokens
from memserve.scheduler.interface import Ask, Role, RoutingPolicy
from memserve.scheduler.scheduler import Scheduler
from tests.chaos.accidents import ask, assert_well, until
from tests.cluster.test_knowledge import assert_all_is_known, talk
from tests.faults.plan import Action, Fault, Faults
from tests.scheduler.test_policies import BLOCK, busy, hold, prompt, scheduler, send
from tests.workers.rig import PLAIN, RigOptions, rig

MIXED = Role.MIXED
LOAD_AWARE: list[RoutingPolicy] = ["least-load", "prompt-tree", "cost"]


def test_e1_the_users_of_one_hot_prefix_spread_over_all() -> None:
    made = scheduler("cost", *[MIXED] * 4)
    document = prompt(1, 3200)
    hold(made, 0, document)
    places: Counter[int] = Counter()
    for ticket in range(80):
        placement = send(made, ticket, Ask(prompt=[*document, *prompt(ticket, 60)], max_tokens=80))
        places[placement.prefill] += 1
    assert len(places) == 4
    assert max(places.values()) / (80 / 4) <= 1.5


@pytest.mark.parametrize("policy", LOAD_AWARE)
def test_e2_a_long_prompt_counts_from_its_dispatch_on(policy: RoutingPolicy) -> None:
    """32k tokens in, one out: nothing comes back for a long time, and the next one goes elsewhere."""
    made = scheduler(policy, *[MIXED] * 4)
    asks = [Ask(prompt=prompt(ticket, 32_000), max_tokens=1) for ticket in range(4)]
    assert sorted(send(made, number, one).prefill for number, one in enumerate(asks)) == [
        0,
        1,
        2,
        3,
    ]
    short = [send(made, 10 + n, Ask(prompt=prompt(n, 50), max_tokens=1)) for n in range(8)]
    assert max(Counter(each.prefill for each in short).values()) <= 4


@pytest.mark.parametrize("policy", LOAD_AWARE)
def test_e3_misses_go_to_the_least_loaded_and_not_to_the_smallest_tree(
    policy: RoutingPolicy,
) -> None:
    made = scheduler(policy, *[MIXED] * 3)
    hold(made, 0, prompt(1, 16_000))  # much history, no work
    hold(made, 1, prompt(2, 1600))
    busy(made, 1, 6000)
    busy(made, 2, 9000, first_ticket=3000)  # no history at all, much work
    for ticket in range(3):
        placement = made.place(Ask(prompt=prompt(100 + ticket, 400), max_tokens=5), 0.0)
        assert placement.prefill == 0


@pytest.mark.parametrize("policy", LOAD_AWARE)
def test_e6_one_that_joins_cold_is_not_stampeded(policy: RoutingPolicy) -> None:
    """Not even by requests whose history others hold while all have work."""
    made = scheduler(policy, *[MIXED] * 3)
    documents = [prompt(number, 1600) for number in range(12)]
    for number, document in enumerate(documents):
        count = len(document) // BLOCK
        first = number // 3 * count
        event = Inserted(
            "", None, pack_tokens(document), 0, [*range(first, first + count)], [3] * count
        )
        assert made.apply(number % 3, IndexEvents(1 + number // 3, [event]))
        ask_ = Ask(prompt=[*document, *prompt(50 + number, 40)], max_tokens=50)
        send(made, number, ask_)
    made.join(3, MIXED, num_blocks=[10_000], block_bytes=368_640, epoch=1)
    places: Counter[int] = Counter()
    for ticket in range(40):
        document = documents[ticket % 12]
        one = Ask(prompt=[*document, *prompt(500 + ticket, 40)], max_tokens=50)
        places[send(made, 100 + ticket, one, 1.0).prefill] += 1
    assert places[3] <= 2 * 40 / 4
    assert max(places.values()) <= 2 * 40 / 4


@pytest.mark.parametrize("action", [Action.DROP, Action.TWICE, Action.LATER])
async def test_e5_index_events_that_get_lost_doubled_or_late_are_made_good(action: Action) -> None:
    """What was believed meanwhile may have cost time: every answer is right, and then every entry."""
    faults: dict[int, Faults] = {}
    for number in range(2):
        faults[number] = Faults()
        for skip in (2, 9, 10, 20):
            faults[number].arm(Fault(at="from IndexEvents", action=action, skip=skip))
    options = RigOptions(
        roles=(MIXED, MIXED),
        num_blocks=24,
        num_dram_blocks=20,
        faults=faults,
        scheduler=dataclasses.replace(
            PLAIN, routing_policy="cost", fetch_policy="always", context_caching="3"
        ),
    )
    async with rig(options) as cluster:
        await talk(cluster, 0)
        await talk(cluster, 100)
        assert all(one.met["from IndexEvents"] >= 3 for one in faults.values())
        for one in faults.values():
            one.disarm()
        await talk(
            cluster, 200
        )  # what is missing is found so by the next message of the same worker

        async def known() -> bool:
            with suppress(AssertionError):  # a report that got lost as well is asked for again
                await assert_all_is_known(cluster)
                return True
            return False

        await until(known)
        await assert_well(cluster)


async def test_e5_a_reference_that_has_passed_costs_a_miss_and_no_answer() -> None:
    """Nothing is heard of what one instance drops, so that others are sent there in vain."""
    faults = {0: Faults()}
    made: list[Scheduler] = []

    def keep(config: object) -> Scheduler:
        made.append(Scheduler(dataclasses.replace(PLAIN, fetch_policy="always")))
        return made[-1]

    async with rig(RigOptions(roles=(MIXED, MIXED), faults=faults), keep) as cluster:
        document = [9, *range(40)]
        await ask(cluster, 0, document)
        faults[0].arm(Fault(at="from IndexEvents", action=Action.HOLD, times=1000))
        cluster.reset_prefix_cache()
        for number in range(1, 6):
            await ask(cluster, number, [*document, number])
        faults[0].disarm()
        await assert_well(cluster)
