"""Jobs in MongoDB: the document of a job, the updates between two of its states, the indexes, the validator.

Collection `jobs`: one document per job. Two optional fields, each with a sparse index, distinguish live jobs, so that
millions of ended jobs cost nothing:

    due_at    the job waits in its tenant queue (`tenant_queue.py`) and may be claimed after that time
    lease     an instance works on the job, until lease.expires_at
    neither   the job has ended, or waits for other jobs (`waits_for`)

Collection `payloads`: references to requests that are too large for the job's document (`intake/payloads.py`). A
payload is written before its job.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING
from datetime import UTC, datetime
from typing import Any

import bson
from pymongo import ASCENDING, DESCENDING, DeleteOne, IndexModel, UpdateMany, UpdateOne

from mesh.mongo import Document
from services.ingest.job import TRANSITIONS_KEPT, End, Job, Lease, State
from services.ingest.job_fields import FIELDS, REQUEST, TRANSITIONS, encode_end, encode_lease, encode_step, properties

JOBS = "jobs"
PAYLOADS = "payloads"
RESTORES = "restores"
"""Collection of the store service: has a document while a backup is being restored here, which writes jobs last."""

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
"""Time before all others: `{"$gt": EPOCH}` matches documents in which a time is set, and can use an index."""

WAITING: Mapping[str, Any] = {"lane": {"$gt": ""}, "due_at": {"$gt": EPOCH}}
"""Query for the queued jobs. With both conditions the index `lanes` covers it."""

EACH_TENANT_QUEUE: Sequence[Document] = (
    {"$sort": {"lane": 1, "due_at": 1, "_id": 1}},
    {"$group": {"_id": "$lane", "due_at": {"$first": "$due_at"}}},
)
"""Pipeline stages after a `$match` on WAITING, with the index `lanes` as hint: each tenant queue (`_id`) with its
earliest due time. In this form MongoDB skips from queue to queue, however many jobs wait in each."""

WITHOUT_REQUEST: Mapping[str, int] = {"request": 0}
"""Projection without the request, for everything except running a job."""

LIGHT: Mapping[str, Any] = {**WITHOUT_REQUEST, "labels": 0, TRANSITIONS: {"$slice": -1}}
"""Projection for changes and removals of hundreds of jobs at a time: without labels, of the transitions the newest."""

# The planner uses a partial index only for a query that implies its condition: any comparison with a time implies
# `$exists: True`. The claim index holds the id, so that finding jobs reads no documents.
NEEDED_INDEXES = (
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
    # Jobs that wait for others, by dependency, and dead letters that would. Most jobs are in none of these indexes.
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
)
"""Indexes that the service needs before it serves: for correctness, or as hints of queries."""
LATER_INDEXES = (
    # The dependents of one job, in pages. Until it is built, the sweep of all dependents finds them.
    IndexModel(
        [("waits_for", ASCENDING), ("_id", ASCENDING)],
        name="dependents_of",
        partialFilterExpression={"waits_for": {"$exists": True}},
    ),
    # Lists (`job_scan.py`) and retention.
    IndexModel([("state", ASCENDING), ("_id", DESCENDING)], name="by_state"),
    IndexModel([("tenant", ASCENDING), ("state", ASCENDING), ("_id", DESCENDING)], name="by_tenant_state"),
    IndexModel([("model_name", ASCENDING), ("state", ASCENDING), ("_id", DESCENDING)], name="by_model_state"),
)
"""Indexes that only make queries faster: built while the service serves. No query may name them as its hint."""
INDEXES = (*NEEDED_INDEXES, *LATER_INDEXES)
RETIRED_INDEXES = ("dependents", "by_model", "by_tenant", "dead_by_tenant", "dead_by_model")
"""Indexes of earlier versions. They are dropped when all others exist."""

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
# The request and the transitions have their own code for storing, removing and leaving out.
_SPARSE = tuple((f.name, f.default) for f in FIELDS if not f.is_always_stored and f.name != REQUEST)
_WRITTEN = {f.name: (f.stored_name, f.codec.encode) for f in FIELDS if f.name not in (REQUEST, TRANSITIONS)}
_READ = {f.stored_name: (f.name, f.codec.decode) for f in FIELDS}
_DEFAULTS = {f.name: f.default for f in FIELDS if f.default is not MISSING}


def document_of(job: Job) -> Document:
    """Return the document of a new job, with its request unless that is stored outside (`is_apart`)."""
    values = vars(job)
    document: Document = {
        stored: values[name] if encode is None else encode(values[name]) for name, stored, encode in _ALWAYS
    }
    for name, default in _SPARSE:
        value = values[name]
        # Most fields hold the default object itself, for which the identity test suffices.
        if value is not default and value != default:
            stored, encode = _WRITTEN[name]
            document[stored] = value if encode is None else encode(value)
    document["lane"] = job.tenant_queue.text
    if job.request is not None and not job.is_apart:
        document[REQUEST] = job.request
    return document


def job_of(document: Mapping[str, Any]) -> Job:
    """Return the job in a document; fields that a projection left out have their defaults."""
    values = _DEFAULTS.copy()
    for stored, value in document.items():
        # A document also has fields that `Job` lacks: `lane`, and fields of later versions.
        if value is not None and (known := _READ.get(stored)) is not None:
            name, decode = known
            values[name] = value if decode is None else decode(value)
    # Documents of earlier versions have no count.
    if "steps" not in document:
        values["transition_count"] = len(values[TRANSITIONS])
    return Job.of(values)


def fenced_updates(changes: Sequence[tuple[Job, Job]]) -> list[UpdateOne | UpdateMany]:
    """Return the writes from each `before` to its `after`, which apply only while `before`'s lease holds the job.

    Jobs of one lease and attempt with equal updates share one write.
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
    """Return the write that requeues a dead letter, unless another client requeued or removed it."""
    return UpdateOne(_unchanged(before), difference(before, after))


