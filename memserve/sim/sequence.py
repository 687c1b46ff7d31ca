"""A request on a simulated instance: how far it is computed, and what it holds there."""

from dataclasses import dataclass, field

from memserve.pool.index import TOKEN_BYTES


@dataclass(slots=True, eq=False)
class Sequence:
    """A ticket on one instance: how far it is computed, and the blocks that it holds there.

    `packed` are the tokens of prompt and answer, the answer being known beforehand; what has not been
    generated yet is not looked at. `num_blocks` blocks are held: `pinned`, which the index keeps, and
    `num_private` others.
    """

    ticket: int
    packed: bytes
    num_prompt_tokens: int
    max_outputs: int
    salt: str
    order: float
    reuse: bool
    decode_on: int | None = None
    chunk_tokens: int | None = None
    """Most prompt tokens of a step that computes it beside sequences that decode."""
    num_outputs: int = 0
    num_computed: int = 0
    num_cached_tokens: int = 0
    num_published: int = 0
    """Blocks that the decode instance has been told of."""
    pinned: list[int] = field(default_factory=list)
    num_private: int = 0
    fetching: bool = False
    """Blocks are still to be fetched for it before it is admitted."""
    num_remote: int = 0
    """Blocks that other ranks of a group hold for it."""

    @property
    def num_tokens(self) -> int:
        """Prompt and answer so far."""
        return self.num_prompt_tokens + self.num_outputs

    @property
    def num_pending(self) -> int:
        """Tokens without KV: 1 while decoding."""
        return self.num_prompt_tokens + self.num_outputs - self.num_computed

    @property
    def prefilling(self) -> bool:
        """Whether more than its newest own token is still to be computed."""
        return self.num_pending > 1 or not self.num_outputs

    @property
    def num_blocks(self) -> int:
        """Blocks held, here or by others for it."""
        return len(self.pinned) + self.num_private + self.num_remote

    @property
    def claim(self) -> tuple[float, int]:
        """Waiting prompts start in this order."""
        return (self.order, self.ticket)

    def whole(self, num_tokens: int, block_size: int) -> bytes:
        """The packed tokens of the whole blocks among the first `num_tokens`."""
        return self.packed[: num_tokens // block_size * block_size * TOKEN_BYTES]
