"""Teacher-forced logits of every served architecture equal transformers' own, however sliced."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from memserve.model.loading import load_model
from memserve.model.model import Model
from tests.model.paging import Arena, assert_same, run_chunks, run_step, step_of
from tests.model.tiny import ARCHITECTURES, VOCAB, WINDOW, build, save

BLOCK = 4


@dataclass
class Case:
    model: Model
    reference: PreTrainedModel
    windowed: bool

    @torch.inference_mode()
    def expected(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.reference(input_ids=tokens[None], use_cache=False).logits[0]
        return logits.float()

    def load(self, tokens: torch.Tensor) -> tuple[Arena, torch.Tensor]:
        return Arena(self.model, BLOCK), self.expected(tokens)


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    tiny = ARCHITECTURES[request.param]
    folder: Path = save(tiny.config(), tmp_path_factory.mktemp(request.param))
    model = load_model(folder, device="cpu", dtype="float32", max_model_len=None, block_size=BLOCK)
    return Case(model, build(tiny.config()), tiny.windowed)


def tokens_of(length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed))


def test_distant_context_changes_the_output(case: Case) -> None:
    tokens = tokens_of(40)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(5))
    permuted = torch.cat([tokens[:16], tokens[16:24][order], tokens[24:]])
    change = (case.expected(tokens)[-1] - case.expected(permuted)[-1]).abs().max()
    assert change > 0.01


@pytest.mark.parametrize(
    "chunks",
    [
        (41,),
        (3, 4, 5, 1, 28),
        (17, 1, 1, 22),
        (WINDOW, 1, WINDOW - 1, WINDOW + 1, 4),
        (16, 25),
        (1,) * 41,
    ],
    ids=["whole", "odd", "chunk-decode-chunk", "window", "block-border", "decode"],
)
def test_a_sequence_in_chunks_has_the_logits_of_the_whole(
    case: Case, chunks: tuple[int, ...]
) -> None:
    tokens = tokens_of(sum(chunks))
    arena, want = case.load(tokens)
    assert_same(run_chunks(case.model, arena, arena.sequence(tokens), chunks), want)


@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, BLOCK + 1, WINDOW, WINDOW + 1, 33])
def test_every_length_around_a_border_is_right(case: Case, length: int) -> None:
    tokens = tokens_of(length, seed=length)
    arena, want = case.load(tokens)
    assert_same(run_chunks(case.model, arena, arena.sequence(tokens), (length,)), want)


def test_a_layer_is_reported_once_its_keys_and_values_are_written(case: Case) -> None:
    arena, _ = case.load(tokens_of(21))
    sequence = arena.sequence(tokens_of(21))
    run_step(case.model, arena, [(sequence, 9)])
    seen: list[torch.Tensor] = []
    step = step_of([(sequence, 12)])
    case.model.forward(step, arena.tensor, lambda _: seen.append(arena.tensor.clone()))
    assert len(seen) == case.model.spec.num_layers
    after = arena.tensor.nan_to_num(7)
    for layer, then in enumerate(seen):
        assert torch.equal(then[:, : layer + 1].nan_to_num(7), after[:, : layer + 1])
        assert not torch.equal(then[:, layer + 1 :].nan_to_num(7), after[:, layer + 1 :]) or (
            layer + 1 == len(seen)
        )


def test_packed_sequences_do_not_see_each_other(case: Case) -> None:
    arena = Arena(case.model, BLOCK)
    texts = [tokens_of(n, seed=n) for n in (37, 9, 20, 5)]
    first, second, third, fourth = (arena.sequence(t) for t in texts)
    run_step(case.model, arena, [(first, 18), (second, 8), (third, 1)])
    run_step(case.model, arena, [(second, 1), (first, 2), (third, 17), (fourth, 3)])
    run_step(case.model, arena, [(fourth, 2), (third, 2), (first, 17)])
    for sequence, tokens in zip((first, second, third, fourth), texts, strict=True):
        assert_same(torch.cat(sequence.logits), case.expected(tokens))


def test_a_prefix_computed_by_another_sequence_serves_as_context(case: Case) -> None:
    arena = Arena(case.model, BLOCK)
    prefix = tokens_of(4 * BLOCK)
    donor = arena.sequence(torch.cat([prefix, tokens_of(5, seed=2)]))
    run_step(case.model, arena, [(donor, len(donor.tokens))])
    tokens = torch.cat([prefix, tokens_of(19, seed=4)])
    heir = arena.sequence(tokens)
    heir.blocks[:4] = donor.blocks[:4]
    heir.num_computed = len(prefix)
    run_step(case.model, arena, [(heir, 19)])
    assert_same(torch.cat(heir.logits), case.expected(tokens)[len(prefix) :])
