"""The store's MongoDB collections: schemas, indexes, and access to the collections once they are prepared.

artifacts  {_id: digest, size, created_at, keep_until, key, block_bytes, blocks, tenants?, damaged?, condemned_at?,
            referred_at?}
references {_id: name of the user, digest, made_at, tenant?, size?}: users other than models, and the tenant charged
retention  {_id: kind or kind/tenant, kept, tenant?, keep_ms?, updated_at}
fences     {_id: "retention", token?, rules, acts}; {_id: answers/tenant, recorded_at, job_id}: answers removed so far
usage      {_id: tenant, results, bytes, payloads?, payload_bytes?, recounts, recounted_at}
usage_changes {_id, tenant, payloads, payload_bytes}: changes that `usage` does not include yet
quotas     {_id: "*" or =tenant, tenant?, bytes, updated_at}
graves     {_id: key of a blob whose deletion is pending, buried_at}
holds      {_id: a running backup, expires_at}: no blob is removed
exports    {_id: a location, export, call, expires_at}: the export that writes there
restores   {_id: a backup that is being restored here, began_at}: no garbage collection
leads      {_id: "store", holder, token, expires_at}: the leader lease (mesh/mongo_lease.py)
removals   {_id: "results", at, asked?}: the time by which removal is decided (mesh/removal_guard.py)
models     {_id: "name/version", name, version, files: [{path, sha256, size}], content_digest, labels: [{key, value}],
            tenant?: whose share of the registry it takes}
aliases    {_id: "name/alias", name, alias, version, tenant?}
results    {_id: job id, outcome, ..., recorded_at, labels?, response: bytes | blob: {key, size, sha256}}
audit      {_id: "writer/number", at, kind, ..., hash}: entries of the audit log (audit/entries.py)
audit_anchors {_id: number, sha256, at}: anchors of the audit log, whose content is a blob (audit/anchors.py)
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, TypeAlias

from bson.codec_options import DatetimeConversion
from pymongo import ASCENDING, DESCENDING, IndexModel
from pymongo.asynchronous.collection import AsyncCollection
from pymongo.asynchronous.database import AsyncDatabase

from mesh.mongo import Document, build_later_indexes, ensure_collection
from mesh.mongo_lease import LEASE_VALIDATOR, LEASES
from mesh.removal_guard import MARK_VALIDATOR, MARKS
from shoal.errors import Unavailable

Collection: TypeAlias = AsyncCollection[Document]

RESTORES = "restores"
"""Collection that has a document while a backup is being restored. Ingest reads it too, under this name."""

_TEXT = {"bsonType": "string"}
_NAME = {"bsonType": "string", "minLength": 1}
_DIGEST = {"bsonType": "string", "pattern": "^[0-9a-f]{64}$"}
_SIZE = {"bsonType": ["int", "long"], "minimum": 0}
_VERSION = {"bsonType": ["int", "long"], "minimum": 1}
_DATE = {"bsonType": "date"}


def _schema(required: Mapping[str, Any], optional: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the schema of a closed object: fields that it does not name are rejected."""
    properties = {**required, **(optional or {})}
    return {
        "bsonType": "object",
        "required": list(required),
        "properties": properties,
        "additionalProperties": False,
    }


_FILE = _schema({"path": _NAME, "sha256": _DIGEST, "size": _SIZE})
_LABEL = _schema({"key": _NAME, "value": _TEXT})
_RESULT_LABEL = _schema({"key": _TEXT, "value": _TEXT})
_BLOB = _schema({"key": _NAME, "size": _SIZE, "sha256": _DIGEST})

