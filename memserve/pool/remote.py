"""MemPool's calls that name another instance (the paper's Table 1), as coroutines.

`RemotePool` sends each call over a `Control`: the launcher's channels to its workers in production,
a socket pair in tests. `memserve.pool.service` answers at the other end. KV bytes never travel this
way: `transfer` asks the receiving instance to pull them out of the source's mapped arena.

Memory that an instance allocates for somebody else stands under a lease: unless it is renewed in
time, the instance frees it, and references to it name nothing any more. `renewing` renews
everything that this `RemotePool` holds. Addresses are `BlockRef`s, which encode their instance.

Every call may be cancelled at any time. One that was to lease or to copy then tells the instance,
which forgets what has not begun, lets go of a copy under way as soon as it has ended, and takes
back what it has leased in answer: nothing waits for a lease to run out. No torch here.
"""

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Protocol, TypeAlias, final

import msgspec

from memserve.errors import ChannelClosed, OutOfBlocks, PoolError, StaleReference
from memserve.pool.refs import BlockRef, Kind

DEFAULT_LEASE_S = 30.0
MAX_PRIVATE_BYTES = 4096
RENEWALS_PER_LEASE = 3
CALL_BITS = 63


class Allocate(msgspec.Struct, frozen=True, tag=True):
    """`alloc_mem`: blocks for the caller, under a lease."""

    num_blocks: int
    kind: Kind
    lease_s: float
    call: int
    """Names this call to `Cancel`; no other call of any caller has the same (it is random)."""


class Free(msgspec.Struct, frozen=True, tag=True):
    """`free_mem`: end the leases of these blocks; what has expired is ignored."""

    refs: list[BlockRef]


class Renew(msgspec.Struct, frozen=True, tag=True):
    """Heartbeat: these leases run for `lease_s` from now."""

    refs: list[BlockRef]
    lease_s: float


