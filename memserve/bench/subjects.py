"""What is measured: memserve's engine as a worker runs it, and transformers as its users run it.

Both answer the same two questions: the seconds from a prompt's arrival to its first token, and the
seconds of each decode step of a batch. Greedy, without stopping tokens. Prompts of a decode
measurement are kept by both sides' caches, so that a repeat costs no prefill.
"""

import itertools
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteria
from transformers.cache_utils import DynamicCache

from memserve.bench.records import Task
from memserve.config import EngineConfig, ServeConfig
from memserve.messages import Abort, SamplingParams, Submit
from memserve.model.model import Model
from memserve.pool.index import pack_tokens
from memserve.pool.mempool import MemPool
from memserve.workers.engine import Engine
from memserve.workers.link import Link
from memserve.workers.runner import StepRunner
from memserve.workers.samples import Samples

ENDLESS = 1 << 20


def engine_config(task: Task, model: Model, max_num_batched_tokens: int) -> EngineConfig:
    """The configuration of the worker that is measured."""
    return EngineConfig(
        weights=task.weights,
        eos_token_ids=model.spec.eos_token_ids,
        device="cpu",
        dtype=task.dtype,
        max_model_len=model.spec.max_model_len,
        block_size=task.block_size,
        kv_cache_bytes=0,  # the arena is made already
        max_num_seqs=task.max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        handover_timeout=ServeConfig.handover_timeout,
        num_threads=len(task.cores),
        log_level="info",
    )


class EngineSubject:
    """A worker's engine (scheduler, pool, model, sampler, messages) whose steps are timed.

    Tokens go out through the real link and its thread; in the launcher's place a socket keeps them
    unread. Several may share one runner and pool as long as they take turns.
    """

    def __init__(self, config: EngineConfig, runner: StepRunner, pool: MemPool) -> None:
        self._launcher, worker = socket.socketpair()
        self._launcher.setblocking(False)
        self._link = Link(worker)
        self._link.start()
        self._engine = Engine(
            config,
            self._link,
            pool,
            runner,
            start_copy=_no_peer,
            start_swap=_no_peer,
            start_pull=_no_peer,
            start_fetch=_no_peer,
            progress=None,
            map_peer=_no_peer,
            copy_within=_no_peer,
            samples=Samples(),
        )
        self._tickets = itertools.count()

    def close(self) -> None:
        """End the link."""
        self._link.close()
        self._launcher.close()

    def prefill(self, prompt: list[int]) -> float:
        """Seconds until the first token of a prompt that no cache holds."""
        self._submit(prompt, max_tokens=1)
        start = time.perf_counter()
        while self._engine.step():
            pass
        seconds = time.perf_counter() - start
        self._discard_messages()
        return seconds

    def decode(self, prompts: list[list[int]], num_steps: int) -> list[float]:
        """Seconds of each of `num_steps` steps that decode all prompts together."""
        seconds = []
        with self.decoding(prompts) as engine:
            for _ in range(num_steps):
                start = time.perf_counter()
                engine.step()
                seconds.append(time.perf_counter() - start)
        return seconds

    @contextmanager
    def decoding(self, prompts: list[list[int]]) -> Iterator[Engine]:
        """The engine with all prompts prefilled and one step decoded: the next steps decode."""
        tickets = [self._submit(prompt, max_tokens=ENDLESS) for prompt in prompts]
        decoded = 0
        while decoded < len(prompts):
            before = self._engine.stats().num_decode_tokens
            assert self._engine.step(), "a sequence ended before it was measured"
            decoded = self._engine.stats().num_decode_tokens - before
        try:
            yield self._engine
            assert self._engine.stats().num_running == len(prompts)
        finally:
            for ticket in tickets:
                self._link.inbox.put(Abort(ticket))
            while self._engine.step():  # one that was launched ahead comes before the aborts
                pass
            self._discard_messages()

    def _submit(self, prompt: list[int], *, max_tokens: int) -> int:
        ticket = next(self._tickets)
        sampling = SamplingParams(max_tokens=max_tokens, seed=0, temperature=0.0, ignore_eos=True)
        packed = pack_tokens(prompt)
        self._link.inbox.put(Submit(ticket=ticket, choice=0, prompt=packed, sampling=sampling))
        return ticket

    def _discard_messages(self) -> None:
        try:
            while self._launcher.recv(1 << 16):
                pass
        except BlockingIOError:
            return


def _no_peer(*_: object) -> None:
    raise AssertionError("a worker that is measured alone has no peers")


class TransformersSubject:
    """transformers in eager mode: its default attention, its growing cache, its `generate`."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self.module: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), local_files_only=True
        ).eval()
        self._caches: dict[tuple[int, int], DynamicCache] = {}

    @torch.inference_mode()
    def prefill(self, prompt: list[int]) -> float:
        """Seconds of one forward over the whole prompt, the first token chosen."""
        start = time.perf_counter()
        output = self.module(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
        output.logits[0, -1].argmax().item()
        return time.perf_counter() - start

    @torch.inference_mode()
    def decode(self, prompts: list[list[int]], num_steps: int) -> list[float]:
        """Seconds of each of `num_steps` steps of `generate` after the prompts."""
        ids = torch.tensor(prompts)
        batch, length = ids.shape
        cache = self._caches.get((batch, length))
        if cache is None:
            cache = DynamicCache(config=self.module.config)
            for start in range(0, length - 1, 512):
                chunk = ids[:, start : min(start + 512, length - 1)]
                self.module(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
            self._caches[batch, length] = cache
        clock = StepClock()
        self.module.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            generation_config=GenerationConfig(
                do_sample=False, max_new_tokens=num_steps + 2, eos_token_id=None, pad_token_id=0
            ),
            stopping_criteria=[clock],
        )
        cache.crop(length - 1 - cache.get_seq_length())
        return clock.steps()[1:]  # the first decode step warms up, as in the engine


class StepClock(StoppingCriteria):  # type: ignore[misc]
    """Notes when `generate` has chosen each token; never stops it."""

    def __init__(self) -> None:
        self._times: list[float] = []

    def __call__(
        self,
        input_ids: torch.Tensor,
        scores: object,  # noqa: ARG002
        **kwargs: object,  # noqa: ARG002
    ) -> torch.Tensor:
        """Called by `generate` after each token."""
        self._times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)

    def steps(self) -> list[float]:
        """Seconds between neighbouring tokens."""
        return [after - before for before, after in itertools.pairwise(self._times)]
