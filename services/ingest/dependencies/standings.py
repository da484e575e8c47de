"""How the jobs stand that others depend on: one question by id, one by key."""

from __future__ import annotations

from collections.abc import Iterable

from pymongo.asynchronous.collection import AsyncCollection

from mesh.mongo import Document, translated
from services.ingest.dependencies.references import by_key, key_of
from services.ingest.dependencies.waiting import Standing
from services.ingest.job import State


async def standings(jobs: AsyncCollection[Document], tenant: str, references: Iterable[str]) -> dict[str, Standing]:
    """How the jobs of `tenant` stand that `references` mean; those that there are.

    Raises:
        Unavailable: MongoDB is away.
    """
    references = list(references)
    keys = [key for reference in references if (key := key_of(reference)) is not None]
    ids = [reference for reference in references if key_of(reference) is None]
    found: dict[str, Standing] = {}
    with translated("looking up jobs that others depend on"):
        if ids:
            async for document in jobs.find({"_id": {"$in": ids}, "tenant": tenant}, _STANDING):
                found[document["_id"]] = _standing(document)
        if keys:
            async for document in jobs.find({"tenant": tenant, "key": {"$in": keys}}, _STANDING):
                found[by_key(document["key"])] = _standing(document)
    return found


_STANDING = {"state": 1, "key": 1, "last_message": 1}


def _standing(document: Document) -> Standing:
    state = State(document["state"])
    message: str = document.get("last_message", "") if state is not State.SUCCEEDED else ""
    return Standing(document["_id"], state, message, document.get("key", ""))
