"""MongoDB as every service uses it: durable writes, bounded waits, collections made at start, errors translated once.

A write that returns is on the disk of a majority, and a read sees only what a majority has: nothing that was seen or
acknowledged can be rolled back.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import Any, TypeAlias, TypeVar
from urllib.parse import parse_qsl, urlsplit

import pymongo
import pymongo.lock
from bson.errors import BSONError
from pymongo import AsyncMongoClient, IndexModel
from pymongo.asynchronous.change_stream import AsyncChangeStream
from pymongo.asynchronous.collection import AsyncCollection
from pymongo.asynchronous.database import AsyncDatabase
from pymongo.errors import (
    BulkWriteError,
    ConfigurationError,
    ConnectionFailure,
    ExecutionTimeout,
    OperationFailure,
    PyMongoError,
    WriteConcernError,
)
from pymongo.monitoring import ConnectionClosedReason

from shoal.errors import (
    AlreadyExists,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    PermissionDenied,
    ResourceExhausted,
    ShoalError,
    Unavailable,
)

Document: TypeAlias = dict[str, Any]
T = TypeVar("T")


async def _waited_for(awaitable: Awaitable[T], timeout: float | None) -> T:
    async with asyncio.timeout(timeout):
        return await awaitable


if sys.version_info < (3, 12):
    # Until 3.12 asyncio.wait_for waits in a task of its own. Cancelled while that task takes the lock of a condition
    # again, it leaves the task to take it for nobody: pymongo's topology is then locked for ever, and with it every
    # operation of the client. It happens when calls are cancelled (deadlines, a stop) while MongoDB is away.
    setattr(pymongo.lock, "wait_for", _waited_for)  # noqa: B010

TIMEOUT_MS = 6_000
"""Longest wait for one operation, retries included. An election in a healthy set is done within 3 s with the timeouts
that we start it with, so one operation outlives it; a set that is gone is reported before most callers give up.
`with pymongo.timeout(seconds)` gives a big one longer."""

_FAREWELL_S = 1.0

_DURABLE: Mapping[str, Any] = {
    "w": "majority",
    "journal": True,
    "readConcernLevel": "majority",
    "retryWrites": True,
    "retryReads": True,
    "tz_aware": True,
}
_DEFAULTS: Mapping[str, Any] = {
    "appname": "shoal",
    "timeoutMS": TIMEOUT_MS,
    "connectTimeoutMS": 2_000,
    # Half of pymongo's own: a primary that comes back is seen soon, and a monitor costs one call in this time.
    "heartbeatFrequencyMS": 5_000,
    # A burst of calls shares these; the rest wait in line, within their timeout.
    "maxPoolSize": 50,
}

# https://github.com/mongodb/mongo/blob/v6.0/src/mongo/base/error_codes.yml
_NAMESPACE_EXISTS = 48
_INDEX_NOT_FOUND = 27
_VALIDATION_FAILED = 121
_DUPLICATE_KEY = 11000
_CONFLICTING_OPERATION = 117
_INDEX_CONFLICTS = frozenset({85, 86})
_OUT_OF_DISK_SPACE = 14031
_NOT_ALLOWED = frozenset({13, 18, 8000})  # Unauthorized, AuthenticationFailed, Atlas' own.
_AWAY = frozenset({6, 7, 50, 64, 89, 91, 112, 134, 189, 202, 225, 226, 237, 251, 262, 317}) | frozenset(
    {9001, 10058, 10107, 11600, 11602, 13388, 13435, 13436}
)
"""HostUnreachable, timeouts, shutdown, no primary, write conflicts: the same operation may succeed a moment later."""


class _Checkout:
    """A connection in use, which is not kept when it was made before its server could do transactions.

    A URI with directConnection=true reaches a member in any state, and pymongo goes by what the member said when the
    connection was made: one from before an election would refuse transactions for as long as it lives.
    """

    __slots__ = ("_checkout", "_connection")

    def __init__(self, checkout: AbstractAsyncContextManager[Any, None]) -> None:
        self._checkout = checkout

    async def __aenter__(self) -> Any:
        self._connection = await self._checkout.__aenter__()
        return self._connection

    async def __aexit__(self, *exc: Any) -> None:
        if not self._connection.supports_sessions:
            await self._connection.close_conn(ConnectionClosedReason.STALE)
        await self._checkout.__aexit__(*exc)


class Client(AsyncMongoClient[Document]):
    """pymongo's client, but its end is bounded too: a good-bye to a MongoDB that is away would take 30 s."""

    def _checkout(self, server: Any, session: Any) -> Any:
        return _Checkout(super()._checkout(server, session))  # pymongo has no public way.

    async def close(self) -> None:
        with pymongo.timeout(_FAREWELL_S):
            await super().close()

    aclose = close


