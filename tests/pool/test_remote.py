"""Calls that name another instance: over a socket pair, to a pool with real arenas."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import msgspec
import pytest

from memserve.channel import Channel
from memserve.errors import ChannelClosed, OutOfBlocks, PoolError, StaleReference
from memserve.messages import PoolAnswer, PoolCall, ToLauncher, ToWorker
from memserve.pool.refs import BlockRef, Encoding, Kind, Tier
from memserve.pool.remote import PoolReply, PoolRequest, RemotePool
from memserve.pool.service import PoolService
from tests.pool.test_tiers import NUM_DRAM, NUM_HBM, Instance, contents

PROMPT = [1, 1, 2, 1, 1, 2]
MAX_PULLS = 2


class Served(Instance):
    """An instance that answers calls; its copies run at once, or when the test says so."""

    def __init__(self, number: int, dram_encoding: Encoding = "plain") -> None:
        super().__init__(number, dram_encoding)
        self.now = 0.0
        self.answers: list[PoolAnswer] = []
        self.hold_copies = False
        self.held: list[tuple[int, list[BlockRef], list[int], Tier]] = []
        self.service = PoolService(
            self.pool,
            lambda number, reply: self.answers.append(PoolAnswer(number, reply)),
            lambda *copy: self.held.append(copy),
            deliver=lambda private, refs: self.delivered.append((private, refs)),
            max_pulls=MAX_PULLS,
        )
        self.delivered: list[tuple[bytes, list[BlockRef]]] = []

    def run_copies(self) -> None:
        while self.held:
            number, refs, into, tier = self.held.pop(0)
            verified = self.transfer.read(refs, into, tier=tier)
            self.service.pulled(number, verified, self.now)

    def handle(self, call: PoolCall) -> None:
        self.service.handle(call.number, call.request, self.now)
        if not self.hold_copies:
            self.run_copies()

    def cache(self, tokens: list[int], tier: Tier = Tier.HBM) -> list[BlockRef]:
        """Compute and cache a prompt; references to its blocks."""
        blocks = self.pool.alloc_mem(len(tokens) // 2, Kind[tier.name])
        self.write(blocks, contents(tokens, "", len(blocks)))
        refs = self.pool.refs(self.pool.insert(tokens, blocks))
        self.pool.free_mem(blocks)
        return refs

    def books(self) -> list[str]:
        return self.pool.audit({"others": self.service.blocks}, {"copies": self.service.in_flight})


class SocketControl:
    """Carries calls over one socket pair to instance 1, as the launcher's channel does."""

    def __init__(self, channel: Channel[ToLauncher]) -> None:
        self._channel = channel
        self._answers: dict[int, asyncio.Future[PoolReply]] = {}

    def tell(self, instance: int, request: PoolRequest) -> None:
        assert instance == 1
        with suppress(ChannelClosed):
            self._channel.send(PoolCall(-1, request))

    async def call(self, instance: int, request: PoolRequest) -> PoolReply:
        if instance != 1:
            raise ChannelClosed("there is no such instance")
        number = len(self._answers)
        self._answers[number] = asyncio.get_running_loop().create_future()
        self._channel.send(PoolCall(number, request))
        return await self._answers[number]

    async def read(self) -> None:
        async for batch in self._channel.batches():
            for message in batch:
                assert isinstance(message, PoolAnswer)
                if message.number >= 0 and not self._answers[message.number].done():
                    self._answers[message.number].set_result(message.reply)


@asynccontextmanager
async def two_instances(
    lease_s: float = 30.0, dram_encoding: Encoding = "plain"
) -> AsyncIterator[tuple[RemotePool, Served, Served]]:
    """A remote pool that reaches instance 1; instance 0 is the source. The books agree at the end."""
    source, served = (Served(number, dram_encoding) for number in range(2))
    for arena in source.arenas.values():
        served.transfer.map(arena.descriptor, arena.fd)
    ours, theirs = socket.socketpair()
    channel = await Channel[ToLauncher].open(ours, ToLauncher)
    worker = await Channel[ToWorker].open(theirs, ToWorker)

    async def serve() -> None:
        async for batch in worker.batches():
            for message in batch:
                assert isinstance(message, PoolCall)
                served.handle(message)
                for answer in served.answers:
                    worker.send(answer)
                served.answers.clear()

    control = SocketControl(channel)
    tasks = [asyncio.create_task(serve()), asyncio.create_task(control.read())]
    try:
        yield RemotePool(control, lease_s=lease_s), source, served
        assert source.books() == []
        assert served.books() == []
    finally:
        await channel.close()
        await worker.close()
        await asyncio.gather(*tasks)
        for instance in (source, served):
            for arena in instance.arenas.values():
                arena.close()