ARTIFACTS = _schema(
    {"_id": _DIGEST, "size": _SIZE, "created_at": _DATE},
    {
        "key": _NAME,
        "block_bytes": _SIZE,
        "blocks": {"bsonType": "binData"},
        "damaged": {"bsonType": "bool"},
        "keep_until": _DATE,
        "condemned_at": _DATE,
        # Written only so that referring to an artifact and collecting it cannot both succeed.
        "referred_at": _DATE,
        # Tenants whose callers have uploaded it. A service's upload has none.
        "tenants": {"bsonType": "array", "items": _TEXT},
    },
)
REFERENCES = _schema(
    {"_id": _NAME, "digest": _DIGEST, "made_at": _DATE},
    # Both or neither: the tenant charged, and the artifact's size. References of an older version charge no tenant.
    {"tenant": _TEXT, "size": _SIZE},
)
PENDING_DELETIONS = _schema({"_id": _NAME, "buried_at": _DATE})
HOLDS = _schema({"_id": _NAME, "expires_at": _DATE})
EXPORTS = _schema({"_id": _NAME, "export": _NAME, "call": _NAME, "expires_at": _DATE})
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
    # `aliased_at`: written only so that pointing an alias at a version and removing that version cannot both succeed.
    {"aliased_at": _DATE, "tenant": _NAME},
)
ALIASES = _schema({"_id": _NAME, "name": _NAME, "alias": _NAME, "version": _VERSION}, {"tenant": _NAME})
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
        # The part below the millisecond, which a BSON date lacks: a result reads back exactly.
        "submitted_ns": {"bsonType": ["int", "long"], "minimum": 0, "maximum": 999_999},
        "labels": {"bsonType": "array", "minItems": 1, "items": _RESULT_LABEL},
        "response": {"bsonType": "binData"},
        "blob": _BLOB,
        # Only for generations after the first: `results/generations.py`.
        "generation": {"bsonType": ["int", "long"], "minimum": 2},
        # Time at which retention removed the answer.
        "answer_removed_at": _DATE,
    },
)
# Remainder of a result that retention has removed: `results/tombstones.py`.
TOMBSTONES = _schema(
    {
        "_id": RESULTS["properties"]["_id"],
        "outcome": RESULTS["properties"]["outcome"],
        "code": {"bsonType": ["int", "long"]},
        "attempt": _SIZE,
        "stood_at": _DATE,
        "removed_at": _DATE,
    },
    # Tombstones of an older version have no tenant.
    {"generation": RESULTS["properties"]["generation"], "tenant": _TEXT},
)
RETENTION = _schema(
    {"_id": _NAME, "kept": _NAME, "updated_at": _DATE},
    {"tenant": _TEXT, "keep_ms": {"bsonType": ["int", "long"], "minimum": 1}},
)
USAGE = _schema(
    {
        "_id": _TEXT,
        "results": {"bsonType": ["int", "long"]},
        "bytes": {"bsonType": ["int", "long"]},
        "recounts": _SIZE,
        "recounted_at": _DATE,
    },
    # An older version counted results only.
    {"payloads": {"bsonType": ["int", "long"]}, "payload_bytes": {"bsonType": ["int", "long"]}},
)
USAGE_CHANGES = _schema(
    {
        "_id": {"bsonType": "objectId"},
        "tenant": _TEXT,
        "payloads": {"bsonType": ["int", "long"]},
        "payload_bytes": {"bsonType": ["int", "long"]},
    }
)
QUOTAS = _schema({"_id": _NAME, "bytes": _SIZE, "updated_at": _DATE}, {"tenant": _TEXT})
FENCES = _schema(
    {"_id": _NAME},
    # `etcd`: only in a fence of an older version.
    {"token": _SIZE, "etcd": _TEXT, "rules": _SIZE, "acts": _SIZE, "recorded_at": _DATE, "job_id": _NAME},
)
# Written by `audit/entries.py`, which checks the other fields.
AUDIT = {
    "bsonType": "object",
    "required": ["_id", "at", "kind", "hash"],
    "properties": {"_id": _NAME, "at": _DATE, "kind": _NAME, "hash": _DIGEST},
}
AUDIT_ANCHORS = _schema({"_id": _VERSION, "sha256": _DIGEST, "at": _DATE})

EARLIEST = datetime(1, 1, 1, tzinfo=UTC)
"""Lower bound of all times: `{"$gte": EARLIEST}` demands a time, in a way that an index can serve."""

