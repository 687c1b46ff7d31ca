"""Instances of real processes that share out a tiny model, more of them than there may be cores.

A server refuses that, so the cluster is made here, its processes on the same cores in turn.
"""

import asyncio
import random
from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from memserve import launcher
from memserve.chaos.tiny import make_tiny
from memserve.cluster.cluster import Cluster
from memserve.config import ServeConfig
from memserve.generation import Generation
from memserve.launcher import plan_instances, scheduler_config
from memserve.machine import usable_cores
from memserve.messages import SamplingParams
from memserve.model.prepared import PreparedModel
from memserve.scheduler.scheduler import Scheduler
from memserve.stats import EngineStats
from tests.e2e.greedy import assert_greedy
from tests.workers.rig import answer, assert_all_home

pytestmark = pytest.mark.timeout(300)  # up to four processes load torch, on perhaps two cores

NUM_TOKENS = 16
ROUNDING = 0.6
"""What int8 may cost a chosen token's score; they spread by 2, a wrong one lies 8 below the best."""
RANDOM = random.Random(0)
DOCUMENTS = [[RANDOM.randrange(10, 40_000) for _ in range(200)] for _ in range(5)]


@asynccontextmanager
async def cluster_of(model: PreparedModel, size: int, **flags: Any) -> AsyncIterator[Cluster]:
    """One mixed instance of `size` processes with room for three of the documents."""
    config = ServeConfig(
        mixed=1,
        tensor_parallel_size=size,
        dtype="float32",
        max_model_len=1024,
        dram_cache_memory="16M",
        elastic_roles=False,
        **flags,
    )
    plans = plan_instances(config, model)
    assert {len(plan.engine.rank_cores) for plan in plans} == {size}
    scheduler = Scheduler(scheduler_config(config, plans[0].engine))
    made = Cluster(plans, scheduler, max_num_queued_reqs=100)
    async with made.running():
        yield made


async def ask(cluster: Cluster, number: int, prompt: list[int]) -> list[int]:
    asked = Generation(
        request_id=f"request-{number}",
        prompt=array("i", prompt),
        sampling=SamplingParams(max_tokens=NUM_TOKENS, seed=0, temperature=0.0, ignore_eos=True),
    )
    async with asyncio.timeout(120):
        (got,) = await answer(cluster, asked)
    return got


async def stats(cluster: Cluster) -> EngineStats:
    (report,) = await cluster.inspect()
    return report.inspection.stats


def tiny(folder: Path, like: PreparedModel, num_kv_heads: int) -> tuple[PreparedModel, Any]:
    """The tiny model as a server would have prepared it, and as transformers runs it."""
    import torch
    from transformers import AutoModelForCausalLM

    make_tiny(folder, like, 1024, num_kv_heads=num_kv_heads)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return msgspec.structs.replace(like, weights=str(folder), max_model_len=1024), reference


async def test_four_ranks_answer_as_the_whole_model_and_from_both_tiers(
    demo_model: PreparedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "usable_cores", lambda: (usable_cores() * 4)[:4])
    model, reference = tiny(tmp_path / "tiny", demo_model, 4)
    async with cluster_of(model, 4, kv_cache_memory="1536K") as cluster:
        for number, document in enumerate(DOCUMENTS * 2):
            got = await ask(cluster, number, document)
            assert len(got) == NUM_TOKENS
            assert_greedy(reference, document, got)
        seen = await stats(cluster)
        assert seen.num_swapped_out_blocks > 0
        assert seen.num_swapped_in_blocks > 0
        await assert_all_home(cluster)


async def test_history_that_two_ranks_keep_as_int8_comes_back_rounded_and_no_more(
    demo_model: PreparedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "usable_cores", lambda: (usable_cores() * 2)[:2])
    model, reference = tiny(tmp_path / "tiny", demo_model, 2)
    async with cluster_of(model, 2, kv_cache_memory="768K", dram_cache_dtype="int8") as cluster:
        for number, document in enumerate(DOCUMENTS):
            assert_greedy(reference, document, await ask(cluster, number, document))
        before = await stats(cluster)
        for number, document in enumerate(DOCUMENTS):
            got = await ask(cluster, 10 + number, document)
            assert_greedy(reference, document, got, within=ROUNDING)
        after = await stats(cluster)
        assert after.num_swapped_in_blocks > before.num_swapped_in_blocks
        assert after.num_cached_tokens - before.num_cached_tokens > 500
        await assert_all_home(cluster)
