"""Which jobs a watcher of many wants, as MongoDB is asked: of jobs as they lie, and of changes to them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mesh.mongo import Document
from services.ingest.job import Job, State
from services.ingest.limits import LABEL_CHARS, LABELS
from services.ingest.ulid import is_ulid
from shoal.errors import InvalidArgument

MOST_IDS = 1_000


@dataclass(frozen=True, slots=True)
class JobFilter:
    """Which jobs, and which of their transitions: those into one of `states`. Each that is set narrows."""

    ids: tuple[str, ...] = ()
    states: frozenset[State] = frozenset()
    model_name: str = ""
    tenant: str = ""
    labels: tuple[tuple[str, str], ...] = ()

    @property
    def digest(self) -> str:
        """Tells filters apart: a resume token belongs to one."""
        plain = [sorted(self.ids), sorted(self.states), self.model_name, self.tenant, sorted(self.labels)]
        return hashlib.sha256(json.dumps(plain).encode()).hexdigest()[:16]

    def includes(self, job: Job) -> bool:
        """Whether the state of `job`, which is one of the jobs, is one of the states."""
        return not self.states or job.state in self.states

    def query(self) -> Document:
        """The jobs that are so now."""
        query = _matching(self, "")
        if self.states:
            query["state"] = {"$in": sorted(map(str, self.states))}
        return query

    def pipeline(self) -> list[Document]:
        """Their changes, in a change stream that looks documents up: each has the job as it was soon after, less its
        request, and `step`, the number of the transition that it is about.
        """
        updated = "updateDescription.updatedFields"
        moved: Document = {"operationType": "update", f"{updated}.steps": {"$exists": True}}
        made: Document = {"operationType": "insert"}
        if self.states:
            states = sorted(map(str, self.states))
            # A transition into the state that it was in before changes no field of that name: it is looked at here.
            moved["$or"] = [{f"{updated}.state": {"$in": states}}, {f"{updated}.state": {"$exists": False}}]
            made["fullDocument.transitions.state"] = {"$in": states}
        match: Document = {"$or": [moved, made]}
        if self.ids:
            match["documentKey._id"] = {"$in": list(self.ids)}
        whose = _matching(self, "fullDocument.")
        whose.pop("fullDocument._id", None)
        return [
            {"$match": match},
            {"$match": {"fullDocument": {"$type": "object"}, **whose}},
            {"$set": {"step": f"${updated}.steps"}},
            {"$unset": ["fullDocument.request", "updateDescription"]},
        ]


def checked(
    ids: tuple[str, ...], states: frozenset[State], model_name: str, tenant: str, labels: Mapping[str, str]
) -> JobFilter:
    """What is wanted, or InvalidArgument."""
    if len(ids) > MOST_IDS:
        raise InvalidArgument(f"ids: at most {MOST_IDS}, got {len(ids)}")
    for at, job_id in enumerate(ids):
        if not is_ulid(job_id):
            raise InvalidArgument(f"ids[{at}]: not a job's id: {job_id[:64]!r}")
    if len(labels) > LABELS:
        raise InvalidArgument(f"labels: at most {LABELS}, got {len(labels)}")
    texts = {"model_name": model_name, "tenant": tenant}
    texts |= {f"labels[{key[:40]!r}]": key + value for key, value in labels.items()}
    for field, text in texts.items():
        if len(text) > 2 * LABEL_CHARS:
            raise InvalidArgument(f"{field}: too long to be that of any job")
    return JobFilter(tuple(dict.fromkeys(ids)), states, model_name, tenant, tuple(sorted(labels.items())))


def _matching(filter_: JobFilter, prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if filter_.ids:
        found[f"{prefix}_id"] = {"$in": list(filter_.ids)}
    if filter_.model_name:
        found[f"{prefix}model_name"] = filter_.model_name
    if filter_.tenant:
        found[f"{prefix}tenant"] = filter_.tenant
    if filter_.labels:
        found[f"{prefix}labels"] = {"$all": [{"$elemMatch": {"$eq": list(pair)}} for pair in filter_.labels]}
    return found
