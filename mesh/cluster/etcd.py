"""etcd client: a deadline on every call, watches that detect a dead server, leases with their own clock.

    Etcd ── get, list, put, delete, transact     each with a deadline; errors are ShoalErrors
      ├──── watch(prefix, revision)              one stream each; ends with an error, never in silence
      └──── grant(ttl) ── Lease                  refresh, revoke; `is_held` by the holder's own clock

Only the generated stubs of `aetcd` are used. Its client has four defects: its shared watch stream leaves later watches
hanging when the server ends it without an error; it ignores cancelled watches; it takes one address only; it has no
deadline by default. One stream per watch needs none of that.

The connection is plaintext and has no password: keep etcd on a unix socket or a private network.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import grpc
from aetcd import rpc

from shoal.errors import Internal, InvalidArgument, NotFound, OutOfRange, ShoalError, Unavailable

TIMEOUT_S = 2.0
"""Timeout of one call. etcd responds in milliseconds; a leader election of its own takes about a second."""
IDLE_S = 2.0
"""A watch that received nothing for this long probes its member."""

# Without `hasleader` a member that lost its quorum keeps watches open and silent.
_METADATA = (("hasleader", "true"),)
_OPTIONS: tuple[tuple[str, int], ...] = (
    # etcd drops clients that ping more often than every 5 s.
    ("grpc.keepalive_time_ms", 6_000),
    ("grpc.keepalive_timeout_ms", 2_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    # Also the deadline of one connection attempt. A frozen server would use up the default of 20 s.
    ("grpc.min_reconnect_backoff_ms", 1_000),
    # Otherwise all channels to one address share a connection and its backoff, even across clients.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.enable_http_proxy", 0),
)
_UNREACHABLE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)
_ADDRESS = re.compile(r"^(([^/:\s\[\]]+|\[[0-9a-fA-F:]+\]):\d{1,5}|unix:/\S+)$")

T = TypeVar("T")


class Compacted(OutOfRange):
    """The revisions that a watch asked for are compacted: list again."""


class LeaseLost(NotFound):
    """The lease has expired or was revoked; etcd has deleted the keys attached to it."""


@dataclass(frozen=True)
class Entry:
    """A key, its value, its revisions and its lease, as etcd stores them."""

    key: bytes
    value: bytes
    create_revision: int
    mod_revision: int
    lease: int


@dataclass(frozen=True)
class Listing:
    """All keys of a prefix at one revision, sorted by key."""

    entries: tuple[Entry, ...]
    revision: int


@dataclass(frozen=True)
class Event:
    """A change of one key: a put (`entry` is the new entry) or a deletion (`entry` is None)."""

    key: bytes
    entry: Entry | None


@dataclass(frozen=True)
class Events:
    """Changes up to `revision`, that of the last change. Without events, `revision` is the store's current one."""

    events: tuple[Event, ...]
    revision: int


@dataclass(frozen=True)
class Put:
    """Transaction operation that sets a key."""

    key: bytes
    value: bytes
    lease: int = 0


@dataclass(frozen=True)
class Delete:
    """Transaction operation that deletes a key; a missing key is no error."""

    key: bytes


@dataclass(frozen=True)
class Created:
    """Transaction condition: the key was created at `revision`. Revision 0: the key does not exist."""

    key: bytes
    revision: int


@dataclass(frozen=True)
class Modified:
    """Transaction condition: the key was last written at `revision`."""

    key: bytes
    revision: int


@dataclass(frozen=True)
class Outcome:
    """Outcome of one transaction: `succeeded` when all conditions held, and the revision after it."""

    succeeded: bool
    revision: int


def addresses_of(text: str) -> tuple[str, ...]:
    """Split `host:port[,host:port...]`; an address may be `unix:/path`, too.

    Raises:
        InvalidArgument: an address is of neither form, or the text contains none.
    """
    found = tuple(part.strip().removeprefix("http://") for part in text.split(",") if part.strip())
    wrong = [part for part in found if not _ADDRESS.match(part)]
    if wrong or not found:
        raise InvalidArgument(f"etcd address {text!r}: expected host:port[,host:port...], got {wrong or 'nothing'}")
    return found


