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
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import bson
from bson import Binary
from pymongo import ASCENDING, DESCENDING, DeleteOne, IndexModel, UpdateMany, UpdateOne

from mesh.mongo import Document
from services.ingest.job import DEAD_LETTERS, TRANSITIONS_KEPT, End, Job, Lease, Outcome, Policy, State, Transition

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
        "properties": {
            "_id": {"bsonType": "string", "minLength": 26, "maxLength": 26},
            "state": {"enum": [str(state) for state in State]},
            "model_name": {"bsonType": "string", "minLength": 1},
            "tenant": {"bsonType": "string"},
            "key": {"bsonType": "string", "minLength": 1},
            "attempts": {"bsonType": ["int", "long"], "minimum": 0},
            "lapses": {"bsonType": ["int", "long"], "minimum": 0},
            "generation": {"bsonType": ["int", "long"], "minimum": 1},
            "began_at": {"bsonType": "date"},
            "steps": {"bsonType": ["int", "long"], "minimum": 1},
            "submitted_at": {"bsonType": "date"},
            "lane": {"bsonType": "string"},
            "due_at": {"bsonType": "date"},
            "depends_on": {"bsonType": "array", "minItems": 1, "items": {"bsonType": "string"}},
            "waits_for": {"bsonType": "array", "minItems": 1, "items": {"bsonType": "string"}},
            "unmet": {"bsonType": "array", "minItems": 1, "items": {"bsonType": "string"}},
            "deadline": {"bsonType": "date"},
            "lease": {"bsonType": "object", "required": ["id", "owner", "expires_at"]},
            "transitions": {"bsonType": "array", "minItems": 1},
        },
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


def document_of(job: Job) -> Document:
    """The document of a job that was just submitted, with its request unless that is kept apart."""
    document: Document = {
        "_id": job.id,
        "state": str(job.state),
        "model_name": job.model_name,
        "model_version": job.model_version,
        "tenant": job.tenant,
        "policy": _policy(job.policy),
        "generation": job.generation,
        "attempts": job.attempts,
        "refusals": job.refusals,
        "submitted_at": job.submitted_at,
        "updated_at": job.updated_at,
        "lane": job.lane.text,
        # Pairs, because a key may be any text, and MongoDB's field names may not.
        "labels": [list(pair) for pair in job.labels],
        "transitions": [_step(step) for step in job.transitions],
        "steps": job.steps,
        "traceparent": job.traceparent,
    }
    if job.key:
        document |= {"key": job.key, "digest": Binary(job.digest)}
    if job.last_code:
        document |= {"last_code": job.last_code, "last_message": job.last_message}
    if job.due_at is not None:
        document["due_at"] = job.due_at
    if job.lease is not None:  # Adopted by its instance in the write that makes it durable.
        document["lease"] = asdict(job.lease)
    if job.depends_on:
        document |= {"depends_on": list(job.depends_on), "waits_for": list(job.waits_for)}
    if job.not_before is not None:
        document["not_before"] = job.not_before
    if job.fails_with_them:
        document["fails_with_them"] = True
    if job.deadline is not None:
        document["deadline"] = job.deadline
    if job.priority:
        document["priority"] = job.priority
    if job.explains:
        document["explains"] = True
    if job.is_kept:
        document["is_kept"] = True
    if job.is_apart:
        document["is_apart"] = True
    elif job.request is not None:
        document["request"] = Binary(job.request)
    return document