@pytest.mark.parametrize(
    ("kind", "tiers"),
    [
        (Kind.HBM, [Tier.HBM] * 5),
        (Kind.DRAM, [Tier.DRAM] * 5),
        (Kind.MIXED, [Tier.HBM] * 5),
    ],
)
async def test_memory_of_another_instance_is_allocated_and_freed(
    kind: Kind, tiers: list[Tier]
) -> None:
    async with two_instances() as (remote, _, served):
        refs = await remote.alloc_mem(5, kind, instance=1)
        assert [Tier(ref.tier) for ref in refs] == tiers
        assert {(ref.instance, ref.epoch) for ref in refs} == {(1, 1)}
        assert len(served.service.blocks) == 5
        await remote.free_mem(refs)
        assert served.service.blocks == []
        assert served.pool.num_free == NUM_HBM


async def test_mixed_memory_takes_what_is_free_in_hbm_and_the_rest_in_dram() -> None:
    async with two_instances() as (remote, _, _):
        refs = await remote.alloc_mem(NUM_HBM + 2, Kind.MIXED, instance=1)
        assert [ref.tier for ref in refs] == [Tier.HBM] * NUM_HBM + [Tier.DRAM] * 2


async def test_an_allocation_that_can_not_be_met_changes_nothing() -> None:
    async with two_instances() as (remote, _, served):
        with pytest.raises(OutOfBlocks):
            await remote.alloc_mem(NUM_HBM + NUM_DRAM + 1, Kind.MIXED, instance=1)
        assert served.pool.num_free == NUM_HBM
        with pytest.raises(ChannelClosed):
            await remote.alloc_mem(1, Kind.HBM, instance=2)


@pytest.mark.parametrize("encoding", ["plain", "int8"])
@pytest.mark.parametrize("kind", [Kind.HBM, Kind.DRAM])
@pytest.mark.parametrize("tier", list(Tier))
async def test_blocks_are_transferred_from_either_tier_into_either(
    kind: Kind, tier: Tier, encoding: Encoding
) -> None:
    async with two_instances(dram_encoding=encoding) as (remote, source, served):
        refs = source.cache(PROMPT, tier)
        copies = await remote.transfer(1, refs, kind=kind)
        blocks = served.service.blocks
        assert served.pool.refs(blocks) == copies
        for block, value in zip(blocks, contents(PROMPT, "", 3), strict=True):
            assert served.holds(block, value)


async def test_a_transfer_goes_into_the_blocks_that_were_allocated_for_it() -> None:
    async with two_instances() as (remote, source, _):
        refs = source.cache(PROMPT)
        room = await remote.alloc_mem(3, Kind.DRAM, instance=1)
        assert await remote.transfer(1, refs, room) == room
        with pytest.raises(PoolError):
            await remote.transfer(1, refs, room[:2])


async def test_a_transfer_with_insert_copies_only_what_is_lacking_and_is_matched_after_it() -> None:
    async with two_instances() as (remote, source, served):
        served.cache(PROMPT[:2])
        refs = source.cache(PROMPT)
        cached = await remote.transfer_with_insert(1, PROMPT, refs, kind=Kind.DRAM)
        assert [ref.tier for ref in cached] == [Tier.HBM, Tier.DRAM, Tier.DRAM]
        assert served.service.num_pulled_blocks == 2
        with served.pool.match(PROMPT) as match:
            for block, value in zip(match.blocks, contents(PROMPT, "", 3), strict=True):
                assert served.holds(block, value)
        assert await remote.transfer_with_insert(1, PROMPT, refs) != cached  # now all in HBM
        assert served.service.num_pulled_blocks == 4


async def test_private_data_reaches_the_receiver_with_the_blocks_that_it_came_with() -> None:
    async with two_instances() as (remote, source, served):
        refs = source.cache(PROMPT)
        copies = await remote.transfer(1, refs, private=b"ticket 7")
        assert served.delivered == [(b"ticket 7", copies)]
        cached = await remote.transfer_with_insert(1, PROMPT, refs, private=b"\x00" * 4096)
        assert served.delivered[1:] == [(b"\x00" * 4096, cached)]
        await remote.transfer(1, refs[:1])
        assert len(served.delivered) == 2


