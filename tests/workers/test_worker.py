"""What a worker refuses when it starts."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import msgspec
import pytest
import torch

from memserve.errors import UsageError
from memserve.messages import Configure, Ready, Shutdown
from memserve.model import loading
from memserve.workers import worker
from memserve.workers.link import Link
from memserve.workers.worker import serve
from tests.cluster.fake_workers import fake_engine
from tests.model.tiny import ARCHITECTURES, save
from tests.workers.by_hand import KeptMessages


@pytest.fixture(autouse=True)
def _torch_as_before() -> Iterator[None]:
    before = torch.get_num_threads(), torch.is_grad_enabled()
    yield
    torch.set_num_threads(before[0])
    torch.set_grad_enabled(before[1])


def start(folder: Path, max_sp: int) -> KeptMessages:
    """Run a worker of a tiny model till it ends, which it is told to do at once."""
    config = msgspec.structs.replace(
        fake_engine(),
        weights=str(save(ARCHITECTURES["llama"].config(), folder)),
        max_model_len=100,
        kv_cache_bytes=1 << 20,
        max_sp=max_sp,
    )
    link = KeptMessages()
    link.inbox.put(Shutdown())
    ours, theirs = socket.socketpair()
    with ours, theirs:
        serve(Configure(instance=0, epoch=1, engine=config), cast(Link, link), ours)
    return link


@pytest.mark.parametrize("missing", ["kernels", "blocks", "progress"])
def test_groups_are_refused_at_the_start_where_nothing_can_be_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    module = loading if missing == "kernels" else worker
    name = "load_kernels" if missing == "kernels" else f"load_native_{missing}"
    monkeypatch.setattr(module, name, lambda: None)
    with pytest.raises(UsageError, match="--max-sp 0 needs a C and C"):
        start(tmp_path, max_sp=0)
    assert any(isinstance(message, Ready) for message in start(tmp_path, max_sp=1).sent)
