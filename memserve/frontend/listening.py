"""From an address to an app that answers on it: sockets, TLS, and how many connections there may be."""

import asyncio
import logging
import resource
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

from memserve.errors import UsageError
from memserve.frontend.connections import CONNECTIONS, HANDSHAKE_TIMEOUT_S, http_logger

logger = logging.getLogger(__name__)

BACKLOG = 1024
SPARE_DESCRIPTORS = 2048
"""Left for the workers, their arenas, files, and connections that are just being closed."""

FLUSH_TIMEOUT_S = 2.0
"""What the last bytes of the last answers get to reach their clients."""


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises `UsageError` in one sentence if the address can't be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"can't listen on {host}:{port}: {reason}") from None


def tls_context(certificate: str | None, key: str | None) -> ssl.SSLContext | None:
    """TLS 1.2 or later with this certificate chain and key (PEM files); None if none are given.

    Raises `UsageError` for one without the other, and for files that don't fit.
    """
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise UsageError("--tls-cert and --tls-key belong together")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key, password="")
    except (OSError, ssl.SSLError) as error:
        reason = error.strerror or str(error)
        raise UsageError(f"can't use {certificate} and {key} for TLS: {reason}") from None
    return context


def connection_limit(wanted: int) -> int:
    """As many connections as are wanted, or as the open files of this process allow.

    Raises the process's soft limit as far as it may.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard == resource.RLIM_INFINITY or hard - SPARE_DESCRIPTORS >= wanted:
        return wanted
    limit = max(hard - SPARE_DESCRIPTORS, hard // 2)
    logger.warning("at most %d connections: the process may open %d files", limit, hard)
    return limit


@asynccontextmanager
async def answering(
    app: web.Application, sock: socket.socket, tls: ssl.SSLContext | None = None
) -> AsyncIterator[None]:
    """Answer on a listening socket. Handlers that still run at the end are cancelled."""
    runner = web.AppRunner(
        app,
        handler_cancellation=True,
        access_log=None,
        logger=http_logger(),
        shutdown_timeout=FLUSH_TIMEOUT_S,
    )
    await runner.setup()
    try:
        assert runner.server is not None
        listener = await asyncio.get_running_loop().create_server(
            app[CONNECTIONS].factory(runner.server),
            sock=sock,
            ssl=tls,
            ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S if tls else None,
            backlog=BACKLOG,
        )
        try:
            yield
        finally:
            listener.close()
    finally:
        await runner.cleanup()
