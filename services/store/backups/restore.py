"""Restore of a backup into an empty store: blobs first, then documents, jobs last.

    empty? ──> mark "being restored" ──> blobs ──> documents, collection by collection ──> usage counted ──> no mark

A document is restored after everything that it refers to, and a job after everything else, so a job that runs finds
all of it. An interrupted restore leaves the mark: restoring the same backup again continues, anything else is rejected.
The mark also names the call: of two calls the later one continues, and the earlier one ends. Otherwise the earlier one
would bring back, after the end of the later one, documents that the node has used up since.
"""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from bson.raw_bson import RawBSONDocument
from pymongo.asynchronous.collection import AsyncCollection
from pymongo.asynchronous.database import AsyncDatabase
from pymongo.errors import BulkWriteError

from mesh.mongo import Document, translated
from mesh.process.tasks import together
from mesh.process.threads import Threads
from services.store.artifacts.blobs import BlobStore
from services.store.artifacts.digest import brief, checked
from services.store.backups import dump, manifest
from services.store.backups.backup import NOT_CARRIED
from services.store.backups.blob_copy import CopyOutcome, blobs_referenced, copy_blob, read_whole
from services.store.backups.locations import BackupLocations
from services.store.backups.manifest import DumpedCollection, Manifest, ManifestPart
from services.store.backups.progress import BackupProgress
from services.store.documents import RESTORES, Collections
from services.store.results.result_documents import BlobRef
from services.store.usage.counters import Counters
from shoal.errors import Aborted, DataLoss, FailedPrecondition, InvalidArgument, NotFound

log = logging.getLogger(__name__)

_AT_ONCE = 8
_INSERTED_AT_ONCE = 500
_DUPLICATE_KEY = 11000
# Field with the idempotency key of a job or batch, which is unique for each tenant.
_IDEMPOTENCY_KEY = "key"
# Documents that one line of the log names.
_NAMED = 20
_LAST, _USAGE = "jobs", "usage"
# Ingest's schedules carry the token of the last leader that wrote them (mesh/mongo_lease.py). Tokens of this node begin
# anew, because leases are not restored: no leader could write a schedule with the old token.
_FENCED, _FENCE = "schedules", "fence"
_KEY = re.compile(r"(artifacts|responses)/[0-9a-f]{2}/[0-9a-f]{32,64}(\.[0-9a-f]{16})?")
# One entry for each 16 MiB of documents: enough for terabytes.
_MANIFEST_BYTES = 64 << 20


