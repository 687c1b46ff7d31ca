"""Frames that are no messages, between a launcher and workers that serve: who sent them dies alone.

The channel itself is tested in `tests/test_channel.py`.
"""

import asyncio
import socket
from collections.abc import Callable

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memserve.cluster.cluster import Cluster
from memserve.scheduler.interface import Role
from memserve.workers.link import Hangup, Link
from tests.workers.death import all_serve, until
from tests.workers.rig import (
    RigOptions,
    ThreadWorker,
    answer,
    generation,
    oracle_answer,
    prompts,
    rig,
)

GARBAGE = {
    "no MessagePack": b"\xc1",
    "a frame cut off and another": msgpack.packb({"type": "Declined", "ticket": 1})[:9] * 2,
    "too many items": b"\xdd\x0f\xff\xff\xff",
    "no message": msgpack.packb({"type": "Nothing"}),
    "a wrong field": msgpack.packb({"type": "Declined", "ticket": "1", "reason": ""}),
}


def from_worker(cluster: Cluster, data: bytes) -> None:
    process = cluster.instances[0].process
    assert isinstance(process, ThreadWorker)
    process._control.sendall(data)


def to_worker(cluster: Cluster, data: bytes) -> None:
    channel = cluster.instances[0]._channel
    assert channel is not None
    channel._writer.write(data)


@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE)
@pytest.mark.parametrize("put", [from_worker, to_worker])
async def test_who_is_not_understood_is_replaced_and_no_answer_suffers(
    put: Callable[[Cluster, bytes], None], data: bytes
) -> None:
    roles = (Role.MIXED, Role.MIXED)
    async with rig(RigOptions(roles=roles, step_seconds=0.003)) as cluster:
        asked = prompts(8, longest=30)
        running = [
            asyncio.create_task(answer(cluster, generation(i, prompt, 60)))
            for i, prompt in enumerate(asked)
        ]
        await until(lambda: cluster.num_streams == 8)
        put(cluster, data)
        await until(lambda: cluster.recoveries.num_deaths == 1)
        assert await asyncio.gather(*running) == [[oracle_answer(p, 60)] for p in asked]
        await all_serve(cluster, 2)
        assert sorted(instance.epoch for instance in cluster.instances) == [1, 2]


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=300))
def test_whatever_a_worker_is_sent_its_link_ends_with_the_launcher(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    link = Link(theirs)
    link.start()
    with ours:
        ours.sendall(data)
    while not isinstance(link.inbox.get(timeout=10), Hangup):
        pass
    link.close()
