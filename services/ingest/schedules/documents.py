"""Documents of schedules in MongoDB.

schedules  {_id: '["tenant","name"]', ..., next_at: missing while paused, revision, fence,
            try_again_at, tries: missing unless its last firing failed}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from bson import Binary
from pymongo import ASCENDING, IndexModel

from mesh.mongo import Document
from services.ingest.schedules.schedule import Misfire, Overlap, Schedule

SCHEDULES = "schedules"
INDEXES = (
    # Holds all that the search for due schedules reads: templates are large.
    IndexModel(
        [("next_at", ASCENDING), ("try_again_at", ASCENDING), ("tenant", ASCENDING), ("_id", ASCENDING)],
        name="due_by_tenant",
        partialFilterExpression={"next_at": {"$exists": True}},
    ),
    IndexModel([("tenant", ASCENDING), ("_id", ASCENDING)], name="by_tenant"),
)
RETIRED_INDEXES = ("due",)
VALIDATOR: Mapping[str, Any] = {
    "$jsonSchema": {
        "bsonType": "object",
        "required": ["_id", "tenant", "name", "cron", "zone", "template", "misfire", "overlap", "revision", "fence"],
        "properties": {
            "_id": {"bsonType": "string"},
            "name": {"bsonType": "string", "minLength": 1},
            "template": {"bsonType": "binData"},
            "misfire": {"enum": [str(each) for each in Misfire]},
            "overlap": {"enum": [str(each) for each in Overlap]},
            "revision": {"bsonType": ["int", "long"], "minimum": 1},
            # Fencing token of the leader that fired the schedule last; tokens of later leaders are greater.
            "fence": {"bsonType": ["int", "long"], "minimum": 0},
            "next_at": {"bsonType": "date"},
            "try_again_at": {"bsonType": "date"},
            "tries": {"bsonType": ["int", "long"], "minimum": 1},
        },
    }
}
_PLAIN = ("tenant", "name", "cron", "zone", "created_at", "updated_at", "revision", "fired", "skipped")


def id_of(tenant: str, name: str) -> str:
    """Return the document id. JSON, so that different pairs never have equal ids."""
    return json.dumps([tenant, name], separators=(",", ":"))


def document_of(schedule: Schedule) -> Document:
    """Return the document of a schedule that has not fired yet."""
    document: Document = {"_id": id_of(schedule.tenant, schedule.name), "fence": 0}
    document |= {field: getattr(schedule, field) for field in _PLAIN}
    document |= {"template": Binary(schedule.template), "misfire": str(schedule.misfire)}
    document |= {"overlap": str(schedule.overlap), "is_paused": schedule.is_paused}
    if schedule.caller:
        document["caller"] = Binary(schedule.caller)
    if schedule.next_at is not None:
        document["next_at"] = schedule.next_at
    return document


def schedule_of(document: Mapping[str, Any]) -> Schedule:
    """Return the schedule in a document."""
    return Schedule(
        **{field: document[field] for field in _PLAIN},
        template=bytes(document.get("template", b"")),
        misfire=Misfire(document["misfire"]),
        overlap=Overlap(document["overlap"]),
        is_paused=document["is_paused"],
        caller=bytes(document.get("caller", b"")),
        next_at=document.get("next_at"),
        tries=document.get("tries", 0),
        last_at=document.get("last_at"),
        last_job=document.get("last_job", ""),
        last_skip=document.get("last_skip", ""),
    )
