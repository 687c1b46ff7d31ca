"""The kernel that gathers blocks, in Triton's interpreter: no GPU needed."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest

PROGRAM = """
import numpy as np
import torch
from memserve.pool.transfer.gather import gather_blocks

torch.manual_seed(0)
for block_bytes, offset, num_bytes in ((64, 0, 64), (20480, 0, 20480), (20480, 4096, 8208)):
    source = torch.randint(0, 256, (9, block_bytes), dtype=torch.uint8)
    destination = torch.zeros(7, block_bytes, dtype=torch.uint8)
    wanted = destination.clone()
    blocks, into = [8, 0, 3, 8], [5, 6, 0, 2]
    for block, place in zip(blocks, into):
        wanted[place, offset : offset + num_bytes] = source[block, offset : offset + num_bytes]
    gather_blocks(
        source.data_ptr() + offset,
        torch.tensor(blocks),
        destination.data_ptr() + offset,
        torch.tensor(into),
        block_bytes=block_bytes,
        num_bytes=num_bytes,
    )
    assert torch.equal(destination, wanted), (block_bytes, offset, num_bytes)
gather_blocks(
    source.data_ptr(), torch.tensor([]), destination.data_ptr(), torch.tensor([]),
    block_bytes=64, num_bytes=64,
)
assert torch.equal(destination, wanted)
print("gathered")
"""


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from memserve.pool.transfer.gather import PIECE_WORDS, _gather

types = {
    "source": "i64", "blocks": "*i64", "destination": "i64", "into": "*i64", "stride": "i64",
    "num_words": "i32", "PIECE": "constexpr",
}
aligned = {(number,): [["tt.divisibility", 16]] for number in range(6)}
source = ASTSource(_gather, types, constexprs={"PIECE": PIECE_WORDS}, attrs=aligned)
print(compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"])
"""

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton isn't installed: extra `test`"
)


def run(program: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_triton
def test_the_named_parts_of_the_named_blocks_are_copied_and_nothing_else() -> None:
    assert run(PROGRAM, TRITON_INTERPRET="1").strip() == "gathered"


@needs_triton
def test_a_gpu_copies_sixteen_bytes_at_a_time() -> None:
    """The code for an H100, compiled without one."""
    code = run(COMPILE)
    for kind in ("ld", "st"):
        assert re.search(rf"{kind}\.global\.v[24]\.b(64|32)", code)
