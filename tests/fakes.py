"""Stand-ins that speak the real protocols: a cluster with scripted answers, a byte tokenizer."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from memserve.errors import InvalidRequest, NotFound, RequestError, RequestFailed
from memserve.generation import ChoiceToken, Generation
from memserve.messages import Inspection, TokenEvent
from memserve.model import prepared
from memserve.pool.refs import TierStats
from memserve.stats import EngineStats
from memserve.tokens import Tokenizer

EOS = 256
IM_START = 257
VOCAB_SIZE = 258
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|eos|>\n"
    "{% endfor %}{% if tools %}[{{ tools | length }} tools]{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}{# calls as <tool_call> #}"
)


def byte_tokenizer(folder: Path, merges: Sequence[tuple[str, str]] = ()) -> Tokenizer:
    """A tokenizer whose tokens are bytes, so that one character may take several tokens.

    With `merges` it has tokens of several bytes too, from `VOCAB_SIZE` on, and one text is the text
    of several sequences of tokens.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = [*alphabet, "<|eos|>", "<|im_start|>", *(left + right for left, right in merges)]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=list(merges)
        )
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|eos|>", "<|im_start|>"])
    (folder / prepared.CHAT_TEMPLATE).write_text(TEMPLATE)
    backend.save(str(folder / "tokenizer.json"))
    assert json.loads((folder / "tokenizer.json").read_text())["added_tokens"][0]["id"] == EOS
    return Tokenizer(
        prepared.PreparedModel(
            name="bytes",
            folder=str(folder),
            weights=str(folder),
            weights_fingerprint="",
            vocab_size=len(symbols),
            max_model_len=4096,
            eos_token_ids=(EOS,),
            bos_token_id=None,
            adds_bos=False,
            special_tokens={"eos_token": "<|eos|>"},
        )
    )


def word_tokenizer(folder: Path) -> Tokenizer:
    """A tokenizer in the manner of Llama 2: words with ▁, and bytes for everything else."""
    words = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["▁", "▁hello", "▁world", "h", "e", "l", "o", "▁▁"]
    vocab = {word: token_id for token_id, word in enumerate(words)}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["</s>"])
    backend.save(str(folder / "tokenizer.json"))
    return Tokenizer(prepared_folder(folder))


def prepared_folder(folder: Path) -> prepared.PreparedModel:
    """A prepared model that has nothing but a tokenizer."""
    return prepared.PreparedModel(
        name="tiny",
        folder=str(folder),
        weights=str(folder),
        weights_fingerprint="",
        vocab_size=300,
        max_model_len=64,
        eos_token_ids=(1,),
        bos_token_id=None,
        adds_bos=False,
        special_tokens={"eos_token": "</s>"},
    )


@dataclass
class FakeInstance:
    """An instance as the metrics see it."""

    number: int
    role: str
    stats: EngineStats = field(default_factory=EngineStats)
    epoch: int = 1
    pid: int = 1
    rank_pids: list[int] = field(default_factory=lambda: [1])
    leaving: bool = False

    @property
    def name(self) -> str:
        return f"{self.role}-{self.number}"


@dataclass
class FakeReport:
    """An instance's recounted books."""

    name: str
    inspection: Inspection


