"""MongoDB client of every service: durable writes, bounded waits, collections created at start, translated errors.

A write returns after a majority of members has it on disk, and a read sees only data of a majority. So neither an
acknowledged write nor data that was read can be rolled back.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import Any, TypeAlias, TypeVar
from urllib.parse import parse_qsl, urlsplit

import bson
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

log = logging.getLogger(__name__)

Document: TypeAlias = dict[str, Any]
T = TypeVar("T")


async def _wait_for(awaitable: Awaitable[T], timeout: float | None) -> T:
    async with asyncio.timeout(timeout):
        return await awaitable


if sys.version_info < (3, 12):
    # Before 3.12, asyncio.wait_for waits in a task of its own. A cancellation while that task reacquires the lock of a
    # condition leaves the lock acquired without an owner. Then pymongo's topology, and every operation of the client,
    # blocks forever. This happens when calls are cancelled (deadline, stop) while MongoDB is unreachable.
    setattr(pymongo.lock, "wait_for", _wait_for)  # noqa: B010

TIMEOUT_MS = 6_000
"""Timeout of one operation, retries included. With our timeouts, an election in a healthy replica set takes up to 3 s,
so an operation survives it. An unreachable set is reported before most deadlines of callers.
`with pymongo.timeout(seconds)` allows a longer operation."""

BUILD_TIMEOUT_S = 12 * 3_600.0
"""Timeout of an index build or a schema change. A build reads the whole collection: some 2 s per million small
documents in memory, hours for a terabyte on disk. Under `TIMEOUT_MS`, MongoDB would abort it each time."""
_BUILD_RETRY_S = 10.0
# From this size on, a build takes long enough to be logged.
_LARGE_DOCUMENTS = 100_000

_CLOSE_S = 1.0
# About a millisecond, where the documents have long lists.
_DECODED_AT_ONCE = 64 << 10

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
    # Half of pymongo's default, to detect a recovered primary sooner. A monitor costs one call per interval.
    "heartbeatFrequencyMS": 5_000,
    # Operations beyond this number wait in a queue, within their timeout.
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
# Unauthorized, AuthenticationFailed, and Atlas' own code.
_NOT_ALLOWED = frozenset({13, 18, 8000})
# HostUnreachable, timeouts, shutdown, no primary, write conflicts: the same operation may succeed a moment later.
# IndexBuildAborted (276) and BackgroundOperationInProgressForNamespace (12587): an index of the collection is being
# built.
_RETRYABLE = frozenset({6, 7, 50, 64, 89, 91, 112, 134, 189, 202, 225, 226, 237, 251, 262, 276, 317}) | frozenset(
    {9001, 10058, 10107, 11600, 11602, 12587, 13388, 13435, 13436}
)


class _Checkout:
    """Use of a pooled connection that closes a connection from before its server supported transactions.

    A URI with directConnection=true reaches a member in any state, and pymongo keeps the member's first response for
    the life of the connection. A connection from before an election would reject transactions for as long as it is
    open.
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
    """pymongo's client with a bounded `close`, which takes 30 s by default while MongoDB is unreachable."""

    # pymongo has no public hook for connections.
    def _checkout(self, server: Any, session: Any) -> Any:
        return _Checkout(super()._checkout(server, session))

    async def close(self) -> None:
        with pymongo.timeout(_CLOSE_S):
            await super().close()

    aclose = close


def connect(uri: str, *, max_connections: int | None = None) -> AsyncMongoClient[Document]:
    """Return a client for `uri`. The client connects lazily; the caller closes it, preferably with `async with`.

    Writes: w=majority, journaled. Reads: majority. Times are timezone-aware, in UTC. Timeouts in `uri` override the
    defaults. Each open change stream occupies a connection most of the time, so many streams need `max_connections`.

    Raises:
        InvalidArgument: `uri` is not a MongoDB URI.
    """
    in_uri = {key.lower() for key, _ in parse_qsl(urlsplit(uri).query, keep_blank_values=True)}
    options = {key: value for key, value in _DEFAULTS.items() if key.lower() not in in_uri}
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
    """Create collection `name` with its validator and indexes, or update the existing collection.

    Idempotent, and safe when several processes call it concurrently. Waits for missing indexes, however large the
    collection is; `build_later_indexes` builds the ones that a service can do without.

    Raises:
        FailedPrecondition: an index with the same name or keys exists with other options.
        Unavailable: MongoDB is unreachable.
    """
    with translated(f"preparing collection {db.name}.{name}"):
        try:
            await db.create_collection(name, check_exists=False, validator=dict(validator))
        except OperationFailure as err:
            if err.code != _NAMESPACE_EXISTS:
                raise
            await _update_validator(db, name, validator)
    await ensure_indexes(db[name], indexes, retired)
    return db[name]


