"""How a job lies in MongoDB: its document, the updates between two of its states, the indexes, the validator.

Collection `jobs`: one document a job. Three optional fields say who cares for it, and each has a sparse index, so that
the millions that have ended weigh nothing:

    due_at    it waits in its lane (`lane.py`): whoever claims it first after then has it
    lease     somebody works on it, until lease.expires_at
    neither   it has ended

Collection `payloads`: where requests are that are too large to be scanned along (`intake/payloads.py`), written before
their job.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING
from datetime import UTC, datetime
from typing import Any

import bson
from pymongo import ASCENDING, DESCENDING, DeleteOne, IndexModel, UpdateMany, UpdateOne

from mesh.mongo import Document
from services.ingest.job import DEAD_LETTERS, TRANSITIONS_KEPT, End, Job, Lease, State
from services.ingest.job_fields import FIELDS, REQUEST, TRANSITIONS, encode_end, encode_lease, encode_step, properties

JOBS = "jobs"
PAYLOADS = "payloads"
RESTORES = "restores"
"""The store's: has a document while a backup is being restored into this database, jobs last."""

EVER = datetime(1970, 1, 1, tzinfo=UTC)
"""Before everything: `{"$gt": EVER}` asks that a time is set, in a way that an index can answer."""

WAITING: Mapping[str, Any] = {"lane": {"$gt": ""}, "due_at": {"$gt": EVER}}
"""The jobs that wait, as the index `lanes` has them: with both, it answers alone."""

EACH_LANE: Sequence[Document] = (
    {"$sort": {"lane": 1, "due_at": 1, "_id": 1}},
    {"$group": {"_id": "$lane", "due_at": {"$first": "$due_at"}}},
)
"""After a `$match` of some of these, with the index `lanes` as the hint: each lane (`_id`) with its earliest due time.
Written so, MongoDB skips from lane to lane, however many jobs wait in each."""

LIGHT: Mapping[str, int] = {"request": 0}
"""Projection for everything but running a job."""

_IS_DEAD_LETTER = {"state": {"$in": sorted(map(str, DEAD_LETTERS))}}

# The planner uses a partial index only for a query that surely stays within it: `$exists: True` follows from any
# comparison with a time. The claim index holds the id, so that looking for jobs reads no documents.
INDEXES = (
    IndexModel(
        [("lane", ASCENDING), ("due_at", ASCENDING), ("_id", ASCENDING)],
        name="lanes",
        partialFilterExpression={"due_at": {"$exists": True}},
    ),
    IndexModel(
        [("lease.expires_at", ASCENDING)],
        name="leased",
        partialFilterExpression={"lease.expires_at": {"$exists": True}},
    ),
    IndexModel(
        [("deadline", ASCENDING)],
        name="waiting_deadline",
        partialFilterExpression={"deadline": {"$exists": True}, "due_at": {"$exists": True}},
    ),
    IndexModel(
        [("tenant", ASCENDING), ("key", ASCENDING)],
        name="idempotency",
        unique=True,
        partialFilterExpression={"key": {"$exists": True}},
    ),
    # Whom the end of a job concerns, or would if it were requeued, and all that wait for others: of most jobs none of
    # these indexes knows anything.
    IndexModel([("waits_for", ASCENDING)], name="dependents", partialFilterExpression={"waits_for": {"$exists": True}}),
    IndexModel([("unmet", ASCENDING)], name="failed_dependents", partialFilterExpression={"unmet": {"$exists": True}}),
    IndexModel(
        [("state", ASCENDING), ("_id", ASCENDING)],
        name="all_dependents",
        partialFilterExpression={"waits_for": {"$exists": True}},
    ),
    IndexModel(
        [("lane", ASCENDING)],
        name="dependents_by_lane",
        partialFilterExpression={"waits_for": {"$exists": True}},
    ),
    IndexModel([("state", ASCENDING), ("_id", DESCENDING)], name="by_state"),
    IndexModel([("model_name", ASCENDING), ("_id", DESCENDING)], name="by_model"),
    IndexModel([("tenant", ASCENDING), ("_id", DESCENDING)], name="by_tenant"),
    IndexModel(
        [("state", ASCENDING), ("tenant", ASCENDING), ("_id", DESCENDING)],
        name="dead_by_tenant",
        partialFilterExpression=_IS_DEAD_LETTER,
    ),
    IndexModel(
        [("state", ASCENDING), ("model_name", ASCENDING), ("_id", DESCENDING)],
        name="dead_by_model",
        partialFilterExpression=_IS_DEAD_LETTER,
    ),
)

VALIDATOR: Mapping[str, Any] = {
    "$jsonSchema": {
        "bsonType": "object",
        "required": ["_id", "state", "model_name", "tenant", "attempts", "policy", "submitted_at", "transitions"],
        "properties": {**properties(), "lane": {"bsonType": "string"}},
    }
}

PAYLOAD_VALIDATOR: Mapping[str, Any] = {
    "$jsonSchema": {
        "bsonType": "object",
        "required": ["_id"],
        "oneOf": [{"required": ["request"]}, {"required": ["artifact"]}],
        "properties": {
            "_id": {"bsonType": "string"},
            "request": {"bsonType": "binData"},
            "artifact": {"bsonType": "string", "pattern": "^[0-9a-f]{64}$"},
        },
    }
}


_ALWAYS = tuple((f.name, f.stored_name, f.codec.encode) for f in FIELDS if f.is_always_stored)
# The request is stored, removed and left out in ways of its own, and so is the history.
_SPARSE = tuple((f.name, f.default) for f in FIELDS if not f.is_always_stored and f.name != REQUEST)
_WRITTEN = {f.name: (f.stored_name, f.codec.encode) for f in FIELDS if f.name not in (REQUEST, TRANSITIONS)}
_READ = {f.stored_name: (f.name, f.codec.decode) for f in FIELDS}
_DEFAULTS = {f.name: f.default for f in FIELDS if f.default is not MISSING}


