"""Times a few steps and copies on an idle engine: the scheduler's first model of their cost.

Everything runs on blocks that are free in HBM and are free again afterwards; what they hold does not
matter, since time does not depend on it. Short steps run twice and the faster run counts. When
`BUDGET_S` is spent nothing runs any more, except the first few cases, once: they tell fixed costs from
those by token. Copies go from one block of the own arena to another: what a pull from a peer's arena
costs too, but for the first touch of its pages.
"""

import time
from array import array
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import partial

from memserve.config import EngineConfig
from memserve.messages import CopySample, SamplingParams, StepSample
from memserve.pool.mempool import MemPool
from memserve.workers.samples import step_sample
from memserve.workers.sequence import Sequence, Slice

BUDGET_S = 1.2
REPEATED_S = 0.1  # shorter steps than this run twice
LONG_CONTEXT = 1024  # tokens, where the arena has room for them
SHORT_CONTEXT = 64
COPIED_BLOCKS = (1, 8, 64)
NUM_NEEDED = 9  # of the cases, however long they take
NUM_TOKEN_IDS = 64  # every vocabulary has so many
TICKET = -1  # of no request

RunStep = Callable[[Items[Slice]], object]
CopyBlocks = Callable[[list[int], list[int]], None]
"""Copy these blocks of the own arena to those."""


@dataclass(frozen=True, slots=True)
class Case:
    """A step: `rows` sequences of `context` known tokens, each with `new` ones to compute."""

    rows: int
    new: int
    context: int


def calibrate(
    pool: MemPool, run: RunStep, copy: CopyBlocks, config: EngineConfig
) -> tuple[list[StepSample], list[CopySample]]:
    """The timed steps and copies; no engine step may run meanwhile.

    Steps stay within the limits of `config`. Without a free block in HBM nothing can be timed.
    """
    max_tokens, max_rows = config.max_num_batched_tokens, config.max_num_seqs
    max_len = config.max_model_len
    longest = min(max_len, max_tokens + LONG_CONTEXT)
    scratch = pool.alloc_mem(min(pool.num_free, 2 * -(-longest // pool.block_size)))
    try:
        room = len(scratch) * pool.block_size
        wanted = cases(max_tokens, max_rows, min(longest, room)) if scratch else []
        steps = _time_steps(wanted, scratch, pool.block_size, run)
        return steps, _time_copies(scratch, pool.descriptor.layout.block_bytes, copy)
    finally:
        pool.free_mem(scratch)


def cases(max_tokens: int, max_rows: int, max_len: int) -> list[Case]:
    """What to time, the most telling cases first; nothing is longer than `max_len` tokens."""
    most = min(max_tokens, max_len)
    context = max(0, min(LONG_CONTEXT, max_len - most))
    short, long = min(SHORT_CONTEXT, max_len), min(LONG_CONTEXT, max_len)
    many = min(16, max_rows, max_tokens)
    found = [
        Case(1, min(64, most), 0),
        Case(1, 1, short - 1),
        Case(many, 1, short - 1),
        Case(many, 1, long - 1),
        Case(1, min(16, most), 0),
        Case(1, 1, long - 1),
        Case(1, min(256, most), 0),
        Case(1, most, 0),
        Case(1, most, context),
        Case(1, min(64, most), context),
        Case(min(4, many), 1, long - 1),
        Case(min(4, many), 1, short - 1),
        Case(1, min(256, most), context),
    ]
    return list(dict.fromkeys(found))


def _time_steps(
    wanted: list[Case], scratch: list[int], block_size: int, run: RunStep
) -> list[StepSample]:
    samples: list[StepSample] = []
    for number, case in enumerate(wanted):
        slices = _slices(case, scratch, block_size)
        step = partial(run, slices)
        if number == 0:
            step()  # what is built at the first step of all
            started = time.perf_counter()
        in_time = time.perf_counter() - started < BUDGET_S
        if not in_time and number >= NUM_NEEDED:
            break
        best = _seconds(step)
        if in_time and best < REPEATED_S:
            best = min(best, _seconds(step))
        samples.append(step_sample(slices, best))
    return samples


def _time_copies(scratch: list[int], block_bytes: int, copy: CopyBlocks) -> list[CopySample]:
    samples = []
    for num_blocks in COPIED_BLOCKS:
        sources, destinations = scratch[:num_blocks], scratch[num_blocks : 2 * num_blocks]
        if len(destinations) == num_blocks:
            call = partial(copy, sources, destinations)
            best = min(_seconds(call) for _ in range(3))
            samples.append(CopySample(num_blocks * block_bytes, best))
    return samples


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _slices(case: Case, scratch: list[int], block_size: int) -> list[Slice]:
    """The step of a case; its sequences take the scratch blocks in turn, and share them if need be."""
    num_tokens = case.context + case.new
    num_blocks = -(-num_tokens // block_size)
    slices = []
    for row in range(case.rows):
        blocks = [scratch[(row * num_blocks + i) % len(scratch)] for i in range(num_blocks)]
        sequence = Sequence(
            ticket=TICKET,
            choice=row,
            tokens=array("i", (i % NUM_TOKEN_IDS for i in range(num_tokens))),
            num_prompt_tokens=num_tokens - (case.new == 1),
            sampling=SamplingParams(max_tokens=num_tokens, seed=0, temperature=0.0),
            num_computed=case.context,
            blocks=array("i", blocks),
        )
        slices.append(Slice(sequence, case.new))
    return slices
