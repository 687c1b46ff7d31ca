"""Reading request bodies: bounded in bytes, each and all together, and in time.

A body is counted as it is after decompression, piece by piece, so that a small compressed one can't
become a large one in memory. A client that sends too slowly is told so (408): whoever dribbles holds
a place for a bounded time. All bodies that are in memory at once share one limit; beyond it the
server is overloaded (503).
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import final

import aiohttp
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from memserve.errors import BodyTooLarge, ClientTooSlow, InvalidRequest, Overloaded

MIN_RATE = 16 << 10
"""Bytes a second, on average, of a body that takes longer than the time-out."""

NUM_LARGEST = 8
"""As many bodies of the greatest size may be in memory at once."""


@final
class Bodies:
    """The bodies that are in memory, each of at most `max_bytes`.

    A body may take `timeout` seconds, and longer if it comes at `MIN_RATE` at least.
    """

    def __init__(self, *, max_bytes: int, timeout: float) -> None:
        self._max_bytes = max_bytes
        self._timeout = timeout
        self._num_bytes = 0

    @asynccontextmanager
    async def receive(self, request: web.Request) -> AsyncIterator[bytes]:
        """The whole body; it counts as held until the context is left.

        Raises `InvalidRequest` when its encoding is broken, `BodyTooLarge`, `ClientTooSlow`, and
        `Overloaded` when others hold too much.
        """
        if (request.content_length or 0) > self._max_bytes:
            raise self._too_large()
        pieces: list[bytes] = []
        size = 0
        try:
            async for piece in self._pieces(request):
                size += len(piece)
                self._num_bytes += len(piece)
                if size > self._max_bytes:
                    raise self._too_large()
                if self._num_bytes > NUM_LARGEST * self._max_bytes:
                    raise Overloaded(
                        "the server is reading too many large requests",
                        code="body_bytes",
                        retry_after=5,
                    )
                pieces.append(piece)
            body = b"".join(pieces)
            pieces.clear()
            yield body
        finally:
            self._num_bytes -= size

    async def _pieces(self, request: web.Request) -> AsyncIterator[bytes]:
        """The body as it comes, decompressed, within its time."""
        start = asyncio.get_running_loop().time() + self._timeout
        size = 0
        while True:
            try:
                async with asyncio.timeout_at(start + size / MIN_RATE):
                    piece = await request.content.readany()
            except TimeoutError:
                raise ClientTooSlow("The request body came too slowly.") from None
            except (aiohttp.ClientPayloadError, HttpProcessingError, web.RequestPayloadError):
                raise InvalidRequest("The request body can't be decoded.") from None
            if not piece:
                return
            size += len(piece)
            yield piece

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(
            f"The request body is larger than {self._max_bytes} bytes.", code="body_too_large"
        )
