"""What other ranks are told of a step is the step."""

import dataclasses

import torch
from hypothesis import given
from hypothesis import strategies as st

from memserve.model.step import StepInput
from memserve.tensor.follower import step_input, step_message

SLICES = st.lists(
    st.tuples(st.integers(0, 60), st.integers(1, 40)), min_size=1, max_size=6
)  # of each sequence: tokens known before, tokens of this step


@given(SLICES, st.integers(0, 2**31 - 1))
def test_every_tensor_survives_the_message(slices: list[tuple[int, int]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    counts = torch.tensor([0] + [count for _, count in slices])
    query_start = counts.cumsum(0).int()
    total = int(query_start[-1])
    step = StepInput(
        token_ids=torch.randint(1 << 20, (total,), generator=generator),
        positions=torch.cat([torch.arange(start, start + count) for start, count in slices]),
        query_start=query_start,
        kv_len=torch.tensor([start + count for start, count in slices], dtype=torch.int32),
        block_table=torch.randint(1000, (len(slices), 7), generator=generator, dtype=torch.int32),
        output_rows=query_start[1:].long() - 1,
    )
    again = step_input(step_message(step))
    for field in dataclasses.fields(StepInput):
        before, after = getattr(step, field.name), getattr(again, field.name)
        if before is None:
            assert after is None
        else:
            assert before.dtype == after.dtype
            assert torch.equal(before, after)
