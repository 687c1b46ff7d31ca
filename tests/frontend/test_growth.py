"""What the front end keeps does not grow with what clients ever sent (scenario F6, its unit part)."""

from pathlib import Path

from tests.census import census, grown
from tests.fakes import ScriptedGenerator, byte_tokenizer
from tests.serving import MODEL, Served, serve


async def send(served: Served, numbers: range) -> None:
    """Chats, completions, refusals and unknown paths, none like another."""
    for number in numbers:
        extra = {"user": f"user {number}", "cache_salt": f"salt {number}"}
        messages = [{"role": "user", "content": f"Say {number}!"}]
        headers = {"X-Session-Id": f"session {number}", "X-Request-Id": f"request-{number}"}
        chat = {"model": MODEL, "messages": messages, "max_tokens": 1 + number % 9, **extra}
        async with served.http.post(
            served.url + "/v1/chat/completions", json=chat, headers=headers
        ) as response:
            assert response.status == 200, await response.text()
        await served.stream("/v1/completions", {"model": MODEL, "prompt": f"{number}", **extra})
        status, _ = await served.post("/v1/completions", {"model": f"no {number}", "prompt": "a"})
        assert status == 404
        status, _ = await served.post("/v1/completions", {"model": MODEL, f"field {number}": 1})
        assert status == 400
        async with served.http.get(f"{served.url}/nowhere/{number}") as response:
            assert response.status == 404


async def num_series(served: Served) -> int:
    async with served.http.get(served.url + "/metrics") as response:
        return len((await response.text()).splitlines())


async def test_f6_distinct_requests_leave_nothing_but_remembered_chats(tmp_path: Path) -> None:
    """Those are bounded in bytes (`tests/openai/test_memo.py`)."""
    tokenizer = byte_tokenizer(tmp_path)
    generator = ScriptedGenerator(lambda generation, choice: tokenizer.encode("Well."))
    async with serve(tokenizer, generator) as served:
        held = list(served.app.values())
        await send(served, range(20))
        before, series = census(*held), await num_series(served)
        await send(served, range(20, 120))
        larger = grown(before, census(*held))
        assert {name.partition(".")[0] for name in larger} <= {"ChatMemo"}
        assert await num_series(served) == series