def purging(letter: Job) -> DeleteOne:
    """Return the write that removes a dead letter, unless a client requeued it."""
    return DeleteOne(_unchanged(letter))


def _unchanged(job: Job) -> Document:
    return {"_id": job.id, "state": str(job.state), "steps": job.transition_count}


def difference(before: Job, after: Job) -> dict[str, Any]:
    """Return the update operators from `before` to `after`: the fields that differ, and the new transition.

    Fields that are None or empty in `after` are unset.
    """
    set_: Document = {}
    unset: dict[str, str] = {}
    old = vars(before)
    for name, value in vars(after).items():
        # Most fields hold the same object in both.
        if value is old[name] or value == old[name] or name not in _WRITTEN:
            continue
        stored, encode = _WRITTEN[name]
        if value is None or value == ():
            unset[stored] = ""
        else:
            set_[stored] = value if encode is None else encode(value)
    if not after.needs_request:
        unset[REQUEST] = ""
    update: dict[str, Any] = {"$set": set_}
    if unset:
        update["$unset"] = unset
    if after.transitions and after.transitions[-1:] != before.transitions[-1:]:
        # Fewer, where the transitions that were read had to give way (`HISTORY_CHARS`).
        grows = len(after.transitions) > len(before.transitions)
        kept = TRANSITIONS_KEPT if grows else len(after.transitions)
        steps = {"$each": [encode_step(after.transitions[-1])], "$slice": -kept}
        update["$push"] = {TRANSITIONS: steps}
    return update


def claiming(lease: Lease, now: datetime) -> list[Document]:
    """Return the update pipeline that does to each matched document what `job.claim` does to a job."""
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
    """Return the update that does to each matched document what `job.take_over` does to a job."""
    set_: Document = {"lease": encode_lease(lease)}
    if cancel_reason is not None:
        set_["cancel"] = {"reason": cancel_reason}
    return {"$set": set_, "$unset": {"due_at": ""}}


def unleased(job: Job) -> Document:
    """Return the filter of a write about a waiting job without a lease, unchanged since it was read."""
    return {"_id": job.id, "steps": job.transition_count, "lease": {"$exists": False}, "waits_for": {"$exists": True}}


def deciding_end(lease: Lease, how: End, unmet: Sequence[str]) -> Document:
    """Return the update that takes a job over and stores its decided end, which every later holder carries out.

    `unmet` are the dependencies that have not succeeded; empty: `waits_for` stays unchanged.
    """
    set_: Document = {"lease": encode_lease(lease), "doom": encode_end(how)}
    if unmet:
        set_["waits_for"] = list(unmet)
    return {"$set": set_}