class _Member:
    """One address of the cluster, with its channel and stubs."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
        self.kv: Any = rpc.KVStub(self.channel)
        self.lease: Any = rpc.LeaseStub(self.channel)
        self.watch: Any = rpc.WatchStub(self.channel)
        self.maintenance: Any = rpc.MaintenanceStub(self.channel)


class Etcd:
    """Session with an etcd cluster; uses one address at a time and fails over to the next.

    Use as `async with`. Entering does not wait for etcd. Every method raises Unavailable when etcd is unreachable or
    does not respond in time; a write may then have happened or not. Other errors of etcd raise Internal.
    """

    def __init__(self, addresses: str, *, timeout_s: float = TIMEOUT_S, idle_s: float = IDLE_S) -> None:
        self._addresses = addresses_of(addresses)
        self._timeout_s = timeout_s
        self._idle_s = idle_s
        self.round_trip_s = 0.0
        """Time of the last call that succeeded. 0: there was none."""

    async def __aenter__(self) -> Etcd:
        self._members = [_Member(address) for address in self._addresses]
        self._current = 0
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        for member in self._members:
            await member.channel.close()

    async def get(self, key: bytes) -> Entry | None:
        """Return the key's entry from a linearizable read, or None."""
        response = await self._unary(lambda m: m.kv.Range, rpc.RangeRequest(key=key), f"get {_shown(key)}")
        return _entry(response.kvs[0]) if response.kvs else None

    async def list(self, prefix: bytes) -> Listing:
        """Return all keys that begin with `prefix`."""
        request = rpc.RangeRequest(key=prefix, range_end=range_end(prefix))
        response = await self._unary(lambda m: m.kv.Range, request, f"list {_shown(prefix)}")
        return Listing(tuple(_entry(kv) for kv in response.kvs), response.header.revision)

    async def put(self, key: bytes, value: bytes, lease: int = 0) -> int:
        """Set the key and return the revision of the write.

        Raises:
            LeaseLost: the lease no longer exists.
        """
        request = rpc.PutRequest(key=key, value=value, lease=lease)
        response = await self._unary(lambda m: m.kv.Put, request, f"put {_shown(key)}")
        revision: int = response.header.revision
        return revision

    async def delete(self, key: bytes) -> bool:
        """Delete the key. Return True when the key existed."""
        response = await self._unary(
            lambda m: m.kv.DeleteRange, rpc.DeleteRangeRequest(key=key), f"delete {_shown(key)}"
        )
        return bool(response.deleted)

    async def transact(self, when: Sequence[Created | Modified], then: Sequence[Put | Delete]) -> Outcome:
        """Apply all of `then` atomically if every condition in `when` holds, else nothing.

        Raises:
            LeaseLost: a Put names a lease that no longer exists.
        """
        request = rpc.TxnRequest(compare=[_compare(c) for c in when], success=[_operation(op) for op in then])
        response = await self._unary(lambda m: m.kv.Txn, request, "transaction")
        return Outcome(response.succeeded, response.header.revision)

    async def compact(self, revision: int) -> None:
        """Discard the history before `revision`."""
        await self._unary(lambda m: m.kv.Compact, rpc.CompactionRequest(revision=revision), "compact")

    async def alarms(self) -> tuple[str, ...]:
        """Return the names of the alarms that are raised: NOSPACE (every write is refused), CORRUPT."""
        response = await self._unary(lambda m: m.maintenance.Alarm, rpc.AlarmRequest(), "list the alarms")
        return tuple(sorted({rpc.AlarmType.Name(one.alarm) for one in response.alarms}))

    async def grant(self, ttl_s: int, clock: Callable[[], float] = time.monotonic) -> Lease:
        """Return a new lease. etcd may grant a longer time to live than `ttl_s` (its minimum is 2 s)."""
        asked = clock()
        response = await self._unary(lambda m: m.lease.LeaseGrant, rpc.LeaseGrantRequest(TTL=ttl_s), "grant a lease")
        return Lease(self, response.ID, response.TTL, asked + response.TTL, clock)

    async def refresh(self, lease: int) -> int:
        """Refresh a lease once. Return its time to live in seconds; 0 when the lease no longer exists."""
        doing = f"refresh lease {lease:x}"
        member = self._members[self._current]
        async with self._guarded(member, doing):
            call = member.lease.LeaseKeepAlive(
                _one(rpc.LeaseKeepAliveRequest(ID=lease)), timeout=self._timeout_s, metadata=_METADATA
            )
            try:
                async for response in call:
                    ttl: int = response.TTL
                    return ttl
            finally:
                call.cancel()
        raise Unavailable(f"etcd {member.address}: {doing}: the stream ended without a response")

    async def revoke(self, lease: int) -> None:
        """End a lease and delete the keys attached to it; a lease that no longer exists is no error."""
        with contextlib.suppress(LeaseLost):
            await self._unary(lambda m: m.lease.LeaseRevoke, rpc.LeaseRevokeRequest(ID=lease), f"revoke {lease:x}")

    async def watch(self, prefix: bytes, revision: int) -> AsyncGenerator[Events, None]:
        """Yield every change of keys under `prefix` from `revision` on, in order, until an error.

        The first item arrives when etcd has accepted the watch. While nothing changes, items without events confirm
        that etcd still responds. The iterator never ends without an error. Close it (`aclosing`) to leave early.

        Raises:
            Compacted: `revision` is compacted.
            Unavailable: the stream broke, or its member stopped responding. Watch again from the last revision + 1.
        """
        doing = f"watch {_shown(prefix)}"
        member = self._members[self._current]
        create = rpc.WatchCreateRequest(
            key=prefix, range_end=range_end(prefix), start_revision=revision, fragment=False
        )
        async with self._guarded(member, doing):
            call = member.watch.Watch(metadata=_METADATA)
            try:
                await self._within(call.write(rpc.WatchRequest(create_request=create)), member, doing)
                response = await self._within(call.read(), member, doing)
                while True:
                    if response is grpc.aio.EOF:
                        raise Unavailable(f"etcd {member.address}: {doing}: the server ended the stream")
                    if response.compact_revision:
                        raise Compacted(f"etcd {member.address}: {doing}: compacted below {response.compact_revision}")
                    if response.canceled:
                        raise Unavailable(f"etcd {member.address}: {doing}: cancelled: {response.cancel_reason}")
                    yield _events(response)
                    async for quiet in self._until_read(read := asyncio.ensure_future(call.read()), member):
                        yield quiet
                    response = read.result()
            finally:
                call.cancel()

    async def _until_read(self, read: asyncio.Future[Any], member: _Member) -> AsyncIterator[Events]:
        """Wait for `read`; while it is pending, probe the member and yield its revision."""
        try:
            while not (await asyncio.wait([read], timeout=self._idle_s))[0]:
                # A linearizable read on the same connection fails when the member is frozen or has no quorum.
                request = rpc.RangeRequest(key=b"\0", count_only=True)
                response = await member.kv.Range(request, timeout=self._timeout_s, metadata=_METADATA)
                if not read.done():
                    yield Events((), response.header.revision)
        except BaseException:
            read.cancel()
            raise

    async def _within(self, waiting: Coroutine[Any, Any, T], member: _Member, doing: str) -> T:
        try:
            return await asyncio.wait_for(waiting, self._timeout_s)
        except TimeoutError as err:
            raise Unavailable(f"etcd {member.address}: {doing}: no response within {self._timeout_s} s") from err

    async def _unary(self, method: Callable[[_Member], Any], request: Any, doing: str) -> Any:
        member = self._members[self._current]
        async with self._guarded(member, doing):
            begun = time.monotonic()
            response = await method(member)(request, timeout=self._timeout_s, metadata=_METADATA)
            self.round_trip_s = time.monotonic() - begun
            return response

    @contextlib.asynccontextmanager
    async def _guarded(self, member: _Member, doing: str) -> AsyncIterator[None]:
        """Translate errors of the block into ShoalErrors, and fail over when `member` is unreachable."""
        try:
            yield
        except grpc.aio.AioRpcError as err:
            if err.code() in _UNREACHABLE:
                self._fail_over(member)
            raise _translated(err, f"etcd {member.address}: {doing}") from err
        except Unavailable:
            self._fail_over(member)
            raise
        except asyncio.CancelledError as err:
            # grpc.aio also raises CancelledError when its channel was closed during the call.
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise Unavailable(f"etcd {member.address}: {doing}: the connection was closed") from err

    def _fail_over(self, member: _Member) -> None:
        if self._members[self._current] is member:
            self._current = (self._current + 1) % len(self._members)


