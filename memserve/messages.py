"""Every message between the launcher and a worker, and the values they carry.

The launcher is the centre of a star: a worker talks to it alone. Messages are tagged msgspec
structs, sent as MessagePack maps (`memserve.channel`). KV bytes never travel in a message; file
descriptors travel over a second socket, in the order of the messages that announce them.

A *ticket* names one dispatch of one choice of one request. Tickets only grow, so an event of an
earlier dispatch can't be mistaken for one of a later one, and a lower ticket is an older claim. When
a worker dies, what it worked on is dispatched again, under new tickets, with the answers so far.

A request that is prefilled on P and decoded on D:

    launcher ── Submit(decode_on=D) ──▶ P        launcher ── Expect ──▶ D
    P ── Published (per chunk) ──▶ launcher ──▶ D      D reserves room, pulls blocks from P's arena
    P ── Tokens (the first one) ──▶ launcher
    D ── Pulled ──▶ launcher ── Settle(accepted=True) ──▶ P     P lets its blocks go; D decodes
    D ── Declined ──▶ launcher ── Settle(accepted=False) ──▶ P  no room in time: P decodes
    P ── Withdrawn ──▶ launcher ── Abort ──▶ D                  P needed its blocks back

The launcher decides who owns a ticket: the first of Pulled and Withdrawn that reaches it wins.
"""

from array import array
from typing import TypeAlias

import msgspec

from memserve.config import EngineConfig
from memserve.model.kept import KeptWeights
from memserve.parallel.messages import (
    Gathered,
    Group,
    Joined,
    KeepBlocks,
    LeftGroup,
    LetGo,
    StartGroup,
)
from memserve.pool.events import IndexEvent
from memserve.pool.refs import ArenaDescriptor, BlockRef
from memserve.pool.remote import PoolReply, PoolRequest
from memserve.stats import EngineStats


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to choose the tokens of one choice; checked and completed by the front end."""

    max_tokens: int
    seed: int
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps every token."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    """Number of top log-probabilities to return beside the sampled token's; None: none at all."""
    grammar: str = ""
    """What the answer must match (`memserve.grammar`); empty: nothing."""


class Prefilled(msgspec.Struct, frozen=True, array_like=True):
    """How the prompt of a first token was prefilled."""

    seconds: float
    """From the moment at which it got its room, loading what lay elsewhere included."""
    num_host_tokens: int = 0
    """Of the cached tokens, those that came out of the worker's own DRAM."""
    num_p2p_tokens: int = 0
    """Copied from other instances."""
    num_disk_tokens: int = 0
    """Read from files."""


class TokenEvent(msgspec.Struct, frozen=True, array_like=True):
    """One token of one choice. `finish` is set on the last: `stop` or `length`."""

    ticket: int
    position: int
    """Index of this token in the answer; what the launcher has already is dropped."""
    token: int
    finish: str | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    """The most likely (token, log-probability) pairs, the likeliest first."""
    num_cached_tokens: int = 0
    """On the first token: prompt tokens whose prefill was skipped."""
    prefilled: Prefilled | None = None
    """On the first token only."""


# Launcher to worker


class Configure(msgspec.Struct, frozen=True, tag=True):
    """The first message to a worker: who it is and what it runs."""

    instance: int
    epoch: int
    engine: EngineConfig
    weights: KeptWeights | None = None
    """What a keeper has loaded; in host memory its descriptor follows on the descriptor socket."""
    keep_for: int = 0
    """Not 0: it is no worker, but loads the weights for so many, as their keeper."""


class MapPeer(msgspec.Struct, frozen=True, tag=True):
    """Map a peer's arena; its descriptor follows on the descriptor socket."""

    arena: ArenaDescriptor


class Submit(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Prefill a prompt; then decode it here, or hand it over to instance `decode_on`."""

    ticket: int
    choice: int
    prompt: bytes
    """Native int32 tokens."""
    sampling: SamplingParams
    decode_on: int | None = None
    cache_salt: str = ""
    reuse: bool = True
    """Whether the instance's cache is looked up and fed (the paper's PD-Caching, Table 4)."""
    order: float = 0.0
    """Waiting prompts start in this order, then by ticket: fairness and priority in one number."""
    chunk_tokens: int | None = None
    """Most prompt tokens of a step that computes it beside sequences that decode; None: no bound."""
    first_fetched_block: int = 0
    fetch: list[BlockRef] = []
    """Blocks of the prompt, from number `first_fetched_block` on, to copy from where they are
    unless the instance has them; what can't be had is computed."""
    outputs: list[int] = []
    """The answer so far, of one whose worker has died: the next token takes the place after it."""
    group: Group | None = None
    """Set if several instances prefill it together; then `decode_on` is none of them."""