async def ensure_indexes(
    collection: AsyncCollection[Document], indexes: Sequence[IndexModel], retired: Sequence[str] = ()
) -> None:
    """Build the missing ones of `indexes`; then drop the indexes named in `retired`. Other indexes are kept.

    The collection can be read and written meanwhile. MongoDB builds an index once: concurrent callers wait for the same
    build.

    Raises:
        FailedPrecondition: an index with the same name or keys exists with other options.
        Unavailable: MongoDB is unreachable.
    """
    name = f"{collection.database.name}.{collection.name}"
    with translated(f"building indexes of {name}"):
        # For the log, and for the drops: a drop locks the whole collection even if the index does not exist, and waits
        # for a transaction of a killed process.
        existing = await collection.index_information() if indexes or retired else {}
        missing = sorted({index.document["name"] for index in indexes} - set(existing))
        if missing and (size := await collection.estimated_document_count()) >= _LARGE_DOCUMENTS:
            log.info(
                "building the indexes %(indexes)s of %(collection)s, which has about %(documents)d documents",
                {
                    "event": "mongo.building_indexes",
                    "indexes": ", ".join(missing),
                    "collection": name,
                    "documents": size,
                },
            )
        with pymongo.timeout(BUILD_TIMEOUT_S):
            if indexes:
                await _create_indexes(collection, indexes)
            for old in set(retired) & set(existing):
                await _drop_index(collection, old)


async def build_later_indexes(
    collection: AsyncCollection[Document], indexes: Sequence[IndexModel], retired: Sequence[str], *, meanwhile: str
) -> None:
    """Do the same as `ensure_indexes`, for indexes that a service can do without; log errors, and retry.

    On a large collection of an earlier version, this takes hours.

    Args:
        meanwhile: effect of a missing index, as in "lists are slow": begins the log message of an error.
    """
    while True:
        try:
            await ensure_indexes(collection, indexes, retired)
            return
        except ShoalError as err:
            log.warning("%(doing)s for now: %(error)s", {"event": "mongo.retrying", "doing": meanwhile, "error": err})
            await asyncio.sleep(_BUILD_RETRY_S)


async def _create_indexes(collection: AsyncCollection[Document], indexes: Sequence[IndexModel]) -> None:
    try:
        await collection.create_indexes(list(indexes))
    except OperationFailure as err:
        if err.code in _INDEX_CONFLICTS:
            name, hint = f"{collection.database.name}.{collection.name}", "drop the old index, then start again"
            raise FailedPrecondition(f"an index of {name} has changed: {err}: {hint}") from err
        raise


async def _drop_index(collection: AsyncCollection[Document], name: str) -> None:
    try:
        await collection.drop_index(name)
    except OperationFailure as err:
        if err.code != _INDEX_NOT_FOUND:
            raise


async def _update_validator(db: AsyncDatabase[Document], name: str, validator: Mapping[str, Any]) -> None:
    found = await (await db.list_collections(filter={"name": name})).to_list()
    # Without this check, collMod would lock the collection at each start of each instance.
    if found and found[0].get("options", {}).get("validator") == validator:
        return
    for attempt in range(5):
        try:
            with pymongo.timeout(BUILD_TIMEOUT_S):
                await db.command("collMod", name, validator=dict(validator), validationLevel="strict")
            return
        except OperationFailure as err:
            if err.code != _CONFLICTING_OPERATION or attempt == 4:
                raise
            await asyncio.sleep(0.05 * 2**attempt)


