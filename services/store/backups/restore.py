"""A backup back into an empty store: blobs first, then documents, jobs last.

    empty? ──> mark "being restored" ──> blobs ──> documents, collection by collection ──> usage counted ──> no mark

A document is there only when what it means is there, and a job only when all else is: whoever runs it finds everything.
Interrupted, it leaves the mark: the same backup restored again goes on, anything else is refused. The mark names the
call, too: of two the later one goes on, and the earlier one ends. Otherwise it would bring back, after the end of the
other, what the node has used up since.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from bson.raw_bson import RawBSONDocument
from pymongo.asynchronous.database import AsyncDatabase
from pymongo.errors import BulkWriteError

from mesh.mongo import Document, translated
from mesh.process.tasks import together
from mesh.process.threads import Threads
from services.store.artifacts.blobs import BlobStore
from services.store.artifacts.digest import brief, checked
from services.store.backups import dump, manifest
from services.store.backups.backup import NOT_CARRIED
from services.store.backups.blob_copy import Copied, Named, blobs_meant, copied, whole
from services.store.backups.locations import BackupPlaces
from services.store.backups.manifest import Dumped, Manifest, ManifestPart
from services.store.backups.progress import Progress
from services.store.documents import RESTORES, Collections
from services.store.usage.counters import Counters
from shoal.errors import Aborted, DataLoss, FailedPrecondition, InvalidArgument, NotFound

_AT_ONCE = 8
_INSERTED_AT_ONCE = 500
_DUPLICATE_KEY = 11000
_LAST, _USAGE = "jobs", "usage"
_KEY = re.compile(r"(artifacts|responses)/[0-9a-f]{2}/[0-9a-f]{32,64}(\.[0-9a-f]{16})?")
_MANIFEST_BYTES = 64 << 20
# One line for each 16 MiB of documents: enough for terabytes.


class Restore:
    """Restores backups into this store: its database, and `others` on the same MongoDB."""

    def __init__(
        self,
        collections: Collections,
        blobs: BlobStore,
        places: BackupPlaces,
        staging: Path,
        threads: Threads,
        clock: Callable[[], datetime],
        counters: Counters,
        others: Sequence[str] = (),
    ) -> None:
        self._collections = collections
        self._blobs = blobs
        self._places = places
        self._staging = staging
        self._threads = threads
        self._clock = clock
        self._counters = counters
        self._others = frozenset(others)

    async def run(self, source_url: str, backup_id: str) -> AsyncGenerator[Progress, None]:
        """Restores a backup (the newest when `backup_id` is empty); yields how far it is, at the end `is_complete`.

        Raises:
            InvalidArgument, PermissionDenied: a place that it may not use.
            NotFound: no (such) complete backup there.
            FailedPrecondition: this store is not empty, or the backup has a database that is none of `others`.
            Aborted: a later call restores the same backup, and goes on.
            DataLoss: a file of the backup is damaged: it is named, and nothing wrong is restored.
        """
        source = await self._places.open(source_url, to_write=False)
        chosen = await _chosen(source, backup_id)
        made = await self._manifest(source, chosen)
        self._check_databases(made)
        with translated("restoring a backup"):
            call = uuid.uuid4().hex
            await self._begin(made, call)
            progress = Progress(made.id, blobs_in_all=made.blobs, missing=made.missing, cluster_time=made.cluster_time)
            uncounted: list[str] = []
            # Blobs before the documents that mean them; jobs after everything.
            for dumped in sorted(made.collections, key=lambda each: (each.name == _LAST, each.database, each.name)):
                for part in dumped.parts:
                    docs = await self._documents(source, part)
                    progress = await self._blobs_first(source, dumped, docs, made, progress)
                    there = await self._insert(dumped, docs, made, call)
                    if dumped.name == _USAGE and not dumped.database:
                        uncounted += there
                    progress = replace(progress, documents=progress.documents + len(docs))
                    yield progress
            for tenant in uncounted:
                # Results that came meanwhile began its counter, which stands in the way of the one of the backup.
                await self._counters.recount(tenant)
                yield progress
            await self._end(made, call)
        yield replace(progress, is_complete=True)

    async def _manifest(self, source: BlobStore, backup_id: str) -> Manifest:
        key = f"{manifest.folder_of(backup_id)}/{manifest.NAME}"
        size = await source.size(key)
        if size is None:
            raise NotFound(f"backup {backup_id} is not there, or was interrupted and is not complete: choose another")
        if size > _MANIFEST_BYTES:
            raise DataLoss(f"backup {backup_id}: its manifest is damaged: choose another backup")
        return manifest.decoded(b"".join([chunk async for chunk in source.read(key, 0, size)]), backup_id)

    def _check_databases(self, made: Manifest) -> None:
        """Whoever can write to the place could name any database of this MongoDB."""
        for dumped in made.collections:
            if dumped.database and dumped.database not in self._others:
                raise FailedPrecondition(
                    f"backup {made.id} has database {dumped.database!r}, which is not known to belong to this store: "
                    "if it does, set SHOAL_STORE_BACKUP_DATABASES"
                )

    async def _begin(self, made: Manifest, call: str) -> None:
        """Marks this store as being restored, if it is empty, or has that mark already."""
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
        # Both may have found the store empty.
        if (other := await self._collections.db[RESTORES].find_one({"_id": {"$ne": made.id}})) is not None:
            await self._unmark(made, call)
            raise FailedPrecondition(
                f"another restore, of backup {other['_id']}, began at the same moment: restore one of the two"
            )

    async def _mark(self, made: Manifest, call: str) -> None:
        """Says in each database that documents are there before others that need them: nothing is to be tidied up."""
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
        """All that it restores into, the store's own first."""
        return [self._database(name) for name in sorted({"", *(dumped.database for dumped in made.collections)})]

    def _database(self, name: str) -> AsyncDatabase[Document]:
        return self._collections.db.client[name] if name else self._collections.db

    async def _documents(self, source: BlobStore, part: ManifestPart) -> list[RawBSONDocument]:
        data = await whole(Named(part.key, part.size, part.sha256), source, self._threads)
        return await self._threads.run(dump.documents, data, part.key)

    async def _blobs_first(
        self, source: BlobStore, dumped: Dumped, docs: Sequence[RawBSONDocument], made: Manifest, progress: Progress
    ) -> Progress:
        wanted = [] if dumped.database else _wanted(dumped.name, docs, frozenset(made.missing))
        for first in range(0, len(wanted), _AT_ONCE):
            some = wanted[first : first + _AT_ONCE]
            done = await together(copied(b, source, self._blobs, key, self._staging, self._threads) for b, key in some)
            new = [blob.size for (blob, _), how in zip(some, done, strict=True) if how is not Copied.THERE]
            progress = replace(
                progress,
                blobs=progress.blobs + len(some),
                copied=progress.copied + len(new),
                copied_bytes=progress.copied_bytes + sum(new),
                repaired=progress.repaired + done.count(Copied.REPAIRED),
            )
        return progress

    async def _insert(self, dumped: Dumped, docs: Sequence[RawBSONDocument], made: Manifest, call: str) -> list[Any]:
        """Inserts those that are not there. Gives the ids of the others."""
        there: list[Any] = []
        raw = self._database(dumped.database).get_collection(dumped.name, codec_options=dump.RAW)
        for first in range(0, len(docs), _INSERTED_AT_ONCE):
            await self._check_mark(made, call)
            try:
                await raw.insert_many(docs[first : first + _INSERTED_AT_ONCE], ordered=False)
            except BulkWriteError as err:
                # Of a restore that was interrupted: they are there.
                failures = err.details.get("writeErrors", [])
                if any(failure["code"] != _DUPLICATE_KEY for failure in failures):
                    raise
                there += [docs[first + failure["index"]]["_id"] for failure in failures]
        return there