class Expect(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """A prompt that another instance prefills will be handed over to this one."""

    ticket: int
    choice: int
    prompt: bytes
    """As in `Submit`."""
    sampling: SamplingParams
    cache_salt: str = ""
    reuse: bool = True
    outputs: list[int] = []
    """As in `Submit`."""


def known_tokens(message: Submit | Expect) -> "array[int]":
    """The prompt and the answer so far."""
    tokens = array("i", message.prompt)
    tokens.extend(message.outputs)
    return tokens


def num_known_tokens(message: Submit | Expect) -> int:
    """How many those are."""
    return len(message.prompt) // array("i").itemsize + len(message.outputs)


class Settle(msgspec.Struct, frozen=True, tag=True):
    """To the prefill instance: the decode instance has taken the request over, or never will."""

    ticket: int
    accepted: bool


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Forget a ticket, wherever it is; unknown tickets are ignored."""

    ticket: int


class Inspect(msgspec.Struct, frozen=True, tag=True):
    """Ask for an `Inspection`."""

    query: int


class ResetPrefixCache(msgspec.Struct, frozen=True, tag=True):
    """Drop every historical block that no request is using."""


class ReportIndex(msgspec.Struct, frozen=True, tag=True):
    """Tell all of the index anew: an `IndexEvents` that starts with `Cleared`."""


class Calibrate(msgspec.Struct, frozen=True, tag=True):
    """Run a few timed steps on an idle engine; answered with `Calibrated`."""

    query: int


class PoolCall(msgspec.Struct, frozen=True, tag=True):
    """A call of the worker's pool; answered with a `PoolAnswer` of the same number."""

    number: int
    request: PoolRequest


class ReleasePeer(msgspec.Struct, frozen=True, tag=True):
    """Forget the arenas of an instance that has left."""

    instance: int


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """Leave."""


# Worker to launcher


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The worker serves. The descriptors of its arenas follow on the descriptor socket, in order."""

    arenas: list[ArenaDescriptor]
    """HBM first, then DRAM if it has that tier."""
    dtype: str
    attention: str
    """Name of the attention backend, for the log."""
    shards: list[ArenaDescriptor] = []
    """The arenas of the instance's further processes; their descriptors come after the others."""
    rank_pids: list[int] = []
    """Process ids of those."""


class StartFailed(msgspec.Struct, frozen=True, tag=True):
    """The worker can't serve; `reason` is one line for the operator."""

    reason: str


class Kept(msgspec.Struct, frozen=True, tag=True):
    """A keeper has the weights ready; in host memory their descriptor has been sent before."""

    weights: KeptWeights


class CannotShare(msgspec.Struct, frozen=True, tag=True):
    """This model's weights can't be shared, though it can be served: workers must load their own."""

    reason: str


class Tokens(msgspec.Struct, frozen=True, tag=True):
    """The tokens of one step, of all its sequences."""

    events: list[TokenEvent]


class Published(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Prompt blocks that are complete, for the decode instance to pull.

    `refs` are the blocks from number `first_block` of the sequence on. `first_token` comes with the
    last of them. With a `step` (not 0) they are not complete yet: that step of the sender is about to
    write what they lack, and a reader may follow it layer by layer (`memserve.pool.progress`).
    """

    ticket: int
    first_block: int
    refs: list[BlockRef]
    first_token: int | None = None
    step: int = 0


class Pulled(msgspec.Struct, frozen=True, tag=True):
    """The decode instance holds the whole prompt and wants to decode it."""

    ticket: int


class Declined(msgspec.Struct, frozen=True, tag=True):
    """The decode instance won't take the request over."""

    ticket: int
    reason: str


class Withdrawn(msgspec.Struct, frozen=True, tag=True):
    """The prefill instance needed its published blocks back and will decode by itself."""

    ticket: int


class PoolAnswer(msgspec.Struct, frozen=True, tag=True):
    """The answer to a `PoolCall`."""

    number: int
    reply: PoolReply


class Rejected(msgspec.Struct, frozen=True, tag=True):
    """The worker can't run a ticket; the sentence is for the client, status 400 or 500."""

    ticket: int
    message: str
    status: int


class StepSample(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """What one step computed, and how long it took."""

    num_prefill_tokens: int
    num_prefill_pairs: int
    """Sum over those tokens of the tokens that each attends to, itself included."""
    num_decodes: int
    num_decode_pairs: int
    """Sum over the decoding sequences of the tokens that each attends to."""
    seconds: float
    num_ranks: int = 1
    """Instances that computed this step together, each its own share; `seconds` has the waits."""
    num_prefill_context: int = 0
    """Sum over the chunks of prompts of the tokens that each attends to and the step only reads."""
    after_idling: bool = False
    """Whether the instance had nothing to compute right before."""


class CopySample(msgspec.Struct, frozen=True, array_like=True):
    """How long a copy out of another instance's arena took."""

    num_bytes: int
    seconds: float


class Heartbeat(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Sent by the engine loop itself, about once a second while it runs."""

    stats: EngineStats
    steps: list[StepSample] = []
    """Steps since the last heartbeat, a sample of them if there were many."""
    copies: list[CopySample] = []


class Calibrated(msgspec.Struct, frozen=True, tag=True):
    """The answer to `Calibrate`."""

    query: int
    steps: list[StepSample]
    copies: list[CopySample]


class IndexEvents(msgspec.Struct, frozen=True, tag=True):
    """What has changed in the worker's index; numbers are consecutive from 1 on.

    They come before the tokens of the step that caused them. One that starts with `Cleared` may
    have any number, from which the next ones count on.
    """

    number: int
    events: list[IndexEvent]


class Inspection(msgspec.Struct, frozen=True, tag=True):
    """Answer to `Inspect`: the worker's books, recounted from scratch. No problems: all is well."""

    query: int
    stats: EngineStats
    problems: list[str]


ToWorker: TypeAlias = (
    Configure
    | MapPeer
    | Submit
    | Expect
    | Settle
    | Abort
    | Published
    | Inspect
    | ResetPrefixCache
    | ReportIndex
    | Calibrate
    | PoolCall
    | StartGroup
    | KeepBlocks
    | ReleasePeer
    | Shutdown
)
KeeperToLauncher: TypeAlias = Kept | CannotShare | StartFailed
ToLauncher: TypeAlias = (
    Ready
    | StartFailed
    | Tokens
    | Published
    | Pulled
    | Declined
    | Withdrawn
    | Rejected
    | PoolAnswer
    | Joined
    | LeftGroup
    | Gathered
    | LetGo
    | Heartbeat
    | Calibrated
    | IndexEvents
    | Inspection
)
