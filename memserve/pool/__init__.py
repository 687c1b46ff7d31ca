"""The memory pool: KV blocks in an arena, their index, and reads of other instances' arenas.

Names are imported when first used, so that `memserve.pool.index` and `memserve.pool.refs` serve
processes that must not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memserve.pool.arena import Arena
    from memserve.pool.blocks import BlockAllocator
    from memserve.pool.generations import NativeBlocks, load_native_blocks
    from memserve.pool.index import RadixIndex, pack_tokens
    from memserve.pool.mempool import MemPool, PoolStats
    from memserve.pool.pending import Match, Swap
    from memserve.pool.refs import ArenaDescriptor, ArenaLayout, BlockRef, Tier, TierStats
    from memserve.pool.transfer import Transfer
    from memserve.pool.transfer.memfd import MemfdTransfer

__all__ = [
    "Arena",
    "ArenaDescriptor",
    "ArenaLayout",
    "BlockAllocator",
    "BlockRef",
    "Match",
    "MemPool",
    "MemfdTransfer",
    "NativeBlocks",
    "PoolStats",
    "RadixIndex",
    "Swap",
    "Tier",
    "TierStats",
    "Transfer",
    "load_native_blocks",
    "pack_tokens",
]

_MODULE_BY_NAME = {
    "Arena": "arena",
    "BlockAllocator": "blocks",
    "NativeBlocks": "generations",
    "load_native_blocks": "generations",
    "RadixIndex": "index",
    "pack_tokens": "index",
    "MemPool": "mempool",
    "PoolStats": "mempool",
    "Match": "pending",
    "Swap": "pending",
    "ArenaDescriptor": "refs",
    "ArenaLayout": "refs",
    "BlockRef": "refs",
    "Tier": "refs",
    "TierStats": "refs",
    "Transfer": "transfer",
    "MemfdTransfer": "transfer.memfd",
}


def __getattr__(name: str) -> object:
    if name not in _MODULE_BY_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_BY_NAME[name]}"), name)