async def complete_backups(source: BlobStore) -> list[str]:
    """The ids of complete backups of a place, oldest first."""
    found = []
    async for blob in source.list(manifest.FOLDER):
        backup_id, _, rest = blob.key.removeprefix(f"{manifest.FOLDER}/").partition("/")
        if rest == manifest.NAME and manifest.is_id(backup_id):
            found.append(backup_id)
    return sorted(found)


async def _chosen(source: BlobStore, backup_id: str) -> str:
    if backup_id:
        if not manifest.is_id(backup_id):
            raise InvalidArgument("backup_id: expected one as it was printed: 20261126T163000Z-1a2b3c4d")
        return backup_id
    if there := await complete_backups(source):
        return there[-1]
    raise NotFound("there is no complete backup in that place")


def _wanted(collection: str, docs: Sequence[RawBSONDocument], missing: frozenset[str]) -> list[tuple[Named, str]]:
    """The blobs that documents mean: where they lie in the backup, and where they go."""
    return [
        (Named(manifest.blob_key(checked(blob.sha256, "sha256")), blob.size, blob.sha256), _own(blob.key))
        for blob in blobs_meant(collection, docs)
        if blob.sha256 not in missing
    ]


def _own(key: str) -> str:
    """A key as this store makes them. Somebody may have made up the backup: nothing is written elsewhere."""
    if not _KEY.fullmatch(key):
        raise DataLoss(f"the backup has a document of a blob at {brief(key)}: no store made that")
    return key