_NEWEST = [("recorded_at", DESCENDING), ("_id", DESCENDING)]
# Filtered in the index, not searched by: only matching documents are read.
_COVERED = [(field, ASCENDING) for field in ("tenant", "model_name", "model_version", "outcome")]
_RECORDED = {"recorded_at": {"$exists": True}}


def _newest(name: str, *first: str, among: Mapping[str, Any] = _RECORDED) -> IndexModel:
    """Return an index by the fields `first`, then by time."""
    keys = [(field, ASCENDING) for field in first] + _NEWEST + [field for field in _COVERED if field[0] not in first]
    return IndexModel(keys, name=name, partialFilterExpression=dict(among))


_RESULT_INDEXES = [
    _newest("by_time"),
    _newest("by_tenant", "tenant"),
    # Not for queries: garbage collection looks up whether a blob belongs to a result.
    IndexModel("blob.key", name="by_blob", partialFilterExpression={"blob.key": {"$exists": True}}),
    IndexModel("removed_at", name="removed", partialFilterExpression={"removed_at": {"$exists": True}}),
]
# Only make queries faster, and no query names them as its hint: built while the store serves.
_LATER_RESULT_INDEXES = [
    _newest("by_model", "model_name"),
    # Most results succeeded; an index by time finds those soon. Failures are few, so this index costs a success
    # nothing. Likewise a result without labels costs the index of labels nothing.
    _newest("by_failure", "outcome", among={**_RECORDED, "outcome": {"$gt": 1}}),
    _newest("by_label", "labels", among={"labels": {"$exists": True}}),
]
_RETIRED_RESULT_INDEXES = ("newest", "model_newest", "tenant_newest", "failed_newest", "by_batch")
REFERENCE_INDEXES = [
    IndexModel("digest", name="by_digest"),
    IndexModel(
        [("tenant", ASCENDING), ("size", ASCENDING)],
        name="by_tenant",
        partialFilterExpression={"tenant": {"$exists": True}},
    ),
]
USAGE_INDEXES = [IndexModel("bytes", name="by_bytes"), IndexModel("recounted_at", name="by_recount")]
ARTIFACT_INDEXES = [
    IndexModel("size", name="by_size"),
    IndexModel("keep_until", name="by_keeping"),
    IndexModel("condemned_at", name="condemned", partialFilterExpression={"condemned_at": {"$exists": True}}),
]
_BY_VERSION = [("name", ASCENDING), ("version", ASCENDING)]


