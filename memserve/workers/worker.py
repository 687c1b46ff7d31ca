"""Builds one worker: model, arena, pool, copy thread, engine; and runs it to its end."""

import logging
import os
import socket
from pathlib import Path

import msgspec
import torch

from memserve.channel import receive_descriptor, send_descriptor
from memserve.config import EngineConfig
from memserve.errors import UsageError
from memserve.messages import Configure, MapPeer, Ready, StartFailed
from memserve.model.loading import load_model
from memserve.model.model import Model
from memserve.pool.arena import Arena
from memserve.pool.generations import load_native_blocks
from memserve.pool.mempool import MemPool
from memserve.pool.refs import ArenaLayout
from memserve.pool.transfer.memfd import MemfdTransfer
from memserve.workers.copying import Copier
from memserve.workers.engine import Engine
from memserve.workers.link import Link
from memserve.workers.runner import Runner

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
    finally:
        link.close()


def serve(configure: Configure, link: Link, descriptors: socket.socket) -> None:
    """Build the worker, report ready, and run its engine. Raises `UsageError` if it can't start."""
    config = configure.engine
    torch.set_num_threads(config.num_threads)
    torch.set_grad_enabled(False)
    model = load_model(
        Path(config.weights),
        device=config.device,
        dtype=config.dtype,
        max_model_len=config.max_model_len,
        block_size=config.block_size,
    )
    native = load_native_blocks()
    arena = Arena(
        arena_layout(model, config),
        instance=configure.instance,
        epoch=configure.epoch,
        native=native,
    )
    transfer = MemfdTransfer(arena, native)
    copier = Copier(transfer, link.inbox)

    def map_peer(message: MapPeer) -> None:
        descriptor = receive_descriptor(descriptors)
        try:
            transfer.map(message.arena, descriptor)
        finally:
            os.close(descriptor)

    engine = Engine(
        config,
        link,
        MemPool(arena.descriptor, arena.generations),
        Runner(model, arena.tensor, eos_token_ids=config.eos_token_ids),
        start_copy=copier.start,
        map_peer=map_peer,
    )
    send_descriptor(descriptors, arena.fd)
    link.send(Ready(arena.descriptor, model.spec.dtype, model.attention))
    try:
        engine.run()
    finally:
        copier.close()
        arena.close()


def arena_layout(model: Model, config: EngineConfig) -> ArenaLayout:
    """As many blocks of the model's shape as the configured memory holds."""
    spec = model.spec
    shape = ArenaLayout(
        num_blocks=1,
        num_layers=spec.num_layers,
        block_size=config.block_size,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        dtype=spec.dtype,
    )
    return msgspec.structs.replace(shape, num_blocks=config.kv_cache_bytes // shape.block_bytes)


def _start_logging(configure: Configure) -> None:
    logging.basicConfig(
        level=configure.engine.log_level.upper(),
        format=f"%(asctime)s worker-{configure.instance} %(levelname)s %(name)s: %(message)s",
    )