class Lease:
    """Lease of etcd, with the holder's own, pessimistic view of its deadline.

    etcd counts from its response, the holder from before its request. So etcd may keep the lease for a moment after
    `is_held` turns False, but never drops it before (as long as both clocks run at one speed).
    """

    def __init__(self, etcd: Etcd, id: int, ttl_s: int, deadline: float, clock: Callable[[], float]) -> None:
        self._etcd = etcd
        self._clock = clock
        self._deadline = deadline
        self.id = id
        self.ttl_s = ttl_s

    def is_held(self) -> bool:
        """Return True while the lease is certainly valid. Check before each use: a process may have been frozen."""
        return self._clock() < self._deadline

    async def refresh(self, *, revive: bool = True) -> None:
        """Restart the lease's time to live.

        With `revive`, also when the lease had expired by the holder's clock and etcd still has it, as after a short
        outage. A holder that acted on `is_held` being False must pass False.

        Raises:
            LeaseLost: the lease no longer exists.
            Unavailable: etcd was not reached; the lease keeps its deadline.
        """
        asked = self._clock()
        ttl = await self._etcd.refresh(self.id)
        if ttl <= 0:  # etcd does not call this an error.
            self._deadline = asked
            raise LeaseLost(f"lease {self.id:x} has expired")
        if not revive and not self.is_held():
            raise LeaseLost(f"lease {self.id:x} had run out before it was refreshed")
        self._deadline = asked + ttl

    async def revoke(self) -> None:
        """End the lease at once, and delete the keys attached to it."""
        self._deadline = self._clock()
        await self._etcd.revoke(self.id)