@contextmanager
def translated(doing: str) -> Iterator[None]:
    """Raise pymongo's errors inside the block as ShoalError, with the cause. The message starts with `doing`.

    pymongo sometimes reports a cancellation of its caller as a broken connection. The block then raises CancelledError;
    otherwise a loop that retries after errors could not be cancelled.
    """
    try:
        yield
    except PyMongoError as err:
        _raise_if_cancelled(err)
        raise translate(err, doing) from err
    except (BSONError, OverflowError, UnicodeEncodeError) as err:
        raise InvalidArgument(f"{doing}: not storable as a MongoDB document: {err}") from err


async def decoded(
    batches: AsyncIterable[Any], collection: AsyncCollection[Document], *, at_once: int = _DECODED_AT_ONCE
) -> AsyncIterator[Document]:
    """Yield the documents of raw batches (`find_raw_batches`) of a collection, with other work after `at_once` bytes.

    pymongo decodes a whole batch at once, up to 16 MB: documents with long lists would hold the event loop for 0.3 s.
    """
    passed = 0
    async for batch in batches:
        position = 0
        while position < len(batch):
            size = int.from_bytes(batch[position : position + 4], "little")
            yield bson.decode(batch[position : position + size], collection.codec_options)
            position += size
            passed += size
            if passed >= at_once:
                passed = 0
                await asyncio.sleep(0)


async def next_change(stream: AsyncChangeStream[Document]) -> Document | None:
    """Return `stream.try_next()`, or raise CancelledError if pymongo handled a cancellation as a broken connection."""
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
    # Without a running event loop there is no cancellation.
    except RuntimeError:
        return
    if task is not None and task.cancelling():
        raise asyncio.CancelledError from cause


def is_timeout(error: PyMongoError) -> bool:
    """Return True when an operation took longer than its limit, or raise CancelledError if its caller is cancelled."""
    _raise_if_cancelled(error)
    return error.timeout


def translate(error: PyMongoError, doing: str) -> ShoalError:
    """Return the ShoalError for a caller that corresponds to `error`."""
    if isinstance(error, ConnectionFailure) or error.timeout or _is_starting(error):
        return Unavailable(f"{doing}: MongoDB does not respond ({_brief(error)}): retry in a moment")
    if not isinstance(error, OperationFailure):
        return Internal(f"{doing}: {type(error).__name__}: {_brief(error)}")
    codes = _codes(error)
    if _OUT_OF_DISK_SPACE in codes:
        return ResourceExhausted(f"{doing}: MongoDB's disk is full: free some space there")
    if codes & _RETRYABLE or isinstance(error, (ExecutionTimeout, WriteConcernError)):
        return Unavailable(f"{doing}: MongoDB cannot do it just now ({_brief(error)}): retry in a moment")
    if _labelled_transient(error):
        return Unavailable(f"{doing}: MongoDB aborted the operation ({_brief(error)}): retry")
    if codes & _NOT_ALLOWED:
        return PermissionDenied(f"{doing}: MongoDB refuses this user: check the URI's user, password and role")
    if _DUPLICATE_KEY in codes:
        return AlreadyExists(f"{doing}: {_brief(error)}")
    if _VALIDATION_FAILED in codes:
        return InvalidArgument(f"{doing}: the document breaks the collection's schema: {_brief(error)}")
    return Internal(f"{doing}: MongoDB failed with code {error.code}: {_brief(error)}")


def _is_starting(error: PyMongoError) -> bool:
    """Return True for pymongo's error about a mongod that has not joined its replica set and has no sessions yet."""
    return isinstance(error, ConfigurationError) and "Sessions are not supported" in str(error)


def _codes(error: OperationFailure) -> set[int]:
    """Return the codes of an error; for a bulk write, also those of each write."""
    codes = {error.code or 0}
    if isinstance(error, BulkWriteError):
        codes |= {entry.get("code", 0) for entry in error.details.get("writeErrors", ())}
        codes |= {entry.get("code", 0) for entry in error.details.get("writeConcernErrors", ())}
    return codes


def _labelled_transient(error: PyMongoError) -> bool:
    return any(map(error.has_error_label, ("RetryableWriteError", "TransientTransactionError")))


def _brief(error: PyMongoError) -> str:
    """Return the first line of an error, without the topology dump that pymongo appends."""
    text = str(error).split(", full error:")[0].split(", Topology Description:")[0]
    text = text.split(" (configured timeouts:")[0]
    return text.splitlines()[0][:300] if text else type(error).__name__