def job_of(document: Mapping[str, Any]) -> Job:
    """Reads a job; fields that a projection left out take their defaults."""
    cancel: Mapping[str, Any] | None = document.get("cancel")
    doom: Mapping[str, Any] | None = document.get("doom")
    lease: Mapping[str, Any] | None = document.get("lease")
    return Job(
        id=document["_id"],
        model_name=document["model_name"],
        submitted_at=document["submitted_at"],
        updated_at=document["updated_at"],
        state=State(document["state"]),
        model_version=document["model_version"],
        tenant=document["tenant"],
        key=document.get("key", ""),
        digest=document.get("digest", b""),
        priority=document.get("priority", 0),
        policy=policy_of(document["policy"]),
        due_at=document.get("due_at"),
        deadline=document.get("deadline"),
        depends_on=tuple(document.get("depends_on", ())),
        waits_for=tuple(document.get("waits_for", ())),
        unmet=tuple(document.get("unmet", ())),
        not_before=document.get("not_before"),
        fails_with_them=document.get("fails_with_them", False),
        generation=document.get("generation", 1),
        began_at=document.get("began_at"),
        attempts=document["attempts"],
        lapses=document.get("lapses", 0),
        refusals=document["refusals"],
        last_code=document.get("last_code", 0),
        last_message=document.get("last_message", ""),
        labels=tuple((key, value) for key, value in document["labels"]),
        transitions=tuple(
            Transition(State(step["state"]), step["at"], step["attempt"], step["instance"], step["reason"])
            for step in document["transitions"]
        ),
        steps=document.get("steps", len(document["transitions"])),
        lease=Lease(**lease) if lease else None,
        cancel_reason=cancel["reason"] if cancel else None,
        doom=End(Outcome(doom["outcome"]), doom["code"], doom["message"]) if doom else None,
        traceparent=document["traceparent"],
        explains=document.get("explains", False),
        is_apart=document.get("is_apart", False),
        is_kept=document.get("is_kept", False),
        request=document.get("request"),
    )


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
    """The update operators that turn `before` into `after`: changed fields, and the transition that was added."""
    set_: Document = {}
    unset: dict[str, str] = {}
    for name in ("generation", "attempts", "lapses", "refusals", "last_code", "last_message", "updated_at", "steps"):
        if getattr(before, name) != getattr(after, name):
            set_[name] = getattr(after, name)
    if before.began_at != after.began_at:
        set_["began_at"] = after.began_at
    if before.state is not after.state:
        set_["state"] = str(after.state)
    if before.due_at != after.due_at:
        _put(set_, unset, "due_at", after.due_at)
    if before.waits_for != after.waits_for:
        _put(set_, unset, "waits_for", list(after.waits_for) or None)
    if before.unmet != after.unmet:
        _put(set_, unset, "unmet", list(after.unmet) or None)
    if before.not_before != after.not_before:
        _put(set_, unset, "not_before", after.not_before)
    if before.cancel_reason is not None and after.cancel_reason is None:
        unset["cancel"] = ""
    if before.doom is not None and after.doom is None:
        unset["doom"] = ""
    if before.deadline != after.deadline:
        _put(set_, unset, "deadline", after.deadline)
    if before.lease != after.lease:
        _put(set_, unset, "lease", after.lease and asdict(after.lease))
    if not after.keeps_request:
        unset["request"] = ""
    update: dict[str, Any] = {"$set": set_}
    if unset:
        update["$unset"] = unset
    if after.transitions and after.transitions[-1:] != before.transitions[-1:]:
        steps = {"$each": [_step(after.transitions[-1])], "$slice": -TRANSITIONS_KEPT}
        update["$push"] = {"transitions": steps}
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
        "lease": {"$literal": asdict(lease)},
        "transitions": steps,
        "steps": {"$add": [{"$ifNull": ["$steps", {"$size": "$transitions"}]}, 1]},
    }
    return [{"$set": set_}, {"$unset": "due_at"}]


def taking_over(lease: Lease, cancel_reason: str | None = None) -> Document:
    """An update that does to each matched document what `job.take_over` does to a job."""
    set_: Document = {"lease": asdict(lease)}
    if cancel_reason is not None:
        set_["cancel"] = {"reason": cancel_reason}
    return {"$set": set_, "$unset": {"due_at": ""}}


def policy_of(document: Document) -> Policy:
    """The policy in a job's document."""
    return Policy(**{**document, "codes": tuple(document.get("codes", ()))})


def _policy(policy: Policy) -> Document:
    document: Document = {
        "max_attempts": policy.max_attempts,
        "initial_backoff_ms": policy.initial_backoff_ms,
        "max_backoff_ms": policy.max_backoff_ms,
    }
    if policy.codes:  # Few jobs have their own, and every job pays for its bytes.
        document["codes"] = policy.codes
    return document


def unleased(job: Job) -> Document:
    """The filter of a write about a job that nobody works on, as it was read."""
    return {"_id": job.id, "steps": job.steps, "lease": {"$exists": False}, "waits_for": {"$exists": True}}


def dooming(lease: Lease, how: End, unmet: Sequence[str]) -> Document:
    """An update that takes a job over, to end it so: whoever finds it after that does the same.

    `unmet` is what of its dependencies has not succeeded by then; without any it stays as it was.
    """
    doom = {"outcome": int(how.outcome), "code": how.code, "message": how.message}
    set_: Document = {"lease": asdict(lease), "doom": doom}
    if unmet:
        set_["waits_for"] = list(unmet)
    return {"$set": set_}


def _step(step: Transition) -> Document:
    return {
        "state": str(step.state),
        "at": step.at,
        "attempt": step.attempt,
        "instance": step.instance,
        "reason": step.reason,
    }


def _put(set_: Document, unset: dict[str, str], name: str, value: Any) -> None:
    if value is None:
        unset[name] = ""
    else:
        set_[name] = value
