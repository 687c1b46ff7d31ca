"""What a simulated instance's steps and copies truly take, and the profiles of known machines.

A step's time is the largest of a few linear forms of what it computes: one form where everything adds
up (a fit of measured steps), two for a roofline (memory traffic, arithmetic). The scheduler never sees
these: it learns from samples, as it does from real workers.

Built-in profiles, and where their numbers come from:

`cpu-demo`, `cpu-demo-1core`: measured on two CPU cores with the demo model (30 layers, 3 KV heads of
64, bfloat16): a decode step takes 14 ms at batch 1 and 19.5 ms at batch 8 with both cores, 23.5 and
34.5 ms with one; a prompt token in chunks of 512 takes .21 and .34 ms. So a decoding sequence adds
(19.5 - 14) / 7 = .79 ms to a fixed 13.2 ms, and a prompt token (107.5 - 13.2) / 512 = .184 ms.
Attention: 30 layers x 4 x 9 heads x 64 floating-point operations a pair at about 60 (36) GFLOP/s for
decode contexts, and at ten times that inside a chunk.

`h100-8b`: a roofline of an 8-billion-parameter Llama 3 (32 layers, 8 KV heads of 128) in bfloat16 on
one H100 SXM: 16 GB of weights and 131,072 bytes of KV a token at 3.35 TB/s x .8; 2 x 8e9 operations a
token and 4 x 32 x 4096 a pair at 989 TFLOP/s x .5; 2 ms a step for launching and sampling. So a decode
step is 8 ms at small batches, and a step with 2,048 prompt tokens 70 ms. KV cache: 80 GB x .9 less the
weights and 6 GB of workspace = 50 GB. Copies between instances: NVLink, 450 GB/s x .6.

`h100x4-70b`: the same for 70 billion parameters (80 layers of width 8192) over four H100s as one
instance, each of the rates four times: a decode step is 15 ms, 2,048 prompt tokens take 150 ms. KV
cache: 288 GB less 140 GB of weights and 24 GB of workspace, 327,680 bytes a token. The time of tensor
parallelism's own communication is left out.
"""

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from memserve.errors import UsageError

Floats = npt.NDArray[np.float64]


