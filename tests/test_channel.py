"""Messages that are good arrive; whatever else arrives ends the channel, and nothing more."""

import asyncio
import os
import socket
from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memserve import channel
from memserve.channel import Channel, receive_descriptor, send_descriptor
from memserve.errors import ChannelClosed
from memserve.messages import (
    Abort,
    Configure,
    Declined,
    Expect,
    Heartbeat,
    IndexEvents,
    MapPeer,
    PoolAnswer,
    PoolCall,
    Published,
    Settle,
    Submit,
    Tokens,
    ToLauncher,
    ToWorker,
)

DIRECTIONS: list[tuple[Any, list[type[msgspec.Struct]], msgspec.Struct]] = [
    (
        ToLauncher,
        [Tokens, Published, Declined, IndexEvents, PoolAnswer, Heartbeat],
        Declined(1, "no room"),
    ),
    (ToWorker, [Configure, Submit, Expect, Published, Settle, Abort, PoolCall, MapPeer], Abort(1)),
]
"""What one side expects, some kinds of it, and a message of it."""
KINDS = [kind for _, kinds, _ in DIRECTIONS for kind in kinds]


async def received(
    data: bytes, pieces: int = 1, incoming: Any = ToLauncher
) -> tuple[list[Any], bool]:
    """What is read of these bytes, and whether it was taken for messages to the end."""
    ours, theirs = socket.socketpair()
    reading: Channel[Any] = await Channel.open(ours, incoming)
    step = max(len(data) // pieces, 1)
    found: list[Any] = []
    with theirs:
        theirs.setblocking(False)
        loop = asyncio.get_running_loop()

        async def send() -> None:
            for start in range(0, len(data), step):
                await loop.sock_sendall(theirs, data[start : start + step])
            theirs.shutdown(socket.SHUT_WR)

        sending = asyncio.create_task(send())
        try:
            async for batch in reading.batches():
                found += batch
        except ChannelClosed:
            return found, False
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            await reading.close()
    return found, True


json_like = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text()
    | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(0, 9), inner),
    max_leaves=20,
)  # fmt: skip
named = st.builds(
    lambda kind, fields: {**fields, "type": kind.__name__},
    st.sampled_from(KINDS),
    st.dictionaries(
        st.sampled_from(sorted({field for kind in KINDS for field in kind.__struct_fields__})),
        json_like,
    ),
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    data=st.binary(max_size=400),
    pieces=st.integers(1, 5),
    incoming=st.sampled_from([ToLauncher, ToWorker]),
)
def test_any_bytes_are_messages_or_the_end(data: bytes, pieces: int, incoming: Any) -> None:
    asyncio.run(received(data, pieces, incoming))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(item=json_like | named, direction=st.sampled_from(DIRECTIONS))
def test_any_values_are_messages_or_the_end(item: Any, direction: Any) -> None:
    incoming, _, good = direction
    framed = msgpack.packb(msgspec.to_builtins(good))
    found, to_the_end = asyncio.run(received(framed + msgpack.packb(item), 1, incoming))
    assert found[:1] == [good] or not to_the_end
    assert all(isinstance(message, msgspec.Struct) for message in found)


@settings(max_examples=100, deadline=None)
@given(
    reasons=st.lists(st.text(max_size=20), min_size=1, max_size=5),
    pieces=st.integers(1, 50),
    flip=st.none() | st.tuples(st.integers(0, 10_000), st.integers(1, 255)),
)
def test_messages_arrive_whole_in_order_however_they_are_cut(
    reasons: list[str], pieces: int, flip: tuple[int, int] | None
) -> None:
    messages = [Declined(number, reason) for number, reason in enumerate(reasons)]
    data = bytearray(b"".join(msgpack.packb(msgspec.to_builtins(each)) for each in messages))
    if flip is None:
        assert asyncio.run(received(bytes(data), pieces)) == (messages, True)
    else:
        place, bits = flip
        data[place % len(data)] ^= bits
        asyncio.run(received(bytes(data), pieces))


@pytest.mark.parametrize("incoming", [ToLauncher, ToWorker])
@pytest.mark.parametrize(
    "data",
    [
        b"\xc1",  # no byte of MessagePack
        b"\xdd\x0f\xff\xff\xff",  # a list of 268 million items
        b"\xdf\x0f\xff\xff\xff",
        b"\x91" * 100_000,  # deep lists
        b"\xc7\x05\x01hello",  # an extension
        b"\x81\x80\x01",  # a map as a key
        b"\xa2\xff\xff",  # text that is no UTF-8
        msgpack.packb({"type": "Nothing"}),
        msgpack.packb({"type": "Declined", "ticket": "1", "reason": ""}),
        msgpack.packb({"type": "Tokens", "events": [[1]]}),
    ],
)
async def test_what_is_no_message_closes_the_channel(data: bytes, incoming: Any) -> None:
    assert await received(data, 1, incoming) == ([], False)


async def test_a_frame_without_end_is_refused_before_it_fills_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(channel, "MAX_FRAME", 1 << 20)
    header = b"\xc6" + (1 << 30).to_bytes(4, "big")  # a byte string of a gibibyte
    assert await received(header + bytes(2 << 20), 8) == ([], False)


@settings(max_examples=100, deadline=None)
@given(numbers=st.lists(st.integers(0, 3), max_size=8), cut=st.integers(0, 200))
def test_frames_that_come_twice_or_in_another_order_are_still_whole(
    numbers: list[int], cut: int
) -> None:
    """What they mean then is for who reads them; the last one may be cut off."""
    messages = [Declined(number, "no room") for number in numbers]
    frames = [msgpack.packb(msgspec.to_builtins(each)) for each in messages]
    data = b"".join(frames)
    found, to_the_end = asyncio.run(received(data[: max(0, len(data) - cut)]))
    assert to_the_end
    assert found == messages[: len(found)]
    if not cut:
        assert len(found) == len(messages)


def test_a_descriptor_that_was_received_is_not_inherited() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        send_descriptor(ours, 0)
        descriptor = receive_descriptor(theirs)
        try:
            assert not os.get_inheritable(descriptor)
        finally:
            os.close(descriptor)