def connect(uri: str, *, max_connections: int | None = None) -> AsyncMongoClient[Document]:
    """A client for `uri`; connects lazily, so MongoDB may be away now. The caller closes it, best with `async with`.

    Writes: w=majority, journaled. Reads: majority. Times are aware, in UTC. Waits that `uri` sets itself are kept. An
    open change stream takes a connection for itself most of the time: many of them want `max_connections`.

    Raises:
        InvalidArgument: `uri` is not a MongoDB URI.
    """
    given = {key.lower() for key, _ in parse_qsl(urlsplit(uri).query, keep_blank_values=True)}
    options = {key: value for key, value in _DEFAULTS.items() if key.lower() not in given}
    if max_connections is not None:
        options["maxPoolSize"] = max_connections
    try:
        return Client(uri, **options, **_DURABLE)
    except (ConfigurationError, ValueError) as err:
        raise InvalidArgument(f"not a usable MongoDB URI: {err}; expected mongodb://host[:port][,host...]") from err


async def ensure_collection(
    db: AsyncDatabase[Document],
    name: str,
    *,
    validator: Mapping[str, Any],
    indexes: Sequence[IndexModel],
    retired: Sequence[str] = (),
) -> AsyncCollection[Document]:
    """Makes collection `name` with its validator and indexes, or brings the one that is there up to them.

    Idempotent, and safe when several processes do it at once. Indexes that are no longer listed stay, except those
    whose names are `retired`: they go once the others are there.

    Raises:
        FailedPrecondition: an index of that name or those keys is there with other options.
        Unavailable: MongoDB is away.
    """
    with translated(f"preparing collection {db.name}.{name}"):
        try:
            await db.create_collection(name, check_exists=False, validator=dict(validator))
        except OperationFailure as err:
            if err.code != _NAMESPACE_EXISTS:
                raise
            await _update_validator(db, name, validator)
        collection = db[name]
        if indexes:
            try:
                await collection.create_indexes(list(indexes))
            except OperationFailure as err:
                if err.code in _INDEX_CONFLICTS:
                    hint = "drop the old index, then start again"
                    raise FailedPrecondition(f"an index of {db.name}.{name} has changed: {err}: {hint}") from err
                raise
        # Dropping wants the collection alone, found or not, and a transaction of a killed process may hold it a while.
        there = await collection.index_information() if retired else {}
        for old in set(retired) & set(there):
            await _drop_index(collection, old)
        return collection


async def _drop_index(collection: AsyncCollection[Document], name: str) -> None:
    try:
        await collection.drop_index(name)
    except OperationFailure as err:
        if err.code != _INDEX_NOT_FOUND:
            raise


async def _update_validator(db: AsyncDatabase[Document], name: str, validator: Mapping[str, Any]) -> None:
    found = await (await db.list_collections(filter={"name": name})).to_list()
    if found and found[0].get("options", {}).get("validator") == validator:
        return  # collMod would lock the collection for nothing, at each start of each instance.
    for attempt in range(5):
        try:
            await db.command("collMod", name, validator=dict(validator), validationLevel="strict")
            return
        except OperationFailure as err:
            if err.code != _CONFLICTING_OPERATION or attempt == 4:
                raise
            await asyncio.sleep(0.05 * 2**attempt)


