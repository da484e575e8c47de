"""Model registry: the artifacts of each version of each model, and the version of each alias.

A version is immutable. Its document's `_id` is its name and number, so of several concurrent pushes one gets a number
and the others get a conflict, in every instance.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

from pymongo import ASCENDING, DESCENDING
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import DuplicateKeyError

from mesh.mongo import Document, translated
from services.store.artifacts.artifacts import Artifacts
from services.store.artifacts.digest import brief
from services.store.documents import Collections, whole_milliseconds
from services.store.registry import model_rules as rules
from services.store.registry.model_rules import File
from services.store.transactions import transaction
from shoal.errors import Aborted, AlreadyExists, FailedPrecondition, InvalidArgument, NotFound

T = TypeVar("T")

# Each lost race means that another push of this model succeeded: as many pushes in a row would have to.
_NUMBER_ATTEMPTS = 100
_SORTED = [("name", ASCENDING), ("version", ASCENDING)]


@dataclass(frozen=True)
class Version:
    """One registered version of a model."""

    name: str
    version: int
    files: tuple[File, ...]
    content_digest: str
    created_at: datetime
    labels: tuple[tuple[str, str], ...]
    aliases: tuple[str, ...]


class Registry:
    """Registers, lists and removes versions, and sets aliases. Safe beside other instances on the same MongoDB."""

    def __init__(self, collections: Collections, artifacts: Artifacts, clock: Callable[[], datetime]) -> None:
        self._collections = collections
        self._artifacts = artifacts
        self._clock = clock

    async def register(
        self, name: str, version: int, files: list[File], labels: Mapping[str, str]
    ) -> tuple[Version, bool]:
        """Register a version; `version` 0 chooses the next number. Return True when the same content was registered.

        Raises:
            InvalidArgument: a bad name, version, path, digest, size or label.
            NotFound: a file's artifact is not stored.
            AlreadyExists: that version exists with other content.
        """
        rules.check_name(name, "model.name")
        rules.check_version(version)
        checked_labels = rules.check_labels(labels)
        stored = await self._stored(rules.check_files(files))
        doc: Document = {
            "name": name,
            "files": [vars(file) for file in stored],
            "content_digest": rules.content_digest(stored),
            "created_at": whole_milliseconds(self._clock()),
            "labels": [{"key": key, "value": value} for key, value in checked_labels.items()],
        }
        with translated(f"registering model {name}"):
            existing = await (self._insert(doc, version) if version else self._insert_next(doc))
            return await self._with_aliases(existing or doc), existing is not None

    async def versions(self, name: str) -> list[Version]:
        """Return every version of model `name`, or of every model when it is empty, sorted by name and version."""
        query = {"name": rules.check_name(name)} if name else {}
        with translated("listing models"):
            docs = await self._collections.models.find(query).sort(_SORTED).to_list()
            aliases = await self._collections.aliases.find(query).sort(_SORTED).to_list()
        return _joined(docs, aliases)

    async def remove(self, name: str, version: int) -> list[Version]:
        """Remove one version, or all when `version` is 0, with their aliases. Return the removed versions.

        Raises:
            NotFound: no such model or version.
        """
        rules.check_name(name)
        rules.check_version(version)
        query: Document = {"name": name, "version": version} if version else {"name": name}

        async def work(session: AsyncClientSession) -> list[Version]:
            models, aliases = self._collections.models, self._collections.aliases
            docs = await models.find(query, session=session).sort(_SORTED).to_list()
            pointing = await aliases.find(query, session=session).to_list()
            await models.delete_many({"_id": {"$in": [doc["_id"] for doc in docs]}}, session=session)
            await aliases.delete_many(query, session=session)
            return _joined(docs, pointing)

        removed = await self._in_transaction(f"removing model {name}", work)
        if not removed:
            raise NotFound(f"model {name}" + (f" has no version {version}" if version else " is not registered"))
        return removed

    async def set_alias(self, name: str, alias: str, version: int) -> Version | None:
        """Point `alias` at a version and return that version; remove the alias when `version` is 0.

        Raises:
            NotFound: no such version.
        """
        rules.check_name(name)
        rules.check_alias(alias)
        rules.check_version(version)
        if version == 0:
            with translated(f"removing alias {alias} of model {name}"):
                await self._collections.aliases.delete_one({"_id": f"{name}/{alias}"})
            return None
        pointer: Document = {"name": name, "alias": alias, "version": version}

        async def work(session: AsyncClientSession) -> Document | None:
            # The write to the version conflicts with a concurrent removal: no alias can dangle.
            touched = {"$set": {"aliased_at": self._clock()}}
            doc = await self._collections.models.find_one_and_update(_key(name, version), touched, session=session)
            if doc is not None:
                key = {"_id": f"{name}/{alias}"}
                await self._collections.aliases.replace_one(key, pointer, upsert=True, session=session)
            return doc

        doc = await self._in_transaction(f"pointing alias {alias} of model {name}", work)
        if doc is None:
            raise NotFound(f"model {name} has no version {version}")
        with translated(f"reading the aliases of model {name}"):
            return await self._with_aliases(doc)

    async def _stored(self, files: tuple[File, ...]) -> tuple[File, ...]:
        """Return the files with the sizes of their artifacts. A size of 0 in the request is not checked."""
        found = await self._artifacts.find({file.sha256 for file in files})
        for file in files:
            if (artifact := found.get(file.sha256)) is None:
                raise NotFound(f"file {brief(file.path)}: artifact {file.sha256} is not stored: upload it first")
            if file.size not in (0, artifact.size):
                raise InvalidArgument(
                    f"file {brief(file.path)}: size_bytes is {file.size}, its artifact's {artifact.size}"
                )
        return tuple(File(file.path, file.sha256, found[file.sha256].size) for file in files)

    async def _insert(self, doc: Document, version: int) -> Document | None:
        """Insert `doc` as this version and return None; or return the existing version of the same content."""
        doc.update(_key(doc["name"], version), version=version)
        digests = {file["sha256"] for file in doc["files"]}

        async def work(session: AsyncClientSession) -> bool:
            # The write to the artifacts conflicts with a concurrent collection of one of them.
            if are_stored := await self._artifacts.touch(digests, session):
                await self._collections.models.insert_one(doc, session=session)
            return are_stored

        try:
            if not await transaction(self._collections, work):
                raise NotFound("an artifact has just been collected, because nothing referred to it: upload it again")
        except DuplicateKeyError:
            existing = await self._collections.models.find_one({"_id": doc["_id"]})
            if existing is None:
                raise Aborted(f"version {version} of model {doc['name']} was removed meanwhile: try again") from None
            if existing["content_digest"] != doc["content_digest"]:
                raise AlreadyExists(
                    f"version {version} of model {doc['name']} exists with other content, and versions are "
                    "immutable: register it under another version, or 0 for the next"
                ) from None
            return existing
        return None

    async def _insert_next(self, doc: Document) -> Document | None:
        """Insert `doc` under the next number and return None; or return the newest version if its content is equal."""
        for _ in range(_NUMBER_ATTEMPTS):
            newest = await self._collections.models.find_one({"name": doc["name"]}, sort=[("version", DESCENDING)])
            if newest and newest["content_digest"] == doc["content_digest"]:
                return newest
            version = newest["version"] + 1 if newest else 1
            if version > rules.MAX_VERSION:
                raise FailedPrecondition(f"model {doc['name']} has no number left: remove version {version - 1}")
            try:
                return await self._insert(doc, version)
            except (AlreadyExists, Aborted):
                # Another push took the number between our read and our write.
                continue
        raise Aborted(f"model {doc['name']}: {_NUMBER_ATTEMPTS} other pushes came first: try again")

    async def _with_aliases(self, doc: Document) -> Version:
        query = {"name": doc["name"], "version": doc["version"]}
        return _version(doc, [alias["alias"] async for alias in self._collections.aliases.find(query)])

    async def _in_transaction(self, doing: str, work: Callable[[AsyncClientSession], Awaitable[T]]) -> T:
        """Run `work` in one transaction, possibly more than once."""
        with translated(doing):
            return await transaction(self._collections, work)


def _key(name: str, version: int) -> Document:
    return {"_id": f"{name}/{version}"}


def _joined(docs: list[Document], aliases: list[Document]) -> list[Version]:
    pointing: dict[tuple[str, int], list[str]] = {}
    for alias in aliases:
        pointing.setdefault((alias["name"], alias["version"]), []).append(alias["alias"])
    return [_version(doc, pointing.get((doc["name"], doc["version"]), [])) for doc in docs]


def _version(doc: Document, aliases: list[str]) -> Version:
    return Version(
        name=doc["name"],
        version=doc["version"],
        files=tuple(File(**file) for file in doc["files"]),
        content_digest=doc["content_digest"],
        created_at=doc["created_at"],
        labels=tuple((label["key"], label["value"]) for label in doc["labels"]),
        aliases=tuple(sorted(aliases)),
    )
