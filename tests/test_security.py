"""What SECURITY.md promises of the code as a whole."""

import ast
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from memserve.config import ServeConfig
from memserve.tokens import Tokenizer
from tests.fakes import ScriptedGenerator, byte_tokenizer
from tests.serving import serve

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "memserve").rglob("*.py"))
CODE_IN_DATA = {
    "pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve",
    "multiprocessing",
}  # fmt: skip
"""Modules that run what they read, or whose queues do."""

CALLS_THAT_RUN_DATA = {"eval", "exec", "torch.load", "yaml.load", "yaml.unsafe_load"}


def nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text()))


def names_of_imports(path: Path) -> set[str]:
    found = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in nodes(path):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_nothing_that_is_read_is_run() -> None:
    assert len(SOURCES) > 100
    wrong = [
        (path.name, name)
        for path in SOURCES
        for name in names_of_imports(path)
        if CODE_IN_DATA & set(name.split("."))
    ]
    wrong += [
        (path.name, name)
        for path in SOURCES
        for name, _ in calls(path)
        if name in CALLS_THAT_RUN_DATA
    ]
    wrong += [
        (path.name, name)
        for path in SOURCES
        for name, call in calls(path)
        if any(keyword.arg == "allow_pickle" for keyword in call.keywords)
    ]
    assert wrong == []


def test_no_model_brings_its_own_code() -> None:
    given = [
        (path.name, ast.unparse(keyword.value))
        for path in SOURCES
        for _, call in calls(path)
        for keyword in call.keywords
        if keyword.arg == "trust_remote_code"
    ]
    assert given
    assert {value for _, value in given} == {"False"}
    assert not any("trust_remote_code" in field for field in ServeConfig.__dataclass_fields__)


def test_a_server_is_for_this_machine_alone_unless_told_otherwise() -> None:
    assert ServeConfig().host == "127.0.0.1"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return byte_tokenizer(tmp_path)


@pytest.mark.parametrize("stream", [False, True])
async def test_no_log_quotes_a_prompt_or_a_key(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    """Whatever goes wrong: refused, timed out, failed before the first token and after it."""
    generator = ScriptedGenerator(lambda generation, choice: tokenizer.encode("MY-SECRET answer"))
    key = {"Authorization": "Bearer MY-SECRET-key"}
    body = {"prompt": "MY-SECRET prompt", "user": "MY-SECRET user", "stream": stream}
    caplog.set_level(logging.INFO)
    async with serve(tokenizer, generator, api_keys=("MY-SECRET-key",)) as served:

        async def post(headers: dict[str, str] = key, **extra: object) -> int:
            async with served.http.post(
                served.url + "/v1/completions", json=body | extra, headers=headers
            ) as response:
                await response.read()
                return response.status

        assert await post() == 200
        assert await post({"Authorization": "Bearer MY-SECRET-kez"}) == 401
        assert await post(temperature="MY-SECRET") == 400
        assert await post(model="MY-SECRET") == 404
        generator.hold_at = 0
        assert await post(timeout=0.01) == 504
        generator.hold_at = None
        for generator.fail_at in (0, 5):
            for generator.broken in (None, ZeroDivisionError("MY-SECRET prompt")):
                assert await post() in (200, 500)
    assert "ZeroDivisionError" in caplog.text  # what went wrong is told, and where
    assert "test_security" in caplog.text or "fakes.py" in caplog.text
    assert "SECRET" not in caplog.text
