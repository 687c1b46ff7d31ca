"""Clients that are slow, silent, many, large or malformed: they harm nobody but themselves."""

import asyncio
import gzip
import json
import logging
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import uvloop

from memserve.frontend.bodies import NUM_LARGEST
from memserve.frontend.connections import CONNECTIONS, Connections
from memserve.frontend.service import FRONTEND
from memserve.tokens import Tokenizer
from tests.fakes import VOCAB_SIZE, ScriptedGenerator, byte_tokenizer
from tests.serving import MAX_BODY_BYTES, Served, serve

COMPLETIONS = "/v1/completions"
HOUR = 3600.0


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer") / "bytes"
    folder.mkdir()
    return byte_tokenizer(folder)


@pytest.fixture
async def served(tokenizer: Tokenizer) -> AsyncIterator[Served]:
    """A server with a limit of an hour on silent clients, and a clock to move by hand."""
    generator = ScriptedGenerator(lambda generation, choice: tokenizer.encode("a") * 400)
    async with serve(tokenizer, generator, client_timeout=HOUR) as running:
        yield running


class Hands:
    """The clock of a server's connections, moved by hand."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._now = 0.0
        connections._clock = lambda: self._now
        for watched in connections._watched.values():
            watched.since = 0.0

    def after(self, seconds: float) -> None:
        """Let time pass and the server look."""
        self._connections.look()
        self._now += seconds
        self._connections.look()


def post(body: bytes, *headers: str) -> bytes:
    head = ["POST /v1/completions HTTP/1.1", "Host: x", *headers]
    if not any(header.startswith("Transfer-Encoding") for header in headers):
        head.append(f"Content-Length: {len(body)}")
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


async def connect(served: Served) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", served.port)


async def connect_narrowly(served: Served) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection whose client end holds hardly anything that was not read."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", served.port))
    return await asyncio.open_connection(sock=sock, limit=1024)


async def status(reader: asyncio.StreamReader) -> int:
    """Status of the next response; 0 if the connection was closed without one."""
    line = await reader.readline()
    return int(line.split()[1]) if line else 0


async def assert_serves(served: Served) -> None:
    served.generator.hold_at = None
    answer = await served.client.completions.create(model="", prompt="a", max_tokens=3)
    assert answer.choices[0].text == "aaa"


STREAM = json.dumps({"prompt": "a", "n": 16, "max_tokens": 400, "stream": True}).encode()


async def test_a_client_that_never_reads_is_cut_off_and_its_generation_ends(
    served: Served,
) -> None:
    await read_nothing(served)


def test_clients_are_cut_off_and_evicted_on_uvloop_too(tokenizer: Tokenizer) -> None:
    async def body() -> None:
        generator = ScriptedGenerator(lambda generation, choice: tokenizer.encode("a") * 400)
        async with serve(tokenizer, generator, client_timeout=HOUR, max_connections=5) as served:
            await read_nothing(served)
            await crowd(served)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(body())


async def read_nothing(served: Served) -> None:
    """Be a client that asks for a stream and never reads it."""
    hands = Hands(served.app[CONNECTIONS])
    served.generator.hold_at = 300
    _, writer = await connect_narrowly(served)
    writer.write(post(STREAM))
    await served.generator.held.wait()
    hands.after(HOUR - 1)
    assert served.generator.num_inside == 1
    hands.after(2)
    await served.generator.left.wait()
    writer.close()
    await assert_serves(served)


async def test_what_a_client_does_not_read_is_not_buffered_without_end(served: Served) -> None:
    served.generator.hold_at = 390
    _, writer = await connect_narrowly(served)
    writer.write(post(STREAM.replace(b'"n": 16', b'"n": 128')))
    await served.generator.held.wait()
    (protocol,) = served.app[CONNECTIONS]._watched
    transport = protocol.transport  # type: ignore[attr-defined]
    low, high = transport.get_write_buffer_limits()
    assert low < transport.get_write_buffer_size() < 10 * high  # of 10 MB
    writer.close()
    await served.generator.left.wait()


async def test_a_client_that_reads_slowly_keeps_its_stream(served: Served) -> None:
    hands = Hands(served.app[CONNECTIONS])
    served.generator.hold_at = 399
    reader, writer = await connect_narrowly(served)
    writer.write(post(STREAM))
    await served.generator.held.wait()
    for _ in range(4):
        hands.after(HOUR - 1)
        await reader.readexactly(50_000)
    assert served.generator.num_inside == 1
    writer.close()
    await served.generator.left.wait()


async def test_a_client_is_not_to_blame_for_a_slow_answer(served: Served) -> None:
    hands = Hands(served.app[CONNECTIONS])
    served.generator.hold_at = 0
    _, writer = await connect(served)
    writer.write(post(STREAM))
    await served.generator.held.wait()
    hands.after(10 * HOUR)
    await asyncio.sleep(0.05)
    assert served.generator.num_inside == 1
    writer.close()
    await served.generator.left.wait()


@pytest.mark.parametrize(
    "sent", [b"", b"POST /v1/comple", b"GET /health HTTP/1.1\r\nHost: x\r\nA: "]
)
async def test_a_connection_without_a_whole_request_is_closed(served: Served, sent: bytes) -> None:
    reader, writer = await connect(served)
    writer.write(sent)
    while not served.app[CONNECTIONS]._watched:
        await asyncio.sleep(0)
    hands = Hands(served.app[CONNECTIONS])
    await asyncio.sleep(0.05)
    hands.after(HOUR + 1)
    assert await reader.read() == b""
    writer.close()


async def test_a_body_that_does_not_come_is_not_waited_for(tokenizer: Tokenizer) -> None:
    generator = ScriptedGenerator(lambda generation, choice: [])
    async with serve(tokenizer, generator, client_timeout=0.2) as served:
        reader, writer = await connect(served)
        writer.write(post(STREAM)[:-5])
        assert await status(reader) == 408
        assert b'"type":"invalid_request_error"' in await reader.read()
        writer.close()


def chunked(body: bytes) -> bytes:
    pieces = [body[start : start + 5000] for start in range(0, len(body), 5000)]
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


async def test_huge_bodies_are_refused_however_they_come(served: Served) -> None:
    huge = b'{"prompt": "%b"}' % (b"a" * 2 * MAX_BODY_BYTES)
    bomb = gzip.compress(b" " * 1000 * MAX_BODY_BYTES)
    assert len(bomb) < MAX_BODY_BYTES
    requests = {
        "announced": post(b"", "Content-Length: 99999999999").replace(
            b"Content-Length: 0\r\n", b""
        ),
        "plain": post(huge),
        "chunked": post(chunked(huge), "Transfer-Encoding: chunked"),
        "compressed": post(bomb, "Content-Encoding: gzip"),
        "both": post(chunked(bomb), "Content-Encoding: gzip", "Transfer-Encoding: chunked"),
    }
    for name, request in requests.items():
        reader, writer = await connect(served)
        writer.write(request)
        assert (name, await status(reader)) == (name, 413)
        writer.close()
    assert served.app[FRONTEND].bodies._num_bytes == 0
    await assert_serves(served)


async def test_bodies_in_memory_share_a_limit(served: Served) -> None:
    body = json.dumps({"prompt": "a" * (MAX_BODY_BYTES - 100)}).encode()
    writers = []
    for number in range(NUM_LARGEST):
        _, writer = await connect(served)
        writer.write(post(body)[:-1])
        writers.append(writer)
        while served.app[FRONTEND].bodies._num_bytes < number * len(body):
            await asyncio.sleep(0)
    answer, error = await served.post(COMPLETIONS, {"prompt": "a" * 10_000})
    assert (answer, error["error"]["type"]) == (503, "overloaded_error")
    for writer in writers:
        writer.close()
    while served.app[FRONTEND].bodies._num_bytes:
        await asyncio.sleep(0.01)
    answer, error = await served.post(COMPLETIONS, {"prompt": "a" * 10_000})
    assert (answer, error["error"]["code"]) == (400, "context_length_exceeded")


async def test_idle_connections_keep_nobody_out(tokenizer: Tokenizer) -> None:
    generator = ScriptedGenerator(lambda generation, choice: tokenizer.encode("a") * 9)
    async with serve(tokenizer, generator, max_connections=20) as served:
        await crowd(served)


async def crowd(served: Served) -> None:
    """Be more idle clients than there may be connections, beside one with a stream."""
    served.generator.hold_at = 1
    stream = await served.client.completions.create(model="", prompt="a", stream=True)
    await anext(stream)
    served.generator.hold_at = None
    idle = [await connect(served) for _ in range(100)]
    for _ in range(3):
        await assert_serves(served)
    reader, _ = idle[0]
    assert await reader.read() == b""  # the oldest had to go, and no stream
    assert served.generator.num_inside == 1
    assert len(served.app[CONNECTIONS]._watched) < 50  # what was closed is forgotten
    await stream.close()
    for _, writer in idle:
        writer.close()


async def test_a_server_full_of_streams_turns_a_connection_away(tokenizer: Tokenizer) -> None:
    generator = ScriptedGenerator(lambda generation, choice: tokenizer.encode("a") * 9)
    async with serve(tokenizer, generator, max_connections=3) as served:
        generator.hold_at = 0
        streams = [await connect(served) for _ in range(3)]
        for _, writer in streams:
            writer.write(post(STREAM))
        while generator.num_inside < 3:
            await asyncio.sleep(0)
        reader, late = await connect(served)
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 ")
        assert b"Retry-After: 1" in head
        assert json.loads(body)["error"]["type"] == "overloaded_error"
        for writer in (late, *(writer for _, writer in streams)):
            writer.close()


MALFORMED_HTTP = {
    "noise": bytes(range(256)) * 4,
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),
    "a long line": b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
    "a long header": b"GET /health HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 100_000 + b"\r\n\r\n",
    "many headers": b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 50_000 + b"\r\n",
    "no version": b"POST /v1/completions\r\n\r\n",
    "a bad key header": b"GET /v1/models HTTP/1.1\r\nAuthorization: Bearer SECRET\x01\r\n\r\n",
    "a bad header name": b"GET /v1/models HTTP/1.1\r\nSECRET : a\r\n\r\n",
    "two lengths": post(b"", "Content-Length: 5"),
    "length and chunks": post(b"", "Transfer-Encoding: chunked", "Content-Length: 5"),
    "a negative length": post(b"", "Content-Length: -5").replace(b"Content-Length: 0\r\n", b""),
    "a bad chunk": post(b"zz\r\nSECRET\r\n", "Transfer-Encoding: chunked"),
    "an unknown encoding": post(b"SECRET", "Content-Encoding: rot13"),
    "an unknown expectation": post(b"SECRET", "Expect: a miracle"),
    "a bad target": b"GET http://[::1 HTTP/1.1\r\nHost: x\r\n\r\n",
}


@pytest.mark.parametrize("name", MALFORMED_HTTP)
async def test_malformed_http_is_a_client_error_and_is_not_quoted_in_the_log(
    served: Served, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        reader, writer = await connect(served)
        writer.write(MALFORMED_HTTP[name])
        if writer.can_write_eof():
            writer.write_eof()
        try:
            found = await status(reader)
        except ConnectionError:
            found = 0
        assert found == 0 or 400 <= found < 500
        writer.close()
        await assert_serves(served)
    assert "SECRET" not in caplog.text
    assert [record for record in caplog.records if record.levelno > logging.INFO] == []


DEEP = b"[" * 20_000
MALFORMED_BODIES = {
    "nothing": b"",
    "invalid UTF-8": b'{"prompt": "\xff\xfe"}',
    "half a character": b'{"prompt": "\xf0\x9f"}',
    "half a surrogate pair": b'{"prompt": "\\ud800"}',
    "a bare NUL": b'{"prompt": "a\x00b"}',
    "deep arrays": b'{"prompt": ' + DEEP + b"}",
    "deep arrays in an unknown field": b'{"prompt": "a", "x": ' + DEEP + b"}",
    "deep objects": b'{"logit_bias": ' + b'{"1":' * 10_000 + b"}",
    "NaN": b'{"prompt": "a", "temperature": NaN}',
    "Infinity": b'{"prompt": "a", "top_p": Infinity}',
    "a float beyond all floats": b'{"prompt": "a", "temperature": 1e999}',
    "a huge integer": b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}",
    "a huge seed": b'{"prompt": "a", "seed": 99999999999999999999}',
    "a huge priority": b'{"prompt": "a", "priority": 9223372036854775807}',
    "a negative time": b'{"prompt": "a", "timeout": -1}',
    "no time": b'{"prompt": "a", "timeout": 0}',
    "an endless time": b'{"prompt": "a", "timeout": 1e999}',
    "a token after the last": b'{"prompt": [%d]}' % VOCAB_SIZE,
    "a negative token": b'{"prompt": [-1]}',
    "a huge token": b'{"prompt": [18446744073709551616]}',
    "a bias for no token": b'{"prompt": "a", "logit_bias": {"%d": 1}}' % VOCAB_SIZE,
    "a stop at no token": b'{"prompt": "a", "stop_token_ids": [4294967296]}',
}


@pytest.mark.parametrize("name", MALFORMED_BODIES)
async def test_malformed_bodies_are_client_errors(served: Served, name: str) -> None:
    async with served.http.post(served.url + COMPLETIONS, data=MALFORMED_BODIES[name]) as response:
        error = (await response.json())["error"]
        assert (response.status, error["type"]) == (400, "invalid_request_error")
    assert served.generator.generations == []
    await assert_serves(served)