class StepForm(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds of a step as a linear form."""

    fixed: float
    prefill_token: float
    prefill_pair: float
    """For each pair of a prompt token and a token that it attends to."""
    decode: float
    """For each sequence that decodes."""
    decode_pair: float
    """For each token that a decoding sequence attends to."""


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One kind of instance; also the format of `--cost-model` files."""

    name: str
    steps: list[StepForm]
    """A step takes the largest of these."""
    copy_latency: float
    """Seconds before the first byte of a copy out of another instance."""
    copy_bandwidth: float
    """Bytes a second, between instances and between the tiers of one."""
    kv_bytes_per_token: int
    kv_cache_tokens: int
    dram_cache_tokens: int = 0
    max_num_batched_tokens: int = 512
    max_num_seqs: int = 64
    contention: float = 0.0
    """Added share of a step's time for each other instance that is busy on the same device."""
    sync_seconds: float = 1e-3
    """What the ranks of a group wait for each other in a step of all layers, for each doubling."""
    request_seconds: float = 0.0
    """What launcher and clients take for a request before it is sent on, one after the other."""
    message_seconds: float = 0.0
    """What they take for the message of a step, of the cores that instances share: a longer step."""
    token_seconds: float = 0.0
    """The same for each sequence that decodes in it."""
    noise: float = 0.0
    """Standard deviation of the logarithm of a step's time."""

    def step_seconds(
        self, num_prefill: int, prefill_pairs: int, num_decodes: int, decode_pairs: int
    ) -> float:
        """The time of one step without noise and contention."""
        told = self.message_seconds + self.token_seconds * num_decodes
        return told + max(
            form.fixed
            + form.prefill_token * num_prefill
            + form.prefill_pair * prefill_pairs
            + form.decode * num_decodes
            + form.decode_pair * decode_pairs
            for form in self.steps
        )

    def decode_seconds(self, num_decodes: int, decode_pairs: int, num_steps: int) -> Floats:
        """The times of steps in a row in which the same sequences decode."""
        pairs = decode_pairs + num_decodes * np.arange(num_steps, dtype=np.float64)
        forms = [
            form.fixed + form.decode * num_decodes + form.decode_pair * pairs for form in self.steps
        ]
        longest: Floats = np.max(forms, axis=0)
        return longest + self.message_seconds + self.token_seconds * num_decodes

    def copy_seconds(self, num_bytes: int) -> float:
        """The time of one copy between instances or tiers."""
        return self.copy_latency + num_bytes / self.copy_bandwidth


def _cpu_demo(name: str, fixed: float, decode: float, token: float, flops: float) -> Profile:
    pair = 30 * 4 * 9 * 64 / flops
    return Profile(
        name=name,
        steps=[StepForm(fixed, token, pair / 10, decode, pair)],
        copy_latency=3e-4,
        copy_bandwidth=8e9,
        kv_bytes_per_token=30 * 2 * 3 * 64 * 2,
        kv_cache_tokens=44_000,  # 1 GB
        max_num_batched_tokens=512,
    )


def _roofline(
    name: str,
    *,
    num_gpus: int,
    parameters: float,
    num_layers: int,
    width: int,
    kv_cache_tokens: int,
) -> Profile:
    """Llama-like models in bfloat16 with 8 KV heads of 128, over `num_gpus` H100s as one instance."""
    memory, arithmetic = num_gpus * 3.35e12 * 0.8, num_gpus * 989e12 * 0.5
    weights, kv = 2 * parameters, num_layers * 2 * 8 * 128 * 2
    token, pair = 2 * parameters / arithmetic, 4 * num_layers * width / arithmetic
    launch = 2e-3
    return Profile(
        name=name,
        # Kernels follow each other: matrix products take what reading the weights or computing takes,
        # attention adds its own time, bound by memory in decode and by arithmetic in a chunk.
        steps=[
            StepForm(launch + weights / memory, 0.0, pair, 0.0, kv / memory),
            StepForm(launch, token, pair, token, kv / memory),
        ],
        copy_latency=2e-4,
        copy_bandwidth=num_gpus * 450e9 * 0.6,
        kv_bytes_per_token=kv,
        kv_cache_tokens=kv_cache_tokens,
        max_num_batched_tokens=2048,
        max_num_seqs=256,
    )


def builtin_profiles() -> dict[str, Profile]:
    """The profiles that have names."""
    found = [
        _cpu_demo("cpu-demo", 13.2e-3, 0.79e-3, 0.184e-3, 60e9),
        _cpu_demo("cpu-demo-1core", 21.9e-3, 1.57e-3, 0.297e-3, 36e9),
        _roofline(
            "h100-8b",
            num_gpus=1,
            parameters=8e9,
            num_layers=32,
            width=4096,
            kv_cache_tokens=380_000,
        ),
        _roofline(
            "h100x4-70b",
            num_gpus=4,
            parameters=70e9,
            num_layers=80,
            width=8192,
            kv_cache_tokens=370_000,
        ),
    ]
    return {profile.name: profile for profile in found}


def load_profile(path: Path) -> Profile:
    """A profile from a JSON file. Raises `UsageError` if it is none."""
    try:
        profile = msgspec.json.decode(path.read_bytes(), type=Profile)
    except (OSError, msgspec.DecodeError) as error:
        raise UsageError(f"can't read the cost model {path}: {error}") from None
    problems = _problems(profile)
    if problems:
        raise UsageError(f"the cost model {path} can't be: {'; '.join(problems)}")
    return profile


def _problems(profile: Profile) -> Sequence[str]:
    found = []
    if not profile.steps or profile.step_seconds(0, 0, 1, 1) <= 0:
        found.append("a decode step must take some time")
    if profile.copy_bandwidth <= 0:
        found.append("copy_bandwidth must be positive")
    if min(profile.request_seconds, profile.message_seconds, profile.token_seconds) < 0:
        found.append("request_seconds, message_seconds and token_seconds must not be negative")
    if profile.kv_cache_tokens <= 0 or profile.max_num_batched_tokens <= 0:
        found.append("kv_cache_tokens and max_num_batched_tokens must be positive")
    return found