class Restore:
    """Restores backups into this store: its database, and `others` on the same MongoDB."""

    def __init__(
        self,
        collections: Collections,
        blobs: BlobStore,
        locations: BackupLocations,
        staging: Path,
        threads: Threads,
        clock: Callable[[], datetime],
        counters: Counters,
        others: Sequence[str] = (),
    ) -> None:
        self._collections = collections
        self._blobs = blobs
        self._locations = locations
        self._staging = staging
        self._threads = threads
        self._clock = clock
        self._counters = counters
        self._others = frozenset(others)

    async def run(self, source_url: str, backup_id: str) -> AsyncGenerator[BackupProgress, None]:
        """Restore a backup (the newest when `backup_id` is empty). Yields its progress, at the end `is_complete`.

        Raises:
            InvalidArgument, PermissionDenied: the location may not be used.
            NotFound: the location has no (such) complete backup.
            FailedPrecondition: this store is not empty, or the backup has a database that is none of `others`.
            Aborted: a later call restores the same backup, and continues.
            DataLoss: a file of the backup is damaged; the message names it, and no damaged data is restored.
        """
        source = await self._locations.open(source_url, to_write=False)
        chosen = await _chosen(source, backup_id)
        made = await self._manifest(source, chosen)
        self._check_databases(made)
        with translated("restoring a backup"):
            call = uuid.uuid4().hex
            await self._begin(made, call)
            progress = BackupProgress(
                made.id, blobs_in_all=made.blobs, missing=made.missing, cluster_time=made.cluster_time
            )
            uncounted: list[str] = []
            # Blobs before the documents that refer to them; jobs after everything.
            for dumped in sorted(made.collections, key=lambda each: (each.name == _LAST, each.database, each.name)):
                for part in dumped.parts:
                    docs = await self._documents(source, part)
                    progress = await self._blobs_first(source, dumped, docs, made, progress)
                    existing = await self._insert(dumped, docs, made, call)
                    if dumped.name == _USAGE and not dumped.database:
                        uncounted += existing
                    progress = replace(progress, documents=progress.documents + len(docs))
                    yield progress
            for tenant in uncounted:
                # Results recorded meanwhile made this counter, so the backup's counter was not inserted.
                await self._counters.recount(tenant)
                yield progress
            await self._end(made, call)
        yield replace(progress, is_complete=True)

    async def _manifest(self, source: BlobStore, backup_id: str) -> Manifest:
        key = f"{manifest.folder_of(backup_id)}/{manifest.NAME}"
        size = await source.size(key)
        if size is None:
            raise NotFound(f"backup {backup_id} does not exist, or was interrupted and is not complete: choose another")
        if size > _MANIFEST_BYTES:
            raise DataLoss(f"backup {backup_id}: its manifest is damaged: choose another backup")
        return manifest.decoded(b"".join([chunk async for chunk in source.read(key, 0, size)]), backup_id)

    def _check_databases(self, made: Manifest) -> None:
        """Reject unknown databases: the location's writer could name any database of this MongoDB."""
        for dumped in made.collections:
            if dumped.database and dumped.database not in self._others:
                raise FailedPrecondition(
                    f"backup {made.id} has database {dumped.database!r}, which is not known to belong to this store: "
                    "if it does, set SHOAL_STORE_BACKUP_DATABASES"
                )

    async def _begin(self, made: Manifest, call: str) -> None:
        """Mark this store as being restored, if it is empty or has that mark already."""
        mark = await self._collections.db[RESTORES].find_one({})
        if mark is not None:
            if mark["_id"] != made.id:
                raise FailedPrecondition(
                    f"this store is half restored from backup {mark['_id']}: restore that one again, or start with an "
                    "empty store"
                )
            await self._mark(made, call)
            return
        for database in self._databases(made):
            for name in await database.list_collection_names(filter={"type": "collection"}):
                if name not in NOT_CARRIED and await database[name].find_one({}, {"_id": 1}) is not None:
                    raise FailedPrecondition(
                        f"this store is not empty: collection {name} has documents. Restore into a new one"
                    )
        await self._mark(made, call)
        # Two restores may both have found the store empty.
        if (other := await self._collections.db[RESTORES].find_one({"_id": {"$ne": made.id}})) is not None:
            await self._unmark(made, call)
            raise FailedPrecondition(
                f"another restore, of backup {other['_id']}, began at the same moment: restore one of the two"
            )

    async def _mark(self, made: Manifest, call: str) -> None:
        """Mark each database as incomplete: garbage collection and similar work must wait."""
        for database in self._databases(made):
            mark = {"$setOnInsert": {"began_at": self._clock()}, "$set": {"call": call}}
            await database[RESTORES].update_one({"_id": made.id}, mark, upsert=True)

    async def _check_mark(self, made: Manifest, call: str) -> None:
        if await self._collections.db[RESTORES].find_one({"_id": made.id, "call": call}, {"_id": 1}) is None:
            raise Aborted(f"another call restores backup {made.id}, or has restored it: this one has ended")

    async def _end(self, made: Manifest, call: str) -> None:
        await self._check_mark(made, call)
        if made.missing:
            query = {"_id": {"$in": list(made.missing)}}
            await self._collections.artifacts.update_many(query, {"$set": {"damaged": True}})
        await self._unmark(made, call)

    async def _unmark(self, made: Manifest, call: str) -> None:
        for database in reversed(self._databases(made)):
            await database[RESTORES].delete_one({"_id": made.id, "call": call})

    def _databases(self, made: Manifest) -> list[AsyncDatabase[Document]]:
        """Return all databases that the backup is restored into, the store's own first."""
        return [self._database(name) for name in sorted({"", *(dumped.database for dumped in made.collections)})]

    def _database(self, name: str) -> AsyncDatabase[Document]:
        return self._collections.db.client[name] if name else self._collections.db

    async def _documents(self, source: BlobStore, part: ManifestPart) -> list[RawBSONDocument]:
        data = await read_whole(BlobRef(part.key, part.size, part.sha256), source, self._threads)
        return await self._threads.run(dump.documents, data, part.key)

    async def _blobs_first(
        self,
        source: BlobStore,
        dumped: DumpedCollection,
        docs: Sequence[RawBSONDocument],
        made: Manifest,
        progress: BackupProgress,
    ) -> BackupProgress:
        blobs = [] if dumped.database else _blobs_of(dumped.name, docs, frozenset(made.missing))
        for first in range(0, len(blobs), _AT_ONCE):
            some = blobs[first : first + _AT_ONCE]
            done = await together(
                copy_blob(blob, source, self._blobs, key, self._staging, self._threads) for blob, key in some
            )
            new = [blob.size for (blob, _), how in zip(some, done, strict=True) if how is not CopyOutcome.PRESENT]
            progress = replace(
                progress,
                blobs=progress.blobs + len(some),
                copied=progress.copied + len(new),
                copied_bytes=progress.copied_bytes + sum(new),
                repaired=progress.repaired + done.count(CopyOutcome.REPAIRED),
            )
        return progress

    async def _insert(
        self, dumped: DumpedCollection, docs: Sequence[RawBSONDocument], made: Manifest, call: str
    ) -> list[Any]:
        """Insert the documents that do not exist yet. Return the ids of the others."""
        if dumped.name == _FENCED:
            docs = [dump.with_field(doc, _FENCE, 0) for doc in docs]
        existing: list[Any] = []
        raw = self._database(dumped.database).get_collection(dumped.name, codec_options=dump.RAW)
        for first in range(0, len(docs), _INSERTED_AT_ONCE):
            await self._check_mark(made, call)
            some, taken = await _insert_new(raw, docs[first : first + _INSERTED_AT_ONCE])
            existing += some
            if taken:
                log.warning(
                    "restoring %(documents)d documents of %(collection)s without their idempotency keys, which newer "
                    "documents have: %(ids)s",
                    {
                        "event": "restore.idempotency_keys_left_out",
                        "documents": len(taken),
                        "collection": dumped.name,
                        "ids": ", ".join(str(doc["_id"]) for doc in taken[:_NAMED]),
                    },
                )
                some, _ = await _insert_new(raw, [dump.without_field(doc, _IDEMPOTENCY_KEY) for doc in taken])
                existing += some
        return existing


