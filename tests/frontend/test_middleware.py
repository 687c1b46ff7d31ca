"""What happens to a request that ends in an unusual way."""

import aiohttp
import pytest
from aiohttp import web

from memserve.frontend.listening import listen
from memserve.frontend.middleware import answer_errors


async def test_a_client_that_leaves_before_the_last_write_is_no_error_of_the_server(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def write_too_late(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        assert request.transport is not None
        request.transport.close()  # what the client's leaving comes to
        await response.write(b"last words")
        raise AssertionError("written to a closed connection")

    app = web.Application(middlewares=[answer_errors])
    app.router.add_get("/", write_too_late)
    sock = listen("127.0.0.1", 0)
    url = f"http://127.0.0.1:{sock.getsockname()[1]}/"
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    try:
        await web.SockSite(runner, sock).start()
        async with aiohttp.ClientSession() as http:
            with pytest.raises(aiohttp.ClientError):
                await (await http.get(url)).read()
    finally:
        await runner.cleanup()
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