def document_of(job: Job) -> Document:
    """Return the document of a job that was just submitted, with its request unless that is kept apart."""
    values = vars(job)
    document: Document = {
        stored: values[name] if encode is None else encode(values[name]) for name, stored, encode in _ALWAYS
    }
    for name, default in _SPARSE:
        value = values[name]
        # Most fields have the default object itself: the identity test settles these at once.
        if value is not default and value != default:
            stored, encode = _WRITTEN[name]
            document[stored] = value if encode is None else encode(value)
    document["lane"] = job.lane.text
    if job.request is not None and not job.is_apart:
        document[REQUEST] = job.request
    return document


def job_of(document: Mapping[str, Any]) -> Job:
    """Return the job in a document; fields that a projection left out have their defaults."""
    values = _DEFAULTS.copy()
    for stored, value in document.items():
        # Documents have fields that are none of a job's: its lane, and those of later versions.
        if value is not None and (known := _READ.get(stored)) is not None:
            name, decode = known
            values[name] = value if decode is None else decode(value)
    if "steps" not in document:
        values["steps"] = len(values[TRANSITIONS])
    return Job.of(values)


def fenced_updates(changes: Sequence[tuple[Job, Job]]) -> list[UpdateOne | UpdateMany]:
    """The writes that turn each `before` into its `after`, for the holder of `before`'s lease and for nobody else.

    Jobs of one lease and attempt to which the same happens are one write together.
    """
    alike: dict[tuple[str, int, bytes], tuple[dict[str, Any], list[str]]] = {}
    for before, after in changes:
        assert before.lease is not None
        update = difference(before, after)
        alike.setdefault((before.lease.id, before.attempts, bson.encode(update)), (update, []))[1].append(before.id)
    return [
        UpdateOne({"_id": ids[0], "lease.id": lease, "attempts": attempts}, update)
        if len(ids) == 1
        else UpdateMany({"_id": {"$in": ids}, "lease.id": lease, "attempts": attempts}, update)
        for (lease, attempts, _), (update, ids) in alike.items()
    ]


def requeueing(before: Job, after: Job) -> UpdateOne:
    """The write that requeues a dead letter, unless somebody else did, or removed it."""
    return UpdateOne(_unchanged(before), difference(before, after))


def purging(letter: Job) -> DeleteOne:
    """The write that removes a dead letter, unless somebody requeued it."""
    return DeleteOne(_unchanged(letter))


def _unchanged(job: Job) -> Document:
    return {"_id": job.id, "state": str(job.state), "steps": job.steps}


def difference(before: Job, after: Job) -> dict[str, Any]:
    """Return the update operators from `before` to `after`: the fields that differ, and the transition that was added.

    What is None or empty in `after` is unset.
    """
    set_: Document = {}
    unset: dict[str, str] = {}
    old = vars(before)
    for name, value in vars(after).items():
        # Most fields have the same object in both.
        if value is old[name] or value == old[name] or name not in _WRITTEN:
            continue
        stored, encode = _WRITTEN[name]
        if value is None or value == ():
            unset[stored] = ""
        else:
            set_[stored] = value if encode is None else encode(value)
    if not after.keeps_request:
        unset[REQUEST] = ""
    update: dict[str, Any] = {"$set": set_}
    if unset:
        update["$unset"] = unset
    if after.transitions and after.transitions[-1:] != before.transitions[-1:]:
        steps = {"$each": [encode_step(after.transitions[-1])], "$slice": -TRANSITIONS_KEPT}
        update["$push"] = {TRANSITIONS: steps}
    return update


def claiming(lease: Lease, now: datetime) -> list[Document]:
    """An update pipeline that does to each matched document what `job.claim` does to a job."""
    step = {
        "state": str(State.RUNNING),
        "at": now,
        "attempt": {"$add": ["$attempts", 1]},
        "instance": {"$literal": lease.owner},
        "reason": "claimed",
    }
    steps = {"$slice": [{"$concatArrays": ["$transitions", [step]]}, -TRANSITIONS_KEPT]}
    set_ = {
        "state": str(State.RUNNING),
        "attempts": {"$add": ["$attempts", 1]},
        "updated_at": now,
        "lease": {"$literal": encode_lease(lease)},
        "transitions": steps,
        "steps": {"$add": [{"$ifNull": ["$steps", {"$size": "$transitions"}]}, 1]},
    }
    return [{"$set": set_}, {"$unset": "due_at"}]


def taking_over(lease: Lease, cancel_reason: str | None = None) -> Document:
    """An update that does to each matched document what `job.take_over` does to a job."""
    set_: Document = {"lease": encode_lease(lease)}
    if cancel_reason is not None:
        set_["cancel"] = {"reason": cancel_reason}
    return {"$set": set_, "$unset": {"due_at": ""}}


def unleased(job: Job) -> Document:
    """The filter of a write about a job that nobody works on, as it was read."""
    return {"_id": job.id, "steps": job.steps, "lease": {"$exists": False}, "waits_for": {"$exists": True}}


def dooming(lease: Lease, how: End, unmet: Sequence[str]) -> Document:
    """An update that takes a job over, to end it so: whoever finds it after that does the same.

    `unmet` is what of its dependencies has not succeeded by then; without any it stays as it was.
    """
    set_: Document = {"lease": encode_lease(lease), "doom": encode_end(how)}
    if unmet:
        set_["waits_for"] = list(unmet)
    return {"$set": set_}
