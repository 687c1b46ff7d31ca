"""What each instance has been given to prefill: a guess at what its cache holds.

One radix tree per instance, fed at dispatch and bounded like the instance's own cache (least recently
used prompts go first). A wrong guess costs time, never an answer: the instance's own index decides
what is reused.
"""

from memserve.pool.index import RadixIndex, pack_tokens


class PromptTree:
    """Prompts by instance, in whole blocks of `block_size` tokens."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._prompts: dict[int, RadixIndex[None]] = {}

    def match(self, instance: int, prompt: list[int], salt: str) -> int:
        """Leading tokens of `prompt` that the instance has probably cached; never all of them."""
        known = self._prompts.get(instance)
        return 0 if known is None else len(known.match(prompt[:-1], salt)) * self._block_size

    def record(self, instance: int, prompt: list[int], salt: str, *, num_blocks: int) -> None:
        """The instance will have computed this prompt; it caches at most `num_blocks` blocks."""
        known = self._prompts.setdefault(instance, RadixIndex(self._block_size))
        packed = pack_tokens(prompt)
        known.insert(packed, [None] * (len(prompt) // self._block_size), salt)
        known.evict(max(0, len(known) - num_blocks), lambda _: True, partial=True)

    def forget(self, instance: int) -> None:
        """The instance has lost its cache."""
        self._prompts.pop(instance, None)
