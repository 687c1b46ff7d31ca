"""Builds one worker: model, arena, pool, copy thread, engine; and runs it to its end."""

import logging
import socket
from pathlib import Path

import torch

from memserve.config import EngineConfig
from memserve.errors import UsageError
from memserve.messages import Configure, Ready, StartFailed
from memserve.model.loading import load_model
from memserve.model.model import Model
from memserve.pool.refs import ArenaLayout
from memserve.workers.engine import Engine
from memserve.workers.gpu import explained_shortage, open_gpu, with_cache_size
from memserve.workers.link import Link
from memserve.workers.memory import WorkerMemory
from memserve.workers.runner import build_runner

logger = logging.getLogger(__name__)


def run_worker(control: socket.socket, descriptors: socket.socket) -> None:
    """Serve as the first message says, until the launcher ends it or has gone."""
    link = Link(control)
    link.start()
    try:
        first = link.inbox.get()
        if not isinstance(first, Configure):  # the launcher left before it said anything
            return
        _start_logging(first)
        try:
            serve(first, link, descriptors)
        except UsageError as error:
            link.send(StartFailed(str(error)))
        except Exception:  # said now: the launcher may kill us as soon as the link is closed
            logger.exception("this worker has failed")
            raise
    finally:
        link.close()


def serve(configure: Configure, link: Link, descriptors: socket.socket) -> None:
    """Build the worker, report ready, and run its engine. Raises `UsageError` if it can't start."""
    config = configure.engine
    torch.set_num_threads(config.num_threads)
    torch.set_grad_enabled(False)
    with explained_shortage():
        cuda = open_gpu(config)
        model = load_model(
            Path(config.weights),
            device=config.device,
            dtype=config.dtype,
            max_model_len=config.max_model_len,
            block_size=config.block_size,
        )
        shape = block_shape(model, config)
        if cuda is not None:
            config = with_cache_size(config, model, shape)
        memory = WorkerMemory(
            config,
            shape,
            instance=configure.instance,
            epoch=configure.epoch,
            inbox=link.inbox,
            cuda=cuda,
        )
        runner = build_runner(
            model,
            memory.hbm.tensor,
            eos_token_ids=config.eos_token_ids,
            max_num_seqs=config.max_num_seqs,
            enforce_eager=config.enforce_eager,
            space=memory.space,
        )
    engine = Engine(
        config,
        link,
        memory.pool,
        runner,
        start_copy=memory.copier.start,
        start_swap=memory.copier.start_swap,
        start_pull=memory.copier.start_pull,
        start_fetch=memory.copier.start_fetch,
        progress=memory.progress,
        map_peer=lambda message: memory.map_peer(message, descriptors),
        copy_within=memory.copy_within,
        samples=memory.samples,
        store=memory.store,
        space=memory.space if model.reads_in_place else None,
        group_progress=memory.group_progress if model.reads_in_place else None,
    )
    memory.send_descriptors(descriptors)
    link.send(Ready(memory.descriptors, model.spec.dtype, model.attention))
    try:
        engine.run()
    finally:
        memory.close()


def block_shape(model: Model, config: EngineConfig) -> ArenaLayout:
    """An arena of one block of the model's KV."""
    spec = model.spec
    return ArenaLayout(
        num_blocks=1,
        num_layers=spec.num_layers,
        block_size=config.block_size,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        dtype=spec.dtype,
    )


def _start_logging(configure: Configure) -> None:
    logging.basicConfig(
        level=configure.engine.log_level.upper(),
        format=f"%(asctime)s worker-{configure.instance} %(levelname)s %(name)s: %(message)s",
    )
