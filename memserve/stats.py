"""What a worker counts of itself, and how the counters of its lives add up.

Counters start from zero with every life of a worker; who shows them adds up the lives, since a counter
that falls looks like another server. Gauges are of the moment. Values only: who fills them in is
`memserve.workers.books`.
"""

import msgspec

from memserve.pool.refs import TierStats


class DiskStats(msgspec.Struct, frozen=True, kw_only=True):
    """Counters of one worker's history in files, since its start."""

    num_read_blocks: int = 0
    """Cached blocks of prompts read from files instead of computed."""
    num_read_bytes: int = 0
    num_written_blocks: int = 0
    num_written_bytes: int = 0
    num_dropped_blocks: int = 0
    """Not written: the disk was too slow, or failed."""
    num_bad_files: int = 0
    """Torn, damaged or foreign; removed."""


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """Counters (since start) and gauges of one worker."""

    num_running: int = 0
    num_waiting: int = 0
    num_incoming: int = 0
    num_steps: int = 0
    num_preemptions: int = 0
    num_prefill_tokens: int = 0
    num_decode_tokens: int = 0
    num_cached_tokens: int = 0
    num_queried_tokens: int = 0
    num_pulls: int = 0
    """Copies started for handovers, each of many blocks; by layer one for each layer."""
    num_pulled_blocks: int = 0
    num_pulled_bytes: int = 0
    num_returned_blocks: int = 0
    """Of those, copied for the cache alone: decoded elsewhere, or history of one that has left."""
    num_failed_pulls: int = 0
    num_fetched_blocks: int = 0
    """Cached blocks of prompts copied from other instances instead of computed."""
    num_fetched_bytes: int = 0
    num_failed_fetches: int = 0
    """Fetches that found less than was named."""
    num_handovers: int = 0
    num_declined: int = 0
    num_withdrawn: int = 0
    """Prompts that were taken back, and decoded where they were prefilled."""
    num_given_up_loads: int = 0
    """Prompts that were computed since the copies that they waited for did not move."""
    num_late_copies: int = 0
    """Copies that ended when nobody waited for them any more: ignored."""
    num_expired_leases: int = 0
    """Blocks allocated for others and not renewed in time."""
    num_evictions: int = 0
    num_swapped_out_blocks: int = 0
    num_swapped_in_blocks: int = 0
    num_swapped_bytes: int = 0
    num_group_steps: int = 0
    """Steps that computed a part of a prompt that a group of instances shares."""
    num_remote_blocks: int = 0
    """Other instances' blocks that were attended to where they lie, counted again in each step."""
    num_remote_bytes: int = 0
    num_remote_decode_tokens: int = 0
    """Tokens decoded over such blocks: of prompts that this instance does not hold by itself."""
    num_gathered_blocks: int = 0
    """Blocks of a group's other ranks copied here by the leader."""
    num_kept_blocks: int = 0
    """Active blocks of history that lies on several instances: it gives way like other history."""
    hbm: TierStats | None = None
    dram: TierStats | None = None
    """None where there is no DRAM tier."""
    disk: DiskStats | None = None
    """None where no history is kept in files."""


def add_up(former: EngineStats, now: EngineStats) -> EngineStats:
    """The counters of a worker's earlier lives and of this one together; gauges are of now."""
    gauges = {
        "num_running",
        "num_waiting",
        "num_incoming",
        "num_kept_blocks",
        "hbm",
        "dram",
        "disk",
    }
    before = msgspec.structs.asdict(former)
    sums = {
        name: count + before[name]
        for name, count in msgspec.structs.asdict(now).items()
        if name not in gauges
    }
    disk = now.disk or former.disk
    if now.disk is not None and former.disk is not None:
        before = msgspec.structs.asdict(former.disk)
        counts = msgspec.structs.asdict(now.disk)
        disk = DiskStats(**{name: count + before[name] for name, count in counts.items()})
    return msgspec.structs.replace(now, disk=disk, **sums)
