import resource
import shutil
import ssl
import subprocess
from pathlib import Path

import aiohttp
import pytest

from memserve.errors import UsageError
from memserve.frontend.listening import SPARE_DESCRIPTORS, connection_limit, tls_context
from tests.fakes import ScriptedGenerator, byte_tokenizer
from tests.serving import serve


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A certificate for 127.0.0.1 that its own key has signed, and the key."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl program to make a certificate")
    folder: Path = tmp_path_factory.mktemp("tls")
    cert, key = str(folder / "cert.pem"), str(folder / "key.pem")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-days", "2", "-subj", "/CN=memserve test"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert]
    subprocess.run(command, check=True, capture_output=True)
    return cert, key


async def test_a_server_with_a_certificate_speaks_https_and_nothing_else(
    certificate: tuple[str, str], tmp_path: Path
) -> None:
    tokenizer = byte_tokenizer(tmp_path)
    generator = ScriptedGenerator(lambda generation, choice: tokenizer.encode("abc"))
    trusting = ssl.create_default_context(cafile=certificate[0])
    async with serve(tokenizer, generator, tls=tls_context(*certificate)) as served:
        async with served.http.post(
            served.url + "/v1/completions", json={"prompt": "a"}, ssl=trusting
        ) as response:
            assert (await response.json())["choices"][0]["text"] == "abc"
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await served.http.get(served.url + "/health")
        with pytest.raises(aiohttp.ClientError):
            await served.http.get(served.url.replace("https", "http") + "/health")
        old = ssl.create_default_context(cafile=certificate[0])
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            old.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises(aiohttp.ClientConnectorSSLError):
            await served.http.get(served.url + "/health", ssl=old)


def test_without_a_certificate_there_is_no_tls() -> None:
    assert tls_context(None, None) is None


def test_certificate_and_key_belong_together(certificate: tuple[str, str], tmp_path: Path) -> None:
    cert, key = certificate
    with pytest.raises(UsageError, match="--tls-cert and --tls-key"):
        tls_context(cert, None)
    with pytest.raises(UsageError, match="nowhere"):
        tls_context(cert, "/nowhere/key.pem")
    with pytest.raises(UsageError, match="for TLS"):
        tls_context(key, cert)


def test_connections_leave_files_for_the_rest_of_the_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda which, limit: limits.append(limit))
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 20_000))
    assert connection_limit(8192) == 8192
    assert connection_limit(50_000) == 20_000 - SPARE_DESCRIPTORS
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 600))
    assert connection_limit(8192) == 300
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, resource.RLIM_INFINITY))
    assert connection_limit(8192) == 8192
    assert limits[0] == (20_000, 20_000)  # the soft limit goes up to the hard one
