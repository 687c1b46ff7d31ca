"""Messages between two processes over a connected Unix socket, and descriptors over a second one.

A `Channel` sends and receives the tagged structs of `memserve.messages` as MessagePack maps; msgpack
does the framing, msgspec checks the types. What arrives is trusted to be memserve's own (both ends
are ours, the socket pair has no name), but never executed: nothing here unpickles, and whatever is
no message ends the channel.

Descriptors are sent before the message that announces them, so that whoever reads the message finds
the descriptor waiting.
"""

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from typing import Any, Generic, TypeVar

import msgpack
import msgspec

from memserve.errors import ChannelClosed

READ_SIZE = 1 << 18
MAX_FRAME = 1 << 28
MAX_ITEMS = 1 << 22
"""Of one list or map; a header of five bytes must not make us allocate gigabytes."""

PLAIN = (bytes,)
"""What MessagePack carries as it is; msgspec alone would make text of it, as for JSON."""

T = TypeVar("T")


class Channel(Generic[T]):
    """One end of a socket pair that carries messages of type `T` towards this process."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        incoming: Any,  # noqa: ANN401
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._incoming = incoming
        self._unpacker = msgpack.Unpacker(
            strict_map_key=False,
            max_buffer_size=MAX_FRAME,
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_ITEMS,
            max_ext_len=0,
        )

    @classmethod
    async def open(cls, sock: socket.socket, incoming: Any) -> "Channel[T]":  # noqa: ANN401
        """Take over a connected stream socket; `incoming` is the union of types to expect.

        The socket is closed if that fails or is cancelled.
        """
        try:
            reader, writer = await asyncio.open_unix_connection(sock=sock)
        except BaseException:
            sock.close()
            raise
        return cls(reader, writer, incoming)

    @property
    def closing(self) -> bool:
        """Whether this end is closed or the other end is known to have gone."""
        return self._writer.is_closing()

    def send(self, message: msgspec.Struct) -> None:
        """Queue one message; never blocks. Raises `ChannelClosed` once the other end has gone."""
        if self.closing:
            raise ChannelClosed("the other process has closed the channel")
        self._writer.write(msgpack.packb(msgspec.to_builtins(message, builtin_types=PLAIN)))

    async def batches(self) -> AsyncIterator[list[T]]:
        """Messages as they arrive, all that one read brought together; ends when the peer leaves.

        Raises `ChannelClosed` for bytes that are no message of the expected kind; nothing that comes
        after them can be understood.
        """
        while True:
            try:
                data = await self._reader.read(READ_SIZE)
            except ConnectionError:
                return
            if not data:
                return
            yield self._unpack(data)

    def _unpack(self, data: bytes) -> list[T]:
        try:
            self._unpacker.feed(data)
            return [
                msgspec.convert(item, self._incoming, builtin_types=PLAIN)
                for item in self._unpacker
            ]
        except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
            # msgspec's ValidationError is a ValueError, and so is most of msgpack's.
            raise ChannelClosed(
                f"the other process sent what is no message ({type(error).__name__})"
            ) from None

    async def close(self) -> None:
        """Flush what is queued and close."""
        self._writer.close()
        try:
            await self._writer.wait_closed()
        except ConnectionError:
            return


def send_descriptor(sock: socket.socket, descriptor: int) -> None:
    """Send one file descriptor over a datagram-like Unix socket."""
    socket.send_fds(sock, [b"d"], [descriptor])


def receive_descriptor(sock: socket.socket) -> int:
    """The next file descriptor; the message that announced it has been read already.

    Processes that are started later don't inherit it: one that did would keep a dead worker's memory.
    """
    data, descriptors, _, _ = socket.recv_fds(sock, 1, 1)
    if not data or not descriptors:
        raise ChannelClosed("the other process left before it sent its descriptor")
    (descriptor,) = descriptors
    os.set_inheritable(descriptor, False)
    return descriptor