async def _insert_new(
    raw: AsyncCollection[Any], docs: Sequence[RawBSONDocument]
) -> tuple[list[Any], list[RawBSONDocument]]:
    """Insert documents. Return the ids of existing documents, and the documents whose idempotency key is in use.

    An interrupted restore inserted the existing documents. A submit, a schedule or a connector has used the keys since
    the restore began.
    """
    try:
        await raw.insert_many(docs, ordered=False)
    except BulkWriteError as err:
        failures = err.details.get("writeErrors", [])
        if any(failure["code"] != _DUPLICATE_KEY for failure in failures):
            raise
        taken = [docs[each["index"]] for each in failures if _IDEMPOTENCY_KEY in each.get("keyPattern", ())]
        ids = [docs[each["index"]]["_id"] for each in failures if _IDEMPOTENCY_KEY not in each.get("keyPattern", ())]
        return ids, taken
    return [], []


async def complete_backups(source: BlobStore) -> list[str]:
    """Return the ids of the complete backups in a location, oldest first."""
    found = []
    async for blob in source.list(manifest.FOLDER):
        backup_id, _, rest = blob.key.removeprefix(f"{manifest.FOLDER}/").partition("/")
        if rest == manifest.NAME and manifest.is_id(backup_id):
            found.append(backup_id)
    return sorted(found)


async def _chosen(source: BlobStore, backup_id: str) -> str:
    if backup_id:
        if not manifest.is_id(backup_id):
            raise InvalidArgument("backup_id: expected an id as it was printed: 20261126T163000Z-1a2b3c4d")
        return backup_id
    if complete := await complete_backups(source):
        return complete[-1]
    raise NotFound("url: that location has no complete backup")


def _blobs_of(collection: str, docs: Sequence[RawBSONDocument], missing: frozenset[str]) -> list[tuple[BlobRef, str]]:
    """Return the blobs that documents refer to: each as it is in the backup, and its key in this store."""
    return [
        (BlobRef(manifest.blob_key(checked(blob.sha256, "sha256")), blob.size, blob.sha256), _checked_key(blob.key))
        for blob in blobs_referenced(collection, docs)
        if blob.sha256 not in missing
    ]


def _checked_key(key: str) -> str:
    """Return a key that a store can have made. A forged backup must not write elsewhere."""
    if not _KEY.fullmatch(key):
        raise DataLoss(f"the backup has a document with the blob key {brief(key)}, which no store makes")
    return key
