"""Messages between two ranks of one instance: blocking, over a connected Unix stream socket.

A frame is its length in 4 bytes and a tagged struct of `memserve.tensor.messages` as MessagePack;
file descriptors travel with the length. Both ends are our own, and nothing that arrives is executed.
"""

import os
import select
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Generic, TypeVar

import msgspec

from memserve.errors import ChannelClosed

MAX_DESCRIPTORS = 4
_LENGTH = struct.Struct("<I")

T = TypeVar("T")


class Wire(Generic[T]):
    """One end of a socket pair that carries messages of type `T` towards this process.

    One thread at a time may send, and one receive.
    """

    def __init__(self, sock: socket.socket, incoming: Any) -> None:  # noqa: ANN401
        """Takes the socket over; `incoming` is the union of types to expect."""
        self._socket = sock
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(incoming)

    def send(self, message: msgspec.Struct, descriptors: Sequence[int] = ()) -> None:
        """Send one message; raises `ChannelClosed` if the other rank has gone."""
        self.send_frame(frame(self._encoder.encode(message)), descriptors)

    def send_frame(self, data: bytes, descriptors: Sequence[int] = ()) -> None:
        """Send what `frame` made of a message."""
        try:
            if descriptors:
                first, data = data[: _LENGTH.size], data[_LENGTH.size :]
                socket.send_fds(self._socket, [first], list(descriptors))
            self._socket.sendall(data)
        except OSError as error:
            raise ChannelClosed(f"another rank has gone: {error}") from None

    def receive(self) -> tuple[T, list[int]]:
        """The next message and the descriptors with it; raises `ChannelClosed` at the end."""
        try:
            first, descriptors, _, _ = socket.recv_fds(self._socket, _LENGTH.size, MAX_DESCRIPTORS)
            for descriptor in descriptors:
                os.set_inheritable(descriptor, False)
            first += self._read(_LENGTH.size - len(first)) if first else b""
            if not first:
                raise ChannelClosed("another rank has gone")
            body = self._read(_LENGTH.unpack(first)[0])
        except OSError as error:
            raise ChannelClosed(f"another rank has gone: {error}") from None
        return self._decoder.decode(body), descriptors

    def wait(self, seconds: float) -> bool:
        """Whether something arrives, or the other end goes, in that time."""
        return bool(select.select([self._socket], [], [], seconds)[0])

    def close(self) -> None:
        """End the connection; whoever waits at either end is woken."""
        with suppress(OSError):  # the other end was first
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _read(self, size: int) -> bytes:
        data = bytearray(size)
        view, done = memoryview(data), 0
        while done < size:
            count = self._socket.recv_into(view[done:])
            if not count:
                raise ChannelClosed("another rank has gone in the middle of a message")
            done += count
        return bytes(data)


def frame(body: bytes) -> bytes:
    """An encoded message with its length in front."""
    return _LENGTH.pack(len(body)) + body
