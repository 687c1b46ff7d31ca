"""Small simulated clusters for tests."""

from collections.abc import Iterable, Iterator

from memserve.scheduler.interface import Role, SchedulerConfig
from memserve.sim.cluster import Setting, SimulatedCluster
from memserve.sim.costs import Profile, StepForm
from memserve.sim.dialogues import Dialogue, Request
from memserve.sim.layouts import parse_layout

STEP = StepForm(fixed=0.01, prefill_token=1e-4, prefill_pair=0, decode=1e-3, decode_pair=0)


def profile(
    *,
    kv_cache_tokens: int = 4096,
    dram_cache_tokens: int = 0,
    max_num_batched_tokens: int = 64,
    copy_latency: float = 1e-3,
    noise: float = 0.0,
    contention: float = 0.0,
) -> Profile:
    """Round numbers: a step takes 10 ms, 1 ms a decoding sequence, .1 ms a prompt token."""
    return Profile(
        name="test",
        steps=[STEP],
        copy_latency=copy_latency,
        copy_bandwidth=1e9,
        kv_bytes_per_token=1000,
        kv_cache_tokens=kv_cache_tokens,
        dram_cache_tokens=dram_cache_tokens,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=16,
        noise=noise,
        contention=contention,
    )


def setting(
    layout: str,
    machine: Profile,
    *,
    config: SchedulerConfig | None = None,
    seed: int = 0,
    num_devices: int | None = None,
) -> Setting:
    return Setting(
        profile=machine,
        roles=parse_layout(layout),
        scheduler=config or scheduler_config(),
        seed=seed,
        num_devices=num_devices,
    )


def scheduler_config(**changes: object) -> SchedulerConfig:
    values: dict[str, object] = {
        "block_size": 16,
        "max_num_batched_tokens": 64,
        "max_num_seqs": 16,
        "routing_policy": "least-load",
        "elastic_roles": False,
    }
    return SchedulerConfig(**{**values, **changes})  # type: ignore[arg-type]


def tokens(name: int, count: int) -> list[int]:
    """Tokens that belong to this name alone."""
    return [name * 100_000 + i for i in range(count)]


def single(start: float, name: int, num_prompt: int, num_outputs: int) -> Dialogue:
    request = Request(tokens(name, num_prompt), tokens(name + 500, num_outputs))
    return Dialogue(f"s{name}", start, iter([request]))


def chat(start: float, name: int, lengths: Iterable[tuple[int, int]]) -> Dialogue:
    """Turns of (new tokens, answer); each prompt holds all that was said."""

    def requests() -> Iterator[Request]:
        history: list[int] = []
        for turn, (new, answer) in enumerate(lengths):
            prompt = history + tokens(name * 10 + turn, new)
            said = tokens(name * 10 + turn + 700, answer)
            yield Request(prompt, said)
            history = prompt + said

    return Dialogue(f"c{name}", start, requests())


def problems(cluster: SimulatedCluster) -> list[str]:
    return [problem for instance in cluster.instances for problem in instance.audit()]


MIXED, PREFILL, DECODE = Role.MIXED, Role.PREFILL, Role.DECODE