async def test_private_data_of_a_refused_transfer_is_not_delivered() -> None:
    async with two_instances() as (remote, source, served):
        refs = source.cache(PROMPT)
        gone = msgspec.structs.replace(refs[0], generation=refs[0].generation + 1)
        with pytest.raises(StaleReference):
            await remote.transfer(1, [gone], private=b"ticket 7")
        with pytest.raises(PoolError, match="4096 at most"):
            await remote.transfer(1, refs, private=b"x" * 4097)
        assert served.delivered == []
        assert served.pool.num_free == NUM_HBM


async def test_a_source_that_lost_its_content_is_refused_or_ends_the_prefix() -> None:
    async with two_instances() as (remote, source, served):
        refs = source.cache(PROMPT)
        gone = [*refs[:2], msgspec.structs.replace(refs[2], generation=refs[2].generation + 1)]
        with pytest.raises(StaleReference):
            await remote.transfer(1, gone)
        assert served.pool.num_free == NUM_HBM
        assert len(await remote.transfer_with_insert(1, PROMPT, gone)) == 2


async def test_what_is_not_renewed_in_time_is_freed_and_its_references_die() -> None:
    async with two_instances() as (remote, source, served):
        refs = await remote.alloc_mem(2, Kind.HBM, instance=1)
        served.now = 29.0
        served.service.expire(served.now)
        assert len(served.service.blocks) == 2
        served.now = 31.0
        served.service.expire(served.now)
        assert served.service.blocks == []
        assert served.service.num_expired == 2
        await remote.free_mem(refs)
        with pytest.raises(StaleReference):
            await remote.transfer(1, source.cache(PROMPT)[:2], refs)


async def test_a_heartbeat_keeps_a_lease_alive() -> None:
    async with two_instances(lease_s=0.03) as (remote, _, served):
        renewed = asyncio.Event()
        handle = served.handle

        def noticing(call: PoolCall) -> None:
            handle(call)
            if served.now > 0:
                renewed.set()

        served.handle = noticing  # type: ignore[method-assign]
        refs = await remote.alloc_mem(2, Kind.HBM, instance=1)
        served.now = 0.02
        async with remote.renewing():
            await renewed.wait()
        served.service.expire(0.04)
        assert served.pool.refs(served.service.blocks) == refs


async def test_a_lease_that_ends_during_a_copy_frees_nothing_under_it() -> None:
    async with two_instances() as (remote, source, served):
        served.hold_copies = True
        room = await remote.alloc_mem(3, Kind.HBM, instance=1)
        transfer = asyncio.create_task(remote.transfer(1, source.cache(PROMPT), room))
        while not served.held:
            await asyncio.sleep(0)
        served.now = 1000.0
        served.service.expire(served.now)
        rest = served.pool.alloc_mem(NUM_HBM - 3)
        with pytest.raises(OutOfBlocks):
            served.pool.alloc_mem(1)
        served.pool.free_mem(rest)
        served.run_copies()
        transfer.cancel()


async def test_history_is_exported_hottest_first_and_every_prefix_after_its_beginning() -> None:
    async with two_instances() as (remote, _, served):
        served.cache([1, 1, 2, 1])
        served.cache([2, 1])
        served.cache([1, 1, 1, 2])
        prefixes = await remote.export(1, 100)
        assert [prefix.tokens for prefix in prefixes] == [
            [1, 1],
            [1, 1, 1, 2],
            [2, 1],
            [1, 1, 2, 1],
        ]
        assert [prefix.tokens for prefix in await remote.export(1, 2)] == [[1, 1], [1, 1, 1, 2]]


@pytest.mark.parametrize(
    ("known_tier", "num_free_hbm", "tier"),
    [
        (Tier.HBM, 1, Tier.HBM),
        (Tier.HBM, 0, Tier.DRAM),
        (Tier.DRAM, NUM_HBM, Tier.DRAM),
    ],
)
async def test_a_mixed_transfer_drops_no_history_and_continues_where_its_prefix_lies(
    known_tier: Tier, num_free_hbm: int, tier: Tier
) -> None:
    async with two_instances() as (remote, source, served):
        refs = source.cache(PROMPT)
        served.cache(PROMPT[:4], known_tier)
        held = served.pool.alloc_mem(served.pool.num_free - num_free_hbm)
        cached = await remote.transfer_with_insert(1, PROMPT, refs, kind=Kind.MIXED)
        served.pool.free_mem(held)
        assert [Tier(ref.tier) for ref in cached] == [known_tier, known_tier, tier]
        assert served.pool.stats().evictions == 0
