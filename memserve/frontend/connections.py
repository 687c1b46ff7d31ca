"""The open connections: not more than the process can hold, and none that is stuck for ever.

A connection on which nobody is being answered, and one whose client takes nothing of what waits for
it, is closed after a time-out; the second means that a client which never reads its stream leaves,
and its generations with it. A whole house lets the connection go that has been idle longest, and
refuses a new one (503) only if none is idle: thousands of idle clients keep nobody out.

What a stuck client costs until then is bounded: its transport's buffer (64 KiB) and the answer so
far (see `memserve.frontend.streaming`).
"""

import array
import asyncio
import fcntl
import logging
import termios
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import final

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Handler

logger = logging.getLogger(__name__)

HANDSHAKE_TIMEOUT_S = 10.0
NUM_ROUNDS = 10  # looks at every connection within one time-out

FULL = (
    b'{"error":{"message":"too many connections","type":"overloaded_error",'
    b'"param":null,"code":null}}'
)
REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\n"
    b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(FULL), FULL)
)


@dataclass(slots=True)
class _Watched:
    """What was seen of one connection."""

    since: float
    """When it last went on."""
    num_unsent: int = 0
    """Bytes that waited for the client at the last look."""
    num_answering: int = 0
    """Requests of it that have a handler now."""
    was_open: bool = False
    """Whether it has been seen open; before, it may be shaking hands over TLS."""

    def is_over(self, transport: asyncio.Transport | None, now: float) -> bool:
        """Whether nothing will come of it any more."""
        if self.num_answering or (transport is not None and not transport.is_closing()):
            return False
        return self.was_open or now - self.since > HANDSHAKE_TIMEOUT_S


@final
class Connections:
    """The connections of one app, at most `limit`."""

    def __init__(
        self, *, limit: int, timeout: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limit = limit
        self._timeout = timeout
        self._clock = clock
        # Those that went idle last stand last.
        self._watched: dict[asyncio.BaseProtocol, _Watched] = {}

    def factory(self, server: web.Server) -> Callable[[], asyncio.BaseProtocol]:
        """What makes the protocol of each new connection to `server`."""

        def accept() -> asyncio.BaseProtocol:
            if len(server.connections) >= self._limit and not self._evict():
                return _Refusal()
            protocol = server()
            self._watched[protocol] = _Watched(self._clock())
            return protocol

        return accept

    @contextmanager
    def answering(self, protocol: asyncio.BaseProtocol) -> Iterator[None]:
        """A request of this connection is being answered."""
        watched = self._watched.setdefault(protocol, _Watched(self._clock()))
        watched.num_answering += 1
        watched.was_open = True
        try:
            yield
        finally:
            watched.num_answering -= 1
            watched.since = self._clock()
            if self._watched.pop(protocol, None) is not None:
                self._watched[protocol] = watched

    async def watch(self) -> None:
        """Look at every connection again and again, until cancelled."""
        while True:
            await asyncio.sleep(self._timeout / NUM_ROUNDS)
            self.look()

    def look(self) -> None:
        """Close what is stuck or idle for too long; forget what is closed."""
        now = self._clock()
        for protocol, watched in list(self._watched.items()):
            transport = _transport(protocol)
            overdue = now - watched.since > self._timeout
            if watched.is_over(transport, now):
                del self._watched[protocol]
            if transport is None or transport.is_closing():
                continue
            watched.was_open = True
            num_unsent = unsent_bytes(transport)
            going = num_unsent != watched.num_unsent or (num_unsent == 0 and watched.num_answering)
            watched.num_unsent = num_unsent
            if going:
                watched.since = now
            elif overdue and num_unsent:
                logger.info(
                    "a client took nothing of its answer for %.0f s: cut off", self._timeout
                )
                transport.abort()
            elif overdue:
                transport.close()

    def _evict(self) -> bool:
        """Close the connection that has been idle longest; False if none is idle."""
        now, over = self._clock(), []
        try:
            for protocol, watched in self._watched.items():
                transport = _transport(protocol)
                if watched.is_over(transport, now):
                    over.append(protocol)
                elif not watched.num_answering and transport and not unsent_bytes(transport):
                    transport.abort()
                    over.append(protocol)
                    return True
        finally:  # nobody passes them a second time
            for protocol in over:
                del self._watched[protocol]
        return False


CONNECTIONS = web.AppKey("CONNECTIONS", Connections)


async def watch_connections(app: web.Application) -> AsyncIterator[None]:
    """Cleanup context: the watch over an app's connections."""
    task = asyncio.create_task(app[CONNECTIONS].watch())
    yield
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


@web.middleware
async def note_connection(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Middleware: a connection with a request is not idle."""
    with request.app[CONNECTIONS].answering(request.protocol):
        return await handler(request)


def unsent_bytes(transport: asyncio.Transport) -> int:
    """Bytes written that the client's machine has not taken: the transport's and the kernel's."""
    count = array.array("i", [0])
    with suppress(OSError, ValueError):  # the socket is being closed
        fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, count)
    return transport.get_write_buffer_size() + count[0]


class _Refusal(asyncio.Protocol):
    """Turns a connection away."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(REFUSAL)
        transport.close()


def _transport(protocol: asyncio.BaseProtocol) -> asyncio.Transport | None:
    assert isinstance(protocol, web.RequestHandler)
    return protocol.transport


class _WithoutBytes(logging.Filter):
    """A client's malformed request is one line, without what it sent: it may hold a key."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, HttpProcessingError):
            record.msg, record.args = "malformed HTTP: %s", (type(error).__name__,)
            record.levelno, record.levelname = logging.INFO, "INFO"
            record.exc_info = record.exc_text = None
        return True


def http_logger() -> logging.Logger:
    """What aiohttp's server shall write to."""
    found = logging.getLogger("memserve.http")
    if not found.filters:
        found.addFilter(_WithoutBytes())
    return found