class ScriptedGenerator:
    """A cluster whose answers are written beforehand; it runs no model.

    `answer` gives each choice its tokens; the end-of-sequence token follows them. It obeys
    max_tokens, min_tokens, ignore_eos and stop_token_ids as an engine does.
    """

    def __init__(self, answer: Callable[[Generation, int], list[int]]) -> None:
        self.answer = answer
        self.num_cached_tokens = 0
        self.refusal: RequestError | None = None
        """Raised on entering."""
        self._num_admitted = 0
        self.fail_at: int | None = None
        """Number of tokens of each choice after which the request fails."""
        self.hold_at: int | None = None
        """Number of tokens of each choice after which nothing more comes."""
        self.broken: Exception | None = None
        """What is raised instead of `RequestFailed`."""
        self.problem_list: list[str] = []
        self.down_list: list[str] = []
        self.generations: list[Generation] = []
        self.aborted: list[int] = []
        self.num_resets = 0
        self.num_inside = 0
        self.held = asyncio.Event()
        self.left = asyncio.Event()
        self.finished = False
        """Whether the last token of a generation has been taken."""
        tier = TierStats(total=10, free=4, active=2, historical=3, in_flight=1)
        stats = EngineStats(num_running=3, num_pulled_bytes=4096, num_cached_tokens=7, hbm=tier)
        self.instances = [FakeInstance(0, "prefill"), FakeInstance(1, "decode", stats)]

    @asynccontextmanager
    async def generate(self, generation: Generation) -> AsyncIterator[AsyncIterator[ChoiceToken]]:
        self.generations.append(generation)
        if self.refusal is not None and len(self.generations) > self._num_admitted:
            raise self.refusal
        self.num_inside += 1
        try:
            yield self._tokens(generation)
        finally:
            self.num_inside -= 1
            if not self.num_inside:
                self.left.set()

    def refuse_after(self, num_admitted: int, refusal: RequestError) -> None:
        """Admit some generations and refuse all others."""
        self._num_admitted, self.refusal = num_admitted, refusal

    def abort_choice(self, generation: Generation, choice: int) -> None:
        assert generation in self.generations
        self.aborted.append(choice)

    def problems(self) -> list[str]:
        return self.problem_list

    def down(self) -> list[str]:
        return self.down_list

    async def inspect(self) -> list[FakeReport]:
        return [
            FakeReport(f"{one.role}-{one.number}", Inspection(1, one.stats, []))
            for one in self.instances
        ]

    def reset_prefix_cache(self) -> None:
        self.num_resets += 1

    async def drain(self, number: int) -> int:
        if number > 1:
            raise NotFound(f"there is no instance {number}")
        return 7

    async def join(self, role: str) -> str:
        return f"{role}-2"

    def set_role(self, number: int, role: str) -> None:
        if number > 1:
            raise NotFound(f"there is no instance {number}")
        if role not in ("prefill", "decode", "mixed"):
            raise InvalidRequest("role must be one of prefill, decode, mixed", param="role")
        self.instances[number].role = role

    async def _tokens(self, generation: Generation) -> AsyncIterator[ChoiceToken]:
        running = {
            choice: self._choice(generation, choice) for choice in range(generation.num_choices)
        }
        position = 0
        while running:
            if position == self.fail_at:
                raise self.broken or RequestFailed("worker decode-1 has died")
            if position == self.hold_at:
                self.held.set()
                await asyncio.Event().wait()
            for choice, events in list(running.items()):
                if events[position].finish is not None:
                    del running[choice]
                self.finished = not running
                yield ChoiceToken(choice, events[position])
            position += 1
            await asyncio.sleep(0)

    def _choice(self, generation: Generation, choice: int) -> list[TokenEvent]:
        sampling = generation.sampling
        tokens = [*self.answer(generation, choice), EOS][: sampling.max_tokens]
        events = []
        for position, token in enumerate(tokens):
            ends = (token == EOS and not sampling.ignore_eos) or token in sampling.stop_token_ids
            finish = "stop" if ends and position >= sampling.min_tokens else None
            if finish is None and position + 1 == len(tokens):
                finish = "length"
            top = tuple((other, -1.0 - other) for other in range(sampling.logprobs or 0))
            events.append(
                TokenEvent(
                    ticket=1,
                    position=position,
                    token=token,
                    finish=finish,
                    logprob=-0.25 if sampling.logprobs is not None else None,
                    top=top,
                    num_cached_tokens=self.num_cached_tokens if position == 0 else 0,
                )
            )
            if finish is not None:
                break
        return events