class Collections:
    """The collections. Until `prepare` has made them, access to one raises Unavailable."""

    def __init__(self, db: AsyncDatabase[Document]) -> None:
        self.db = db
        self._prepared: dict[str, Collection] = {}

    async def prepare(self) -> None:
        """Make the missing collections and indexes. Safe beside other instances that do the same.

        Raises:
            Unavailable: MongoDB is unavailable.
            FailedPrecondition: an existing index contradicts ours.
        """
        db = self.db
        prepared = {
            "artifacts": await ensure_collection(
                db, "artifacts", validator=_validator(ARTIFACTS), indexes=ARTIFACT_INDEXES
            ),
            "references": await ensure_collection(
                db, "references", validator=_validator(REFERENCES), indexes=REFERENCE_INDEXES
            ),
            "graves": await ensure_collection(
                db, "graves", validator=_validator(PENDING_DELETIONS), indexes=[IndexModel("buried_at", name="oldest")]
            ),
            "holds": await ensure_collection(db, "holds", validator=_validator(HOLDS), indexes=[]),
            "exports": await ensure_collection(db, "exports", validator=_validator(EXPORTS), indexes=[]),
            "models": await ensure_collection(
                db,
                "models",
                validator=_validator(MODELS),
                indexes=[
                    IndexModel(_BY_VERSION, name="versions", unique=True),
                    IndexModel("files.sha256", name="by_file"),
                ],
            ),
            "aliases": await ensure_collection(
                db, "aliases", validator=_validator(ALIASES), indexes=[IndexModel(_BY_VERSION, name="versions")]
            ),
            "results": await ensure_collection(
                db, "results", validator=_validator(RESULTS, TOMBSTONES), indexes=_RESULT_INDEXES
            ),
            "retention": await ensure_collection(db, "retention", validator=_validator(RETENTION), indexes=[]),
            "usage": await ensure_collection(db, "usage", validator=_validator(USAGE), indexes=USAGE_INDEXES),
            "usage_changes": await ensure_collection(
                db,
                "usage_changes",
                validator=_validator(USAGE_CHANGES),
                indexes=[IndexModel("tenant", name="by_tenant")],
            ),
            "quotas": await ensure_collection(db, "quotas", validator=_validator(QUOTAS), indexes=[]),
            "fences": await ensure_collection(db, "fences", validator=_validator(FENCES), indexes=[]),
            "audit": await ensure_collection(
                db,
                "audit",
                validator=_validator(AUDIT),
                indexes=[IndexModel([("at", ASCENDING), ("_id", ASCENDING)], name="by_time")],
            ),
            "audit_anchors": await ensure_collection(
                db, "audit_anchors", validator=_validator(AUDIT_ANCHORS), indexes=[]
            ),
        }
        # What somebody has written by hand must be readable, so that verification can name it.
        audit = prepared["audit"]
        lenient = audit.codec_options.with_options(
            datetime_conversion=DatetimeConversion.DATETIME_AUTO, unicode_decode_error_handler="replace"
        )
        prepared["audit"] = audit.with_options(codec_options=lenient)
        await ensure_collection(db, LEASES, validator=LEASE_VALIDATOR, indexes=[])
        await ensure_collection(db, MARKS, validator=MARK_VALIDATOR, indexes=[])
        self._prepared = prepared

    async def build_later_indexes(self) -> None:
        """Build the indexes that the store can do without, however often that fails."""
        await build_later_indexes(
            self.results,
            _LATER_RESULT_INDEXES,
            _RETIRED_RESULT_INDEXES,
            meanwhile="some queries of results are slow",
        )

    @property
    def artifacts(self) -> Collection:
        return self._get("artifacts")

    @property
    def references(self) -> Collection:
        return self._get("references")

    @property
    def retention(self) -> Collection:
        return self._get("retention")

    @property
    def usage(self) -> Collection:
        return self._get("usage")

    @property
    def usage_changes(self) -> Collection:
        return self._get("usage_changes")

    @property
    def quotas(self) -> Collection:
        return self._get("quotas")

    @property
    def fences(self) -> Collection:
        return self._get("fences")

    @property
    def pending_deletions(self) -> Collection:
        return self._get("graves")

    @property
    def holds(self) -> Collection:
        return self._get("holds")

    @property
    def exports(self) -> Collection:
        return self._get("exports")

    @property
    def models(self) -> Collection:
        return self._get("models")

    @property
    def aliases(self) -> Collection:
        return self._get("aliases")

    @property
    def results(self) -> Collection:
        return self._get("results")

    @property
    def audit(self) -> Collection:
        return self._get("audit")

    @property
    def audit_anchors(self) -> Collection:
        return self._get("audit_anchors")

    @property
    def is_prepared(self) -> bool:
        """True once the collections exist: MongoDB has been reached."""
        return bool(self._prepared)

    def _get(self, name: str) -> Collection:
        if name not in self._prepared:
            raise Unavailable("the store is starting: it has not reached MongoDB yet: retry in a moment")
        return self._prepared[name]


async def is_being_restored(collections: Collections) -> bool:
    """Return True while a restore is in progress or interrupted: documents may lack others that belong to them."""
    return await collections.db[RESTORES].find_one({}, {"_id": 1}) is not None


def whole_milliseconds(time: datetime) -> datetime:
    """Return `time` with the precision of a stored document, so that a write returns what a later read returns."""
    return time.replace(microsecond=time.microsecond // 1_000 * 1_000)


def _validator(*schemas: Mapping[str, Any]) -> dict[str, Any]:
    """Return a validator for documents that match one of the schemas."""
    return {"$jsonSchema": dict(schemas[0]) if len(schemas) == 1 else {"oneOf": list(map(dict, schemas))}}
