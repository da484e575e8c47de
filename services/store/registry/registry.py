"""Model registry: the artifacts of each version of each model, and the version of each alias.

A version is immutable. Its document's `_id` is its name and number, so of several concurrent pushes one gets a number
and the others get a conflict, in every instance.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

from bson import encode
from pymongo import ASCENDING, DESCENDING
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import DuplicateKeyError

from mesh.h2.memory_account import leaves_room
from mesh.mongo import Document, translated
from mesh.process.pauses import Pauses
from mesh.process.tasks import uninterrupted
from mesh.rpc.tenant_scope import EVERY_TENANT, TenantScope
from mesh.rpc.tenant_turns import WAIT_S, TenantTurns
from services.store.artifacts.artifacts import Artifacts
from services.store.artifacts.digest import brief
from services.store.documents import Collections, whole_milliseconds
from services.store.registry import model_code
from services.store.registry import model_rules as rules
from services.store.registry.model_rules import File
from services.store.transactions import transaction
from shoal.access.rpc_groups import MODEL_INFER, REGISTER, REGISTER_WITH_CODE
from shoal.errors import Aborted, AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted

T = TypeVar("T")

# Each lost race means that another push of this model succeeded: as many pushes in a row would have to.
_NUMBER_ATTEMPTS = 100
_SORTED = [("name", ASCENDING), ("version", ASCENDING)]
_BYTES_BY_TENANT: list[Document] = [
    {"$group": {"_id": {"$ifNull": ["$tenant", ""]}, "bytes": {"$sum": {"$bsonSize": "$$ROOT"}}}}
]
LISTS_AT_ONCE = 4
"""Lists of models that callers read at a time: each may have the whole registry."""
# A document takes as long as four of its files. 400 of these take about a millisecond.
_PAUSED_AFTER, _OF_A_VERSION = 400, 4
# A batch of MongoDB is decoded at once: 200 small versions take 2 ms.
_BATCH = 200


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
    tenant: str = ""
    """Tenant whose share of the registry it takes; empty for none."""


@dataclass(frozen=True)
class Draft:
    """Version to register."""

    name: str
    version: int
    """0: the next free number."""
    files: tuple[File, ...]
    labels: Mapping[str, str]


class Registry:
    """Registers, lists and removes versions, and sets aliases. Safe beside other instances on the same MongoDB."""

    def __init__(
        self, collections: Collections, artifacts: Artifacts, clock: Callable[[], datetime], max_bytes: int
    ) -> None:
        """`max_bytes` bounds the versions and aliases of all models: each change sends all of them to each infer."""
        self._collections = collections
        self._artifacts = artifacts
        self._clock = clock
        self._max_bytes = max_bytes
        self._pauses = Pauses()
        # One at a time: a thread of Python takes the processor from the event loop.
        self._config_turns = TenantTurns(1, wait_s=WAIT_S)
        # One at a time: between the count of what there is and an insert, no other may be made.
        self._insert_turns = TenantTurns(1, wait_s=WAIT_S)
        self.list_turns = TenantTurns(LISTS_AT_ONCE, leaves_room=True, wait_s=WAIT_S)

    async def register(self, drafts: Sequence[Draft], scope: TenantScope = EVERY_TENANT) -> list[tuple[Version, bool]]:
        """Register versions of one model, all or none, of artifacts that the scope sees.

        Return each, and True when the same content was registered.

        Version 0, of a single draft, chooses the next number.

        Raises:
            InvalidArgument: a bad name, version, path, digest, size or label; several models, or one number twice.
            PermissionDenied: the caller may not register the model, or no model that runs code, or an ensemble calls a
            model that the caller may not call.
            NotFound: a file's artifact is not stored.
            AlreadyExists: one of the versions exists with other content.
            ResourceExhausted: the registry is full, or its room is for others.
        """
        _check_together(drafts)
        scope.check(REGISTER, drafts[0].name)
        docs = [await self._document(draft, scope) for draft in drafts]
        with translated(f"registering model {drafts[0].name}"):
            async with self._insert_turns.take(scope.tenant or ""):
                insert = self._insert(docs) if drafts[0].version else self._insert_next(docs[0])
                existing = await uninterrupted(insert)
            return [
                (await self._with_aliases(old or new), old is not None) for old, new in zip(existing, docs, strict=True)
            ]

    async def _document(self, draft: Draft, scope: TenantScope) -> Document:
        """Return the document of a new version. Its artifacts are stored."""
        labels = rules.check_labels(draft.labels)
        stored = await self._stored(rules.check_files(draft.files), scope)
        if scope.access is not None:
            await self._check_content(draft.name, stored, scope)
        return {
            **(_key(draft.name, draft.version) if draft.version else {}),
            "name": draft.name,
            "version": draft.version,
            "files": [vars(file) for file in stored],
            "content_digest": rules.content_digest(stored),
            "created_at": whole_milliseconds(self._clock()),
            "labels": [{"key": key, "value": value} for key, value in labels.items()],
            **_owner(scope),
        }

    async def versions(self, name: str) -> list[Version]:
        """Return every version of model `name`, or of every model when it is empty, sorted by name and version."""
        query = {"name": rules.check_name(name)} if name else {}
        with translated("listing models"):
            docs = await self._collections.models.find(query).sort(_SORTED).batch_size(_BATCH).to_list()
            aliases = await self._collections.aliases.find(query).sort(_SORTED).batch_size(_BATCH).to_list()
        return await self._joined(docs, aliases)

    def each(self, versions: Iterable[Version]) -> AsyncIterator[Version]:
        """Yield versions, with pauses for other calls."""
        return self._pauses.each(
            versions, every=_PAUSED_AFTER, weight=lambda version: _OF_A_VERSION + len(version.files)
        )

    async def remove(self, name: str, version: int) -> list[Version]:
        """Remove one version, or all when `version` is 0, with their aliases. Return the removed versions.

        Raises:
            NotFound: no such model or version.
        """
        rules.check_name(name)
        rules.check_version(version)
        query: Document = {"name": name, "version": version} if version else {"name": name}

        async def work(session: AsyncClientSession) -> tuple[list[Document], list[Document]]:
            models, aliases = self._collections.models, self._collections.aliases
            docs = await models.find(query, session=session).sort(_SORTED).batch_size(_BATCH).to_list()
            pointing = await aliases.find(query, session=session).batch_size(_BATCH).to_list()
            await models.delete_many({"_id": {"$in": [doc["_id"] for doc in docs]}}, session=session)
            await aliases.delete_many(query, session=session)
            return docs, pointing

        docs, pointing = await self._in_transaction(f"removing model {name}", work)
        if not docs:
            raise NotFound(f"model {name}" + (f" has no version {version}" if version else " is not registered"))
        return await self._joined(docs, pointing)

    async def set_alias(self, name: str, alias: str, version: int, scope: TenantScope = EVERY_TENANT) -> Version | None:
        """Point `alias` at a version and return that version; remove the alias when `version` is 0.

        Raises:
            NotFound: no such version. ResourceExhausted: the registry is full, or its room is for others.
        """
        rules.check_name(name)
        rules.check_alias(alias)
        rules.check_version(version)
        if version == 0:
            with translated(f"removing alias {alias} of model {name}"):
                await self._collections.aliases.delete_one({"_id": f"{name}/{alias}"})
            return None
        pointer: Document = {"name": name, "alias": alias, "version": version, **_owner(scope)}

        async def work(session: AsyncClientSession) -> Document | None:
            # The write to the version conflicts with a concurrent removal: no alias can dangle.
            touched = {"$set": {"aliased_at": self._clock()}}
            doc = await self._collections.models.find_one_and_update(_key(name, version), touched, session=session)
            if doc is not None:
                key = {"_id": f"{name}/{alias}"}
                if await self._collections.aliases.find_one(key, session=session) is None:
                    await self._check_room(scope.tenant or "", [{**key, **pointer}])
                await self._collections.aliases.replace_one(key, pointer, upsert=True, session=session)
            return doc

        with translated(f"pointing alias {alias} of model {name}"):
            async with self._insert_turns.take(scope.tenant or ""):
                doc = await uninterrupted(transaction(self._collections, work))
        if doc is None:
            raise NotFound(f"model {name} has no version {version}")
        with translated(f"reading the aliases of model {name}"):
            return await self._with_aliases(doc)

    async def _check_content(self, name: str, files: tuple[File, ...], scope: TenantScope) -> None:
        """Check that the caller may register a model with such files.

        Raises:
            PermissionDenied: it may run code or reach other addresses, or it calls a model that the caller may not.
        """
        config, content = model_code.config_of(files), None
        is_readable = config is None or config.size <= model_code.CONFIG_BYTES
        if config is not None and is_readable:
            _, chunks = await self._artifacts.reader.read(config.sha256, 0)
            content = b"".join([chunk async for chunk in chunks])
        async with self._config_turns.take(scope.tenant or ""):
            found = await uninterrupted(asyncio.to_thread(model_code.content_of, files, content))
        if not is_readable or found.has_code:
            scope.check(REGISTER_WITH_CODE, name)
        # A grant for an ensemble covers the models that it calls.
        for called in found.called:
            scope.check(MODEL_INFER, called)

    async def _stored(self, files: tuple[File, ...], scope: TenantScope) -> tuple[File, ...]:
        """Return the files with the sizes of their artifacts. A size of 0 in the request is not checked."""
        found = await self._artifacts.find({file.sha256 for file in files}, scope)
        for file in files:
            if (artifact := found.get(file.sha256)) is None:
                raise NotFound(f"file {brief(file.path)}: artifact {file.sha256} is not stored: upload it first")
            if file.size not in (0, artifact.size):
                raise InvalidArgument(
                    f"file {brief(file.path)}: size_bytes is {file.size}, its artifact's {artifact.size}"
                )
        return tuple(File(file.path, file.sha256, found[file.sha256].size) for file in files)

    async def _insert(self, docs: Sequence[Document]) -> list[Document | None]:
        """Insert the documents, all or none. Return for each None, or the existing version of the same content."""
        name, models = docs[0]["name"], self._collections.models

        async def work(session: AsyncClientSession) -> list[Document | None]:
            query = {"_id": {"$in": [doc["_id"] for doc in docs]}}
            existing = {doc["_id"]: doc async for doc in models.find(query, session=session)}
            for doc in docs:
                if doc["_id"] in existing and existing[doc["_id"]]["content_digest"] != doc["content_digest"]:
                    raise _taken(name, doc["version"])
            new = [doc for doc in docs if doc["_id"] not in existing]
            await self._check_room(new[0].get("tenant", "") if new else "", new)
            digests = {file["sha256"] for doc in new for file in doc["files"]}
            # The write to the artifacts conflicts with a concurrent collection of one of them.
            if new and not await self._artifacts.touch(digests, session):
                raise NotFound("an artifact has just been collected, because nothing referred to it: upload it again")
            for doc in new:
                await models.insert_one(doc, session=session)
            return [existing.get(doc["_id"]) for doc in docs]

        for _ in range(_NUMBER_ATTEMPTS):
            try:
                return await transaction(self._collections, work)
            except DuplicateKeyError:
                # Another push has registered one of the numbers since the transaction began: read it.
                continue
        raise _overtaken(name)

    async def _insert_next(self, doc: Document) -> list[Document | None]:
        """Insert `doc` under the next number, as `_insert`; or return the newest version if its content is equal."""
        for _ in range(_NUMBER_ATTEMPTS):
            newest = await self._collections.models.find_one({"name": doc["name"]}, sort=[("version", DESCENDING)])
            if newest and newest["content_digest"] == doc["content_digest"]:
                return [newest]
            version = newest["version"] + 1 if newest else 1
            if version > rules.MAX_VERSION:
                raise FailedPrecondition(f"model {doc['name']} has no number left: remove version {version - 1}")
            doc.update(_key(doc["name"], version), version=version)
            try:
                return await self._insert([doc])
            except AlreadyExists:
                # Another push took the number between our read and our write.
                continue
        raise _overtaken(doc["name"])

    async def _check_room(self, tenant: str, new: Sequence[Document]) -> None:
        """Check that versions or aliases of `tenant` (empty: of none) fit. Raises ResourceExhausted."""
        if not new:
            return
        held: Counter[str] = Counter()
        for collection in (self._collections.models, self._collections.aliases):
            async for of_tenant in await collection.aggregate(_BYTES_BY_TENANT):
                held[of_tenant["_id"]] += of_tenant["bytes"]
        size, free = sum(len(encode(doc)) for doc in new), self._max_bytes - held.total()
        if size > free or (tenant and not leaves_room(held[tenant], size, free)):
            whose = f"{held[tenant]} of them are of this tenant, which may hold twice what is free; " if tenant else ""
            raise ResourceExhausted(
                f"the registry holds {held.total()} of {self._max_bytes} bytes (SHOAL_STORE_REGISTRY_BYTES); {whose}"
                f"the push needs {size}: remove versions or aliases, or push fewer files"
            )

    async def _joined(self, docs: Sequence[Document], aliases: Sequence[Document]) -> list[Version]:
        pointing: dict[tuple[str, int], list[str]] = {}
        for alias in aliases:
            pointing.setdefault((alias["name"], alias["version"]), []).append(alias["alias"])
        each = self._pauses.each(docs, every=_PAUSED_AFTER, weight=lambda doc: _OF_A_VERSION + len(doc["files"]))
        return [_version(doc, pointing.get((doc["name"], doc["version"]), [])) async for doc in each]

    async def _with_aliases(self, doc: Document) -> Version:
        query = {"name": doc["name"], "version": doc["version"]}
        return _version(doc, [alias["alias"] async for alias in self._collections.aliases.find(query)])

    async def _in_transaction(self, doing: str, work: Callable[[AsyncClientSession], Awaitable[T]]) -> T:
        """Run `work` in one transaction, possibly more than once."""
        with translated(doing):
            return await transaction(self._collections, work)


def _check_together(drafts: Sequence[Draft]) -> None:
    """Check that the drafts are different versions of one model. Raises InvalidArgument otherwise."""
    for at, draft in enumerate(drafts):
        rules.check_name(draft.name, f"others[{at - 1}].name" if at else "model.name")
        rules.check_version(draft.version)
        if draft.name != drafts[0].name:
            raise InvalidArgument(f"others[{at - 1}].name: expected {drafts[0].name}, as model.name; got {draft.name}")
    numbers = [draft.version for draft in drafts]
    if len(numbers) > 1 and (0 in numbers or len(set(numbers)) < len(numbers)):
        raise InvalidArgument(f"version: several versions need a number each, got {', '.join(map(str, numbers))}")


def _taken(name: str, version: int) -> AlreadyExists:
    return AlreadyExists(
        f"version {version} of model {name} exists with other content, and versions are immutable: register it under "
        "another version, or 0 for the next"
    )


def _overtaken(name: str) -> Aborted:
    return Aborted(f"model {name}: {_NUMBER_ATTEMPTS} other pushes came first: try again")


def _owner(scope: TenantScope) -> Document:
    """Return the field of the tenant whose share of the registry a document takes; none for callers without one."""
    return {"tenant": scope.tenant} if scope.tenant else {}


def _key(name: str, version: int) -> Document:
    return {"_id": f"{name}/{version}"}


def _version(doc: Document, aliases: list[str]) -> Version:
    return Version(
        name=doc["name"],
        version=doc["version"],
        files=tuple(File(**file) for file in doc["files"]),
        content_digest=doc["content_digest"],
        created_at=doc["created_at"],
        labels=tuple((label["key"], label["value"]) for label in doc["labels"]),
        aliases=tuple(sorted(aliases)),
        tenant=doc.get("tenant", ""),
    )
