"""The store's collections: their schemas, their indexes, and the door to them that opens once both are made.

artifacts  {_id: digest, size, created_at, damaged?}
models     {_id: "name/version", name, version, files: [{path, sha256, size}], content_digest, labels: [{key, value}]}
aliases    {_id: "name/alias", name, alias, version}
results    {_id: job id, outcome, ..., recorded_at, response: bytes | blob: {key, size, sha256}}
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, TypeAlias

from pymongo import ASCENDING, DESCENDING, IndexModel
from pymongo.asynchronous.collection import AsyncCollection
from pymongo.asynchronous.database import AsyncDatabase

from mesh.mongo import Document, ensure_collection
from shoal.errors import Unavailable

Collection: TypeAlias = AsyncCollection[Document]

_TEXT = {"bsonType": "string"}
_NAME = {"bsonType": "string", "minLength": 1}
_DIGEST = {"bsonType": "string", "pattern": "^[0-9a-f]{64}$"}
_SIZE = {"bsonType": ["int", "long"], "minimum": 0}
_VERSION = {"bsonType": ["int", "long"], "minimum": 1}
_DATE = {"bsonType": "date"}


def _schema(required: Mapping[str, Any], optional: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A closed object: what is not named here is a mistake."""
    properties = {**required, **(optional or {})}
    return {
        "bsonType": "object",
        "required": list(required),
        "properties": properties,
        "additionalProperties": False,
    }


_FILE = _schema({"path": _NAME, "sha256": _DIGEST, "size": _SIZE})
_LABEL = _schema({"key": _NAME, "value": _TEXT})
_BLOB = _schema({"key": _NAME, "size": _SIZE, "sha256": _DIGEST})

ARTIFACTS = _schema({"_id": _DIGEST, "size": _SIZE, "created_at": _DATE}, {"damaged": {"bsonType": "bool"}})
MODELS = _schema(
    {
        "_id": _NAME,
        "name": _NAME,
        "version": _VERSION,
        "files": {"bsonType": "array", "minItems": 1, "items": _FILE},
        "content_digest": _DIGEST,
        "created_at": _DATE,
        "labels": {"bsonType": "array", "items": _LABEL},
    },
    # Written only so that pointing an alias at a version and removing that version cannot both succeed.
    {"aliased_at": _DATE},
)
ALIASES = _schema({"_id": _NAME, "name": _NAME, "alias": _NAME, "version": _VERSION})
RESULTS = _schema(
    {
        "_id": {"bsonType": "string", "minLength": 1, "maxLength": 64},
        "outcome": {"bsonType": ["int", "long"], "minimum": 1},
        "model_name": _TEXT,
        "model_version": _TEXT,
        "code": {"bsonType": ["int", "long"]},
        "message": _TEXT,
        "attempt": _SIZE,
        "lease_id": _TEXT,
        "tenant": _TEXT,
        "instance": _TEXT,
        "recorded_at": _DATE,
    },
    {
        "submitted_at": _DATE,
        # Below the millisecond that a BSON date holds: what was put is what is read.
        "submitted_ns": {"bsonType": ["int", "long"], "minimum": 0, "maximum": 999_999},
        "response": {"bsonType": "binData"},
        "blob": _BLOB,
        # Of later ones than the first only: `results/generations.py`.
        "generation": {"bsonType": ["int", "long"], "minimum": 2},
    },
)

_NEWEST = [("recorded_at", DESCENDING), ("_id", DESCENDING)]
RESULT_INDEXES = [
    IndexModel(_NEWEST, name="newest"),
    IndexModel([("model_name", ASCENDING), *_NEWEST], name="model_newest"),
    IndexModel([("tenant", ASCENDING), *_NEWEST], name="tenant_newest"),
    # Most results succeeded: those are found soon by `newest`. The rest are few, and cost a success nothing here.
    IndexModel(
        [("outcome", ASCENDING), *_NEWEST], name="failed_newest", partialFilterExpression={"outcome": {"$gt": 1}}
    ),
]
_BY_VERSION = [("name", ASCENDING), ("version", ASCENDING)]


class Collections:
    """The collections, once `prepare` has made them. Until then, asking for one raises Unavailable."""

    def __init__(self, db: AsyncDatabase[Document]) -> None:
        self.db = db
        self._made: dict[str, Collection] = {}

    async def prepare(self) -> None:
        """Makes what is missing. Safe beside other instances that do the same.

        Raises:
            Unavailable: MongoDB is away.
            FailedPrecondition: an index there contradicts ours.
        """
        db = self.db
        made = {
            "artifacts": await ensure_collection(db, "artifacts", validator=_validator(ARTIFACTS), indexes=[]),
            "models": await ensure_collection(
                db,
                "models",
                validator=_validator(MODELS),
                indexes=[IndexModel(_BY_VERSION, name="versions", unique=True)],
            ),
            "aliases": await ensure_collection(
                db, "aliases", validator=_validator(ALIASES), indexes=[IndexModel(_BY_VERSION, name="versions")]
            ),
            "results": await ensure_collection(db, "results", validator=_validator(RESULTS), indexes=RESULT_INDEXES),
        }
        self._made = made

    @property
    def artifacts(self) -> Collection:
        return self._get("artifacts")

    @property
    def models(self) -> Collection:
        return self._get("models")

    @property
    def aliases(self) -> Collection:
        return self._get("aliases")

    @property
    def results(self) -> Collection:
        return self._get("results")

    def _get(self, name: str) -> Collection:
        if name not in self._made:
            raise Unavailable("the store is starting: it has not reached MongoDB yet: retry in a moment")
        return self._made[name]


def whole_milliseconds(time: datetime) -> datetime:
    """`time` as a document keeps it: what a write answers is what a read answers."""
    return time.replace(microsecond=time.microsecond // 1_000 * 1_000)


def _validator(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"$jsonSchema": dict(schema)}
