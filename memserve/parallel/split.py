"""Which rank computes which tokens of a prompt that a group of instances prefills together.

Contract: every rank and the scheduler call the same functions with the same arguments and get the
same answer. New tokens are cut into chunks, a chunk into 2m slices of whole blocks for m ranks, and
rank r takes slices r and 2m - 1 - r, so that the ranks attend to equally many earlier tokens. The last
slice, and with it the prompt's last token, is rank 0's: the leader samples. No torch here.
"""

from itertools import pairwise

Range = tuple[int, int]
"""Positions from the first to before the second."""


def chunks(
    start: int, end: int, *, num_ranks: int, chunk_tokens: int, block_size: int
) -> list[Range]:
    """The tokens from `start`, a block's first, to `end`, in steps of the whole group.

    As equal in size as whole blocks allow, and at most `chunk_tokens` for each rank, rounded up to
    what gives every slice whole blocks.
    """
    if start % block_size:
        raise ValueError(f"position {start} does not begin a block")
    num_blocks = -(-(end - start) // block_size)
    most = max(1, num_ranks * chunk_tokens // block_size)
    num_chunks = -(-num_blocks // most)
    bounds = [start + num_blocks * i // num_chunks * block_size for i in range(num_chunks)]
    return list(pairwise([*bounds, end])) if num_chunks else []


def slices(chunk: Range, *, num_ranks: int, block_size: int) -> list[list[Range]]:
    """For each rank the parts of a chunk that it computes, in order; empty ones left out."""
    start, end = chunk
    num_blocks = -(-(end - start) // block_size)
    num_slices = 2 * num_ranks
    bounds = [start + num_blocks * i // num_slices * block_size for i in range(num_slices)] + [end]
    parts = list(pairwise(bounds))
    shares = ([parts[rank], parts[num_slices - 1 - rank]] for rank in range(num_ranks))
    return [[part for part in share if part[0] < part[1]] for share in shares]


def owners(
    start: int, end: int, *, num_ranks: int, chunk_tokens: int, block_size: int
) -> list[int]:
    """The rank that fills each block of the tokens from `start`, a block's first, to `end`."""
    found: list[tuple[int, int]] = []
    for chunk in chunks(
        start, end, num_ranks=num_ranks, chunk_tokens=chunk_tokens, block_size=block_size
    ):
        for rank, share in enumerate(slices(chunk, num_ranks=num_ranks, block_size=block_size)):
            found += [(first, rank) for part in share for first in range(*part, block_size)]
    return [rank for _, rank in sorted(found)]
