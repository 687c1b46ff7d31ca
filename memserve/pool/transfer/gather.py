"""Blocks from one place in GPU memory to another, all of them by one launch (Triton)."""

import torch
import triton
import triton.language as tl

WORD_BYTES = 8
PIECE_WORDS = 1024  # 8 KiB for each program


@triton.jit  # type: ignore[untyped-decorator]
def _gather(  # type: ignore[no-untyped-def] # noqa: ANN202
    source,  # noqa: ANN001
    blocks,  # noqa: ANN001
    destination,  # noqa: ANN001
    into,  # noqa: ANN001
    stride,  # noqa: ANN001
    num_words,  # noqa: ANN001
    PIECE: tl.constexpr,  # noqa: N803 - Triton's way to write a constant
):
    number = tl.program_id(0)
    word = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    # Said once more, since it is lost on the way from a number to an address: 16 bytes at a time.
    start = tl.multiple_of(source.to(tl.pointer_type(tl.int64)), 16)
    target = tl.multiple_of(destination.to(tl.pointer_type(tl.int64)), 16)
    start += tl.load(blocks + number) * stride
    target += tl.load(into + number) * stride
    inside = word < num_words
    tl.store(target + word, tl.load(start + word, mask=inside), mask=inside)


def gather_blocks(
    source: int,
    blocks: torch.Tensor,
    destination: int,
    into: torch.Tensor,
    *,
    block_bytes: int,
    num_bytes: int,
) -> None:
    """Copy the first `num_bytes` of blocks `blocks[i]` from address `source` on to blocks `into[i]`.

    `source` and `destination` are addresses that the current GPU can read and write, the former may be
    another process's memory. `blocks` and `into` are int64 [N] on that GPU. Runs on torch's current
    stream. Nothing is checked; addresses and byte counts are multiples of 16.
    """
    if not len(blocks):
        return
    num_words = num_bytes // WORD_BYTES
    grid = (len(blocks), triton.cdiv(num_words, PIECE_WORDS))
    _gather[grid](
        source, blocks, destination, into, block_bytes // WORD_BYTES, num_words, PIECE_WORDS
    )