@contextmanager
def translated(doing: str) -> Iterator[None]:
    """Raises pymongo's errors inside the block as ShoalError, the cause kept. `doing` opens the message.

    pymongo now and then takes the cancellation of its caller for a broken connection. Then CancelledError is raised, as
    it should have been: otherwise a loop that tries again after an error could not be stopped.
    """
    try:
        yield
    except PyMongoError as err:
        _raise_if_cancelled(err)
        raise translate(err, doing) from err
    except (BSONError, OverflowError, UnicodeEncodeError) as err:
        raise InvalidArgument(f"{doing}: not storable as a MongoDB document: {err}") from err


async def next_change(stream: AsyncChangeStream[Document]) -> Document | None:
    """`stream.try_next()`, but a cancellation that pymongo takes for a broken connection, and mends, still counts."""
    try:
        change = await stream.try_next()
    except PyMongoError as err:
        _raise_if_cancelled(err)
        raise
    _raise_if_cancelled(None)
    return change


def _raise_if_cancelled(cause: Exception | None) -> None:
    try:
        task = asyncio.current_task()
    except RuntimeError:
        return  # No loop runs here, so nothing was cancelled.
    if task is not None and task.cancelling():
        raise asyncio.CancelledError from cause


def translate(error: PyMongoError, doing: str) -> ShoalError:
    """The ShoalError that says what `error` means for a caller."""
    if isinstance(error, ConnectionFailure) or error.timeout or _is_starting(error):
        return Unavailable(f"{doing}: MongoDB does not answer ({_brief(error)}): retry in a moment")
    if not isinstance(error, OperationFailure):
        return Internal(f"{doing}: {type(error).__name__}: {_brief(error)}")
    codes = _codes(error)
    if _OUT_OF_DISK_SPACE in codes:
        return ResourceExhausted(f"{doing}: MongoDB's disk is full: free some space there")
    if codes & _AWAY or isinstance(error, (ExecutionTimeout, WriteConcernError)):
        return Unavailable(f"{doing}: MongoDB cannot do it just now ({_brief(error)}): retry in a moment")
    if _labelled_transient(error):
        return Unavailable(f"{doing}: MongoDB gave up an operation ({_brief(error)}): retry")
    if codes & _NOT_ALLOWED:
        return PermissionDenied(f"{doing}: MongoDB refuses this user: check the URI's user, password and role")
    if _DUPLICATE_KEY in codes:
        return AlreadyExists(f"{doing}: {_brief(error)}")
    if _VALIDATION_FAILED in codes:
        return InvalidArgument(f"{doing}: the document breaks the collection's schema: {_brief(error)}")
    return Internal(f"{doing}: MongoDB failed with code {error.code}: {_brief(error)}")


def _is_starting(error: PyMongoError) -> bool:
    """A mongod that has not joined its set yet has no sessions, as pymongo says."""
    return isinstance(error, ConfigurationError) and "Sessions are not supported" in str(error)


def _codes(error: OperationFailure) -> set[int]:
    """The codes of an error and, for a bulk write, of each of its writes."""
    codes = {error.code or 0}
    if isinstance(error, BulkWriteError):
        codes |= {entry.get("code", 0) for entry in error.details.get("writeErrors", ())}
        codes |= {entry.get("code", 0) for entry in error.details.get("writeConcernErrors", ())}
    return codes


def _labelled_transient(error: PyMongoError) -> bool:
    return any(map(error.has_error_label, ("RetryableWriteError", "TransientTransactionError")))


def _brief(error: PyMongoError) -> str:
    """The first line of an error, without the topology dump that pymongo appends."""
    text = str(error).split(", full error:")[0].split(", Topology Description:")[0]
    text = text.split(" (configured timeouts:")[0]
    return text.splitlines()[0][:300] if text else type(error).__name__
