"""Fetches, swaps and files that fail, tear or hang (scenarios C1, C2): engines stepped by hand."""

from pathlib import Path

import pytest

from tests.chaos.accidents import DOCUMENT, armed, fails, holds, tears
from tests.faults.plan import Action, Fault, Faults
from tests.workers.by_hand import HandEngine, engines
from tests.workers.rig import BLOCK_SIZE


@pytest.mark.parametrize(
    "fault", [fails("fetch", "PoolError"), fails("fetch", "StaleReference"), tears("fetch")]
)
def test_c1_a_fetch_that_fails_is_computed(fault: Fault) -> None:
    holder, receiver = HandEngine(0), HandEngine(1, faults=armed(fault))
    with engines(holder, receiver):
        holder.ask(1, DOCUMENT)
        num_good = 5 if fault.action is Action.TEAR else 0
        refs = holder.refs(DOCUMENT)
        assert receiver.ask(1, DOCUMENT, fetch=refs) == num_good * BLOCK_SIZE
        stats = receiver.engine.stats()
        assert (stats.num_failed_fetches, stats.num_fetched_blocks) == (1, num_good)
        assert receiver.ask(2, [*DOCUMENT, 1], fetch=refs) == 40  # cached by now


def test_c1_c2_a_fetch_that_hangs_is_computed_and_its_late_end_ignored() -> None:
    faults = armed(holds("fetch"))
    holder, receiver = HandEngine(0), HandEngine(1, faults=faults, stall_s=0.1)
    with engines(holder, receiver):
        holder.ask(1, DOCUMENT)
        refs = holder.refs(DOCUMENT)
        assert receiver.ask(1, DOCUMENT, fetch=refs) == 0
        assert receiver.engine.stats().num_given_up_loads == 1
        other = [9, *DOCUMENT]
        holder.ask(2, other)
        assert receiver.ask(2, other, fetch=holder.refs(other)) == 0  # nobody waits again
        assert receiver.engine.stats().num_given_up_loads == 1
        faults.release()
        receiver.drain()
        receiver.step()
        assert receiver.engine.stats().num_late_copies == 1
        another = [11, *DOCUMENT]
        holder.ask(3, another)
        assert receiver.ask(3, another, fetch=holder.refs(another)) == 40


def swapped_out(engine: HandEngine, prompt: list[int]) -> None:
    """Compute a prompt, and let DRAM have all of it."""
    engine.ask(1, prompt)
    swap = engine.pool.swap_out(len(prompt) // BLOCK_SIZE)
    assert swap is not None
    engine.memory.copier.start_swap(swap)
    engine.drain()
    engine.step()


def test_c1_c2_a_swap_in_that_hangs_is_computed_and_its_late_end_does_no_harm() -> None:
    faults = armed(holds("swap in"))
    engine = HandEngine(0, num_dram_blocks=16, faults=faults, stall_s=0.1)
    with engines(engine):
        swapped_out(engine, DOCUMENT)
        assert engine.ask(2, DOCUMENT) == 0
        stats = engine.engine.stats()
        assert (stats.num_given_up_loads, stats.num_swapped_in_blocks) == (1, 0)
        faults.release()
        engine.drain()
        engine.step()
        assert engine.engine.stats().num_late_copies == 1
        assert engine.ask(3, DOCUMENT) == 40


def test_c1_a_swap_out_that_hangs_blocks_nobody() -> None:
    """What is on its way to DRAM stays where it is; other history is dropped instead."""
    faults = armed(holds("swap out"))
    engine = HandEngine(0, num_blocks=40, num_dram_blocks=64, faults=faults, stall_s=0.1)
    with engines(engine):
        for ticket in range(1, 12):
            engine.ask(ticket, [ticket, *range(30)])
        faults.wait_for("swap out")
        assert engine.engine.stats().num_evictions > 0
        faults.release()
        engine.drain()
        engine.step()
        assert engine.ask(99, DOCUMENT) == 0


@pytest.mark.parametrize("place", ["swap in", "swap out"])
def test_c1_a_swap_that_fails_ends_the_worker(place: str) -> None:
    """Its memory can't be read: that is nothing to go on with."""
    engine = HandEngine(0, num_dram_blocks=16, faults=armed(fails(place, "MemoryError")))

    def swap() -> None:
        swapped_out(engine, DOCUMENT)
        engine.submit(2, DOCUMENT)
        engine.finish(2)

    try:
        with pytest.raises(RuntimeError, match="a copy failed"):
            swap()
    finally:
        engine.memory.close()


@pytest.mark.parametrize("fault", [fails("file read", "OSError"), tears("file read")])
def test_c1_a_file_that_can_not_be_read_is_computed(tmp_path: Path, fault: Fault) -> None:
    writer = HandEngine(0, cache_dir=str(tmp_path))
    with engines(writer):
        writer.ask(1, DOCUMENT)
        assert writer.memory.store is not None
        writer.memory.store.drain()
    faults = Faults()
    faults.arm(Fault(at=fault.at, action=fault.action, error=fault.error, skip=3))
    reader = HandEngine(1, cache_dir=str(tmp_path), faults=faults)
    with engines(reader):
        assert reader.ask(1, DOCUMENT) == 3 * BLOCK_SIZE
        disk = reader.engine.stats().disk
        assert disk is not None
        assert disk.num_read_blocks == 3
        assert disk.num_bad_files == (fault.action is Action.TEAR)


def test_c1_c2_a_disk_that_hangs_is_not_waited_for(tmp_path: Path) -> None:
    writer = HandEngine(0, cache_dir=str(tmp_path))
    with engines(writer):
        writer.ask(1, DOCUMENT)
    faults = armed(holds("file read"))
    reader = HandEngine(1, cache_dir=str(tmp_path), faults=faults, stall_s=0.1)
    with engines(reader):
        assert reader.ask(1, DOCUMENT) == 0
        assert reader.engine.stats().num_given_up_loads == 1
        assert reader.ask(2, [*DOCUMENT, 5]) == 40
        faults.release()
        assert reader.memory.store is not None
        reader.memory.store._reader.submit(lambda: None).result(timeout=10)
        reader.step()
        assert reader.engine.stats().num_late_copies == 1


@pytest.mark.parametrize(
    "fault", [fails("file write", "OSError"), tears("file write"), holds("file write")]
)
def test_c1_a_file_that_can_not_be_written_costs_hits_at_most(tmp_path: Path, fault: Fault) -> None:
    faults = armed(fault)
    writer = HandEngine(0, cache_dir=str(tmp_path), faults=faults)
    with engines(writer):
        writer.ask(1, DOCUMENT)
        faults.wait_for("file write")
        assert writer.ask(2, [1, *DOCUMENT]) == 0  # nobody waits for the writer
        faults.release()
        assert writer.memory.store is not None
        writer.memory.store.drain()
        dropped = writer.memory.store.stats().num_dropped_blocks
        assert (dropped > 0) is (fault.action is Action.FAIL)
    reader = HandEngine(1, cache_dir=str(tmp_path))
    with engines(reader):  # what failed once was written with what continues it
        assert reader.ask(1, DOCUMENT) == (0 if fault.action is Action.TEAR else 40)
        disk = reader.engine.stats().disk
        assert disk is not None
        assert disk.num_bad_files == (fault.action is Action.TEAR)
