"""The compiled copies move every byte, whatever the size and alignment of a block."""

import numpy as np
import pytest

from tests.pool.peer import native_blocks

PAGE = 4096


@pytest.mark.parametrize("shift", [0, 8, 64])
@pytest.mark.parametrize(
    "block_bytes", [16, 4 * PAGE - 1, 4 * PAGE, 4 * PAGE + 8, 9 * PAGE + 100, 12 * PAGE + 64]
)
def test_every_byte_of_a_block_arrives_and_no_other_is_touched(
    block_bytes: int, shift: int
) -> None:
    native = native_blocks()
    source = np.random.default_rng(0).integers(0, 256, 3 * block_bytes + PAGE, dtype=np.uint8)
    start = -source.ctypes.data % 64 + shift
    blocks = source[start : start + 3 * block_bytes].reshape(3, block_bytes)
    expected = np.zeros((4, block_bytes), dtype=np.uint8)
    expected[3], expected[1] = blocks[0], blocks[2]
    places, numbers = np.array([3, 1], np.int64), np.array([0, 2], np.int64)
    table, wanted = np.zeros(3, np.uint32), np.zeros(2, np.uint32)
    for verified in (False, True):
        memory = np.zeros(4 * block_bytes + PAGE, dtype=np.uint8)
        first = -memory.ctypes.data % 64
        into = memory.ctypes.data + first
        if verified:
            address = int(table.ctypes.data)
            ok = native.copy(
                *(into, places, blocks.ctypes.data, numbers, address, wanted),
                block_bytes,
                block_bytes,
            )
            assert ok == [True, True]
        else:
            native.move(into, places, blocks.ctypes.data, numbers, block_bytes)
        arrived = memory[first : first + 4 * block_bytes].reshape(4, block_bytes)
        assert (arrived == expected).all()
        assert not memory[:first].any()
        assert not memory[first + 4 * block_bytes :].any()
