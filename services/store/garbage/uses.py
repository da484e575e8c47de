"""Uses of artifacts and blobs. This module alone knows everything that can refer to an artifact or a blob."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from pymongo.asynchronous.client_session import AsyncClientSession

from services.store.artifacts.stored import FOLDER, key_of
from services.store.documents import Collections


class Uses:
    """Finds uses. Raises pymongo's errors."""

    def __init__(self, collections: Collections) -> None:
        self._collections = collections

    async def referenced(self, digests: Collection[str], session: AsyncClientSession | None = None) -> set[str]:
        """Return the digests that a model or a reference uses."""
        some = {"$in": list(digests)}
        found = await self._collections.models.distinct("files.sha256", {"files.sha256": some}, session=session)
        found += await self._collections.references.distinct("digest", {"digest": some}, session=session)
        return set(found) & set(digests)

    async def users(self, digest: str) -> list[str]:
        """Return descriptions of the models and references that use an artifact."""
        models = self._collections.models.find({"files.sha256": digest}).sort([("name", 1), ("version", 1)])
        found = [
            f"model {doc['name']} version {doc['version']}, file {file['path']}"
            async for doc in models
            for file in doc["files"]
            if file["sha256"] == digest
        ]
        references = self._collections.references.find({"digest": digest}).sort("_id", 1)
        return found + [doc["_id"] async for doc in references]

    async def used_keys(self, keys: Iterable[str]) -> set[str]:
        """Return the keys of blobs that an artifact (damaged or not) or a result refers to."""
        keys = set(keys)
        digests = {_digest_of(key) for key in keys if key.startswith(f"{FOLDER}/")}
        artifacts = self._collections.artifacts.find({"_id": {"$in": list(digests)}}, {"key": 1})
        found = {key_of(doc) async for doc in artifacts}
        results = self._collections.results.find({"blob.key": {"$in": list(keys - found)}}, {"blob.key": 1})
        return keys & (found | {doc["blob"]["key"] async for doc in results})


def _digest_of(key: str) -> str:
    return key.rpartition("/")[2].partition(".")[0]