def range_end(prefix: bytes) -> bytes:
    """Return the first key after all keys that begin with `prefix` (etcd's convention for prefix ranges)."""
    trimmed = prefix.rstrip(b"\xff")
    return trimmed[:-1] + bytes([trimmed[-1] + 1]) if trimmed else b"\0"


async def _one(request: Any) -> AsyncIterator[Any]:
    yield request


def _shown(key: bytes) -> str:
    return key.decode("utf-8", "backslashreplace")


def _translated(err: grpc.aio.AioRpcError, doing: str) -> ShoalError:
    text = f"{doing}: {err.details() or err.code().name}"
    if err.code() is grpc.StatusCode.NOT_FOUND and "lease" in (err.details() or ""):
        return LeaseLost(text)
    if err.code() is grpc.StatusCode.OUT_OF_RANGE and "compacted" in (err.details() or ""):
        return Compacted(text)
    return Unavailable(text) if err.code() in _UNREACHABLE else Internal(text)


def _entry(kv: Any) -> Entry:
    return Entry(kv.key, kv.value, kv.create_revision, kv.mod_revision, kv.lease)


def _event(event: Any) -> Event:
    return Event(event.kv.key, None if event.type == rpc.Event.EventType.DELETE else _entry(event.kv))


def _events(response: Any) -> Events:
    # While a watch catches up, its header is ahead of the events delivered so far: resume from the events' revision.
    revision = response.events[-1].kv.mod_revision if response.events else response.header.revision
    return Events(tuple(_event(event) for event in response.events), revision)


def _compare(condition: Created | Modified) -> Any:
    if isinstance(condition, Created):
        return rpc.Compare(
            key=condition.key,
            result=rpc.Compare.EQUAL,
            target=rpc.Compare.CREATE,
            create_revision=condition.revision,
        )
    return rpc.Compare(
        key=condition.key, result=rpc.Compare.EQUAL, target=rpc.Compare.MOD, mod_revision=condition.revision
    )


def _operation(op: Put | Delete) -> Any:
    if isinstance(op, Put):
        return rpc.RequestOp(request_put=rpc.PutRequest(key=op.key, value=op.value, lease=op.lease))
    return rpc.RequestOp(request_delete_range=rpc.DeleteRangeRequest(key=op.key))
