"""Messages between ranks arrive whole, with their descriptors, or not at all."""

import os
import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from memserve.errors import ChannelClosed
from memserve.pool.refs import BlockRef, Tier
from memserve.tensor.messages import Copy, Done, Move, Pull, Step
from memserve.tensor.wire import Wire

Pair = tuple[Wire[Copy | Step], Wire[Copy | Step]]


@pytest.fixture
def pair() -> Iterator[Pair]:
    left, right = (Wire[Copy | Step](each, Copy | Step) for each in socket.socketpair())
    yield left, right
    left.close()
    right.close()


def test_messages_arrive_in_order(pair: Pair) -> None:
    left, right = pair
    pull = Pull([BlockRef(1, 2, 0, 3, 4)], [5], Tier.DRAM)
    left.send(pull)
    left.send(Move([1], [2], Tier.HBM))
    assert right.receive() == (pull, [])
    assert right.receive() == (Move([1], [2], Tier.HBM), [])


def test_a_message_larger_than_any_buffer_arrives_whole(pair: Pair) -> None:
    left, right = pair
    step = Step(b"", b"", b"", os.urandom(5_000_000), b"")
    sender = threading.Thread(target=left.send, args=(step,))
    sender.start()
    assert right.receive() == (step, [])
    sender.join()


def test_descriptors_come_with_their_message(pair: Pair) -> None:
    left, right = pair
    read, write = os.pipe()
    left.send(Move([], [], Tier.HBM))
    left.send(Move([1], [1], Tier.HBM), [write])
    os.close(write)
    assert right.receive() == (Move([], [], Tier.HBM), [])
    message, (received,) = right.receive()
    assert message == Move([1], [1], Tier.HBM)
    assert not os.get_inheritable(received)
    os.write(received, b"x")
    assert os.read(read, 1) == b"x"
    os.close(received)
    os.close(read)


def test_the_end_of_the_other_rank_is_told_apart_from_a_message(pair: Pair) -> None:
    left, right = pair
    left.close()
    assert right.wait(0)
    with pytest.raises(ChannelClosed):
        right.receive()
    with pytest.raises(ChannelClosed):
        right.send(Done())


def test_half_a_message_is_none() -> None:
    ours, theirs = socket.socketpair()
    wire = Wire[Done](theirs, Done)
    ours.sendall(struct.pack("<I", 100) + b"half")
    ours.close()
    with pytest.raises(ChannelClosed, match="middle"):
        wire.receive()
    wire.close()