class Pull(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """`transfer`, and with `tokens` `transfer_with_insert`: copy these blocks to yourself."""

    source: list[BlockRef]
    destination: list[BlockRef] | None
    """Leased blocks of the receiver; None: it allocates on demand."""
    kind: Kind
    lease_s: float
    call: int
    """As in `Allocate`."""
    tokens: list[int] | None = None
    salt: str = ""
    private: Annotated[bytes, msgspec.Meta(max_length=MAX_PRIVATE_BYTES)] = b""
    """The caller's own data for whoever uses the blocks there, for example a ticket."""


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """The caller of this `Allocate` or `Pull` has gone away: hold nothing for it any more.

    A pull that has not ended is refused; what it was to insert is not. Unknown calls are ignored.
    """

    call: int


class Export(msgspec.Struct, frozen=True, tag=True):
    """Name up to `num_blocks` historical blocks, those used last first."""

    num_blocks: int


class Blocks(msgspec.Struct, frozen=True, tag=True):
    """The call has succeeded: the blocks allocated, or those that hold what was transferred."""

    refs: list[BlockRef]


class Prefix(msgspec.Struct, frozen=True, array_like=True):
    """A cached prefix: `refs[i]` holds K and V of the i-th whole block of `tokens`."""

    salt: str
    tokens: list[int]
    refs: list[BlockRef]


class History(msgspec.Struct, frozen=True, tag=True):
    """Answer to `Export`; each prefix comes after those that it continues."""

    prefixes: list[Prefix]


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The call has failed and changed nothing."""

    reason: str
    error: str
    """`OutOfBlocks`, `StaleReference` or `PoolError`."""


PoolRequest: TypeAlias = Allocate | Free | Renew | Pull | Cancel | Export
PoolReply: TypeAlias = Blocks | History | Refused

_ERRORS = {kind.__name__: kind for kind in (OutOfBlocks, StaleReference, PoolError)}


class Control(Protocol):
    """Carries calls to an instance, in their order, and the answers back."""

    async def call(self, instance: int, request: PoolRequest) -> PoolReply:
        """The instance's answer. Raises `ChannelClosed` if it has gone."""
        ...

    def tell(self, instance: int, request: PoolRequest) -> None:
        """Send a request whose answer nobody waits for; lost if the instance has gone."""
        ...


@final
class RemotePool:
    """The pool of all instances as one of their users sees it (the paper's Table 1, §4).

    Every call raises OutOfBlocks, StaleReference or PoolError if the instance refuses it, which
    then has changed nothing, and ChannelClosed if it has gone. Sizes are in blocks, leases in
    seconds.
    """

    def __init__(self, control: Control, *, lease_s: float = DEFAULT_LEASE_S) -> None:
        self._control = control
        self._lease_s = lease_s
        self._held: dict[int, set[BlockRef]] = {}

    async def alloc_mem(self, num_blocks: int, kind: Kind, instance: int) -> list[BlockRef]:
        """`num_blocks` blocks of that kind on `instance`, under a lease.

        Table 1's `alloc_mem(size, type, id)`; see `MemPool.alloc_mem` for the kinds.
        """
        request = Allocate(num_blocks, kind, self._lease_s, _new_call())
        return self._hold(instance, await self._call_or_cancel(instance, request))

    async def free_mem(self, refs: Sequence[BlockRef]) -> None:
        """Give leased blocks back, wherever they are; those whose lease has ended are ignored.

        Table 1's `free_mem(addrList)`.
        """
        for instance, own in _by_instance(refs).items():
            self._held.get(instance, set()).difference_update(own)
            await self._call(instance, Free(own))

    async def transfer(
        self,
        instance: int,
        source: Sequence[BlockRef],
        destination: Sequence[BlockRef] | None = None,
        *,
        kind: Kind = Kind.HBM,
        private: bytes = b"",
    ) -> list[BlockRef]:
        """Copy `source` to `instance`: into leased blocks of it, or into new ones of `kind`.

        Table 1's `transfer(id, srcAddrList, dstAddrList, flags, private)`; `destination[i]`, all of
        one tier, gets what `source[i]` holds, and stays the caller's if the call fails. All or
        nothing: StaleReference if any source had lost its content before it was read. Returns the
        blocks that hold the copies, under a lease. `private`, up to 4096 bytes that mean something
        to the caller and the receiver only, is delivered there with the copies (`PoolService`),
        before this returns; never if the call is refused.
        """
        pull = self._pull(source, destination, kind, private)
        return self._hold(instance, await self._call_or_cancel(instance, pull))

    async def transfer_with_insert(
        self,
        instance: int,
        tokens: Sequence[int],
        source: Sequence[BlockRef],
        destination: Sequence[BlockRef] | None = None,
        *,
        kind: Kind = Kind.HBM,
        salt: str = "",
        private: bytes = b"",
    ) -> list[BlockRef]:
        """Copy `source`, K and V of the whole blocks of `tokens`, and let `instance` cache them.

        Table 1's `transfer_with_insert(id, tokenList, srcAddrList, dstAddrList, flags, private)`.
        Only what it lacks is copied. If a source has lost its content, the prefix before it is
        kept. Returns the blocks that are cached for `tokens` there; they are not held. Those of
        `destination` are given up, unless the call fails. `private` as for `transfer`.
        """
        pull = self._pull(source, destination, kind, private)
        pull = msgspec.structs.replace(pull, tokens=list(tokens), salt=salt)
        cached = _refs_of(await self._call_or_cancel(instance, pull))
        self._held.get(instance, set()).difference_update(destination or ())
        return cached

    async def settled(self, instance: int) -> None:
        """Return when `instance` has handled everything that was sent to it before."""
        await self._call(instance, Free([]))

    async def export(self, instance: int, num_blocks: int) -> list[Prefix]:
        """Up to `num_blocks` historical blocks of `instance` by prefix, the hottest first."""
        reply = await self._call(instance, Export(num_blocks))
        assert isinstance(reply, History)
        return reply.prefixes

    @asynccontextmanager
    async def renewing(self) -> AsyncIterator[None]:
        """Renew the leases of all held blocks while inside."""
        task = asyncio.create_task(self._renew_for_ever())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _renew_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self._lease_s / RENEWALS_PER_LEASE)
            for instance, refs in list(self._held.items()):
                if not refs:
                    continue
                try:
                    await self._call(instance, Renew(list(refs), self._lease_s))
                except (ChannelClosed, StaleReference):  # its memory went with it
                    del self._held[instance]

    def _pull(
        self,
        source: Sequence[BlockRef],
        destination: Sequence[BlockRef] | None,
        kind: Kind,
        private: bytes,
    ) -> Pull:
        if len(private) > MAX_PRIVATE_BYTES:
            raise PoolError(f"private data of {len(private)} bytes: {MAX_PRIVATE_BYTES} at most")
        return Pull(
            source=list(source),
            destination=None if destination is None else list(destination),
            kind=kind,
            lease_s=self._lease_s,
            call=_new_call(),
            private=private,
        )

    def _hold(self, instance: int, reply: PoolReply) -> list[BlockRef]:
        refs = _refs_of(reply)
        self._held.setdefault(instance, set()).update(refs)
        return refs

    async def _call_or_cancel(self, instance: int, request: Allocate | Pull) -> PoolReply:
        try:
            return await self._call(instance, request)
        except asyncio.CancelledError:
            self._control.tell(instance, Cancel(request.call))
            raise

    async def _call(self, instance: int, request: PoolRequest) -> PoolReply:
        reply = await self._control.call(instance, request)
        if isinstance(reply, Refused):
            raise _ERRORS[reply.error](f"instance {instance}: {reply.reason}")
        return reply


def _new_call() -> int:
    return secrets.randbits(CALL_BITS)


def _refs_of(reply: PoolReply) -> list[BlockRef]:
    assert isinstance(reply, Blocks)
    return reply.refs


def _by_instance(refs: Sequence[BlockRef]) -> dict[int, list[BlockRef]]:
    found: dict[int, list[BlockRef]] = {}
    for ref in refs:
        found.setdefault(ref.instance, []).append(ref)
    return found
