"""Groups over a real model: KV and greedy answers of a group equal those of one instance."""

import math
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from memserve.messages import SamplingParams, Submit, Tokens
from memserve.model.loading import load_model
from memserve.pool.index import pack_tokens
from memserve.pool.refs import ArenaLayout, BlockRef
from memserve.workers.memory import WorkerMemory
from memserve.workers.runner import Runner, StepRunner
from tests.model.tiny import ARCHITECTURES, VOCAB, save
from tests.workers.by_hand import HandEngine
from tests.workers.groups import running
from tests.workers.rig import BLOCK_SIZE

MAX_TOKENS = 6
TOLERANCE = 1e-4
TICKET = 1


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def engines_of(folder: Path, number: int) -> list[HandEngine]:
    """Instances that have loaded the same checkpoint."""
    models = [
        load_model(folder, device="cpu", dtype="float32", max_model_len=None, block_size=BLOCK_SIZE)
        for _ in range(number)
    ]
    spec = models[0].spec
    shape = ArenaLayout(
        num_blocks=1,
        num_layers=spec.num_layers,
        block_size=BLOCK_SIZE,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        dtype="float32",
    )

    def runner(number: int) -> Callable[[WorkerMemory], StepRunner]:
        return lambda memory: Runner(
            models[number], memory.hbm.tensor, eos_token_ids=(), space=memory.space
        )

    return [HandEngine(i, shape=shape, num_blocks=64, make_runner=runner(i)) for i in range(number)]


def kv(made: list[HandEngine], refs: list[BlockRef], num_tokens: int) -> torch.Tensor:
    """K and V [num_layers, 2, num_tokens, num_kv_heads, head_dim] of a prompt, wherever they lie."""
    blocks = [made[ref.instance].memory.hbm.tensor[ref.block] for ref in refs]
    return torch.cat(blocks, dim=2)[:, :, :num_tokens].clone()


def logprobs(engine: HandEngine, ticket: int = TICKET) -> list[tuple[int, float]]:
    """The greedy tokens and their log-probabilities."""
    events = [e for m in engine.link.sent if isinstance(m, Tokens) for e in m.events]
    return [(e.token, e.logprob or 0.0) for e in events if e.ticket == ticket]


def alone(folder: Path, prompt: list[int]) -> tuple[list[tuple[int, float]], torch.Tensor]:
    """Answer and KV of a single instance."""
    (engine,) = engines_of(folder, 1)
    with running(engine) as launcher:
        sampling = SamplingParams(max_tokens=MAX_TOKENS, seed=0, temperature=0.0, logprobs=0)
        engine.link.inbox.put(
            Submit(ticket=TICKET, choice=0, prompt=pack_tokens(prompt), sampling=sampling)
        )
        launcher.until(lambda: len(logprobs(engine)) == MAX_TOKENS)
        num_whole = len(prompt) // BLOCK_SIZE
        return logprobs(engine), kv([engine], engine.refs(prompt), num_whole * BLOCK_SIZE)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gemma3", "gpt-neox"])
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_kv_and_answer_equal_those_of_one_instance(
    tmp_path: Path, name: str, num_ranks: int
) -> None:
    folder = save(ARCHITECTURES[name].config(), tmp_path)
    prompt = torch.randint(3, VOCAB, (151,), generator=torch.Generator().manual_seed(1)).tolist()
    wanted, wanted_kv = alone(folder, prompt)
    made = engines_of(folder, num_ranks)
    with running(*made) as launcher:
        asked = launcher.submit(
            TICKET, prompt, range(num_ranks), chunk_tokens=20, max_tokens=MAX_TOKENS, keeps=True
        )
        launcher.finish(TICKET)
        found = kv(made, asked.refs, wanted_kv.shape[2])
        got = logprobs(made[0])
    assert_same_answer(got, wanted)
    assert (found - wanted_kv).abs().max() <= TOLERANCE


def test_logits_equal_those_of_one_instance_over_any_cut(tmp_path: Path) -> None:
    """Lengths around block and slice borders, prefixes that lie spread over the ranks, 2 to 4 ranks."""
    folder = save(ARCHITECTURES["llama"].config(), tmp_path)
    *made, single = engines_of(folder, 5)
    random_ = random.Random(5)
    with running(*made, single) as launcher:
        for case in range(30):
            ranks = random_.sample(range(4), random_.randint(2, 4))
            border = random_.choice([1, 2, 4, 8, 16, 24]) * BLOCK_SIZE
            length = max(2, border + random_.choice([-1, 0, 1]))
            prompt = [random_.randrange(3, VOCAB) for _ in range(length)]
            ticket, chunk_tokens = 10 * case + 1, random_.choice([4, 12, 64])
            first = launcher.submit(
                ticket, prompt, ranks, chunk_tokens=chunk_tokens, max_tokens=1, keeps=True
            )
            launcher.finish(ticket)
            num_cached = random_.randint(0, (length - 1) // BLOCK_SIZE)
            launcher.submit(
                ticket + 1,
                prompt,
                random_.sample(ranks, len(ranks)),
                chunk_tokens=random_.choice([4, 12, 64]),
                cached=first.refs[:num_cached],
                max_tokens=MAX_TOKENS,
            )
            launcher.finish(ticket + 1)
            leader = made[launcher.requests[ticket + 1].group.instances[0]]
            sampling = SamplingParams(max_tokens=MAX_TOKENS, seed=0, temperature=0.0, logprobs=0)
            single.link.inbox.put(
                Submit(
                    ticket=ticket,
                    choice=0,
                    prompt=pack_tokens(prompt),
                    sampling=sampling,
                    reuse=False,
                )
            )
            launcher.until(partial(has_answered, single, ticket))
            wanted = logprobs(single, ticket)
            assert_same_answer(logprobs(leader, ticket + 1), wanted)
            assert_same_answer(logprobs(made[ranks[0]], ticket), wanted[:1])
            launcher.abort(ticket)


def has_answered(engine: HandEngine, ticket: int) -> bool:
    return len(logprobs(engine, ticket)) == MAX_TOKENS


def assert_same_answer(got: list[tuple[int, float]], wanted: list[tuple[int, float]]) -> None:
    assert [token for token, _ in got] == [token for token, _ in wanted]
    for (_, left), (_, right) in zip(got, wanted, strict=True):
        assert math.isclose(left, right, abs_tol=TOLERANCE)
