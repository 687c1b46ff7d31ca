"""What the launcher and the clients take of a simulated server's time."""

import dataclasses

import msgspec
import pytest

from memserve.sim.cluster import SimulatedCluster
from memserve.sim.costs import Profile
from memserve.sim.outcome import Outcome
from tests.sim.clusters import profile, setting, single


def outcomes(
    machine: Profile, num_requests: int, max_concurrency: int | None = None
) -> list[Outcome]:
    """Requests of 40 tokens that are sent at once, with answers of 5."""
    asked = (single(0.0, name, 40, 5) for name in range(1, num_requests + 1))
    made = dataclasses.replace(setting("1M", machine), max_concurrency=max_concurrency)
    return SimulatedCluster(made, asked).run().requests


def test_requests_are_read_one_after_the_other() -> None:
    machine = msgspec.structs.replace(profile(), request_seconds=10.0)
    found = outcomes(machine, 3)
    assert [round(one.first_token / 10) for one in found] == [1, 2, 3]
    assert all(one.sent == 0 for one in found)


def test_who_is_being_read_counts_among_those_that_clients_wait_for() -> None:
    machine = msgspec.structs.replace(profile(), request_seconds=10.0)
    first, second = outcomes(machine, 2, max_concurrency=1)
    assert second.sent == first.end


def test_tokens_take_their_time_in_each_step() -> None:
    (plain,) = outcomes(profile(), 1)
    machine = msgspec.structs.replace(profile(), message_seconds=0.1, token_seconds=1.0)
    (busy,) = outcomes(machine, 1)
    # The first token comes with the prompt's step; a step decodes each of the four others.
    assert busy.end - busy.first_token == pytest.approx(plain.end - plain.first_token + 4 * 1.1)
    assert busy.first_token == pytest.approx(plain.first_token + 0.1)
