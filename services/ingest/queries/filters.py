"""Filter of WatchJobs: validation, the MongoDB query for jobs, and the pipeline for changes of jobs."""

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
    """Filter of jobs and of their transitions, those into one of `states`. Each field that is set narrows it."""

    ids: tuple[str, ...] = ()
    states: frozenset[State] = frozenset()
    model_name: str = ""
    tenant: str = ""
    labels: tuple[tuple[str, str], ...] = ()

    @property
    def digest(self) -> str:
        """Digest that identifies the filter: a resume token belongs to one filter."""
        plain = [sorted(self.ids), sorted(self.states), self.model_name, self.tenant, sorted(self.labels)]
        return hashlib.sha256(json.dumps(plain).encode()).hexdigest()[:16]

    def includes(self, job: Job) -> bool:
        """Return True when the state of `job`, which matches otherwise, is one of the states."""
        return not self.states or job.state in self.states

    def query(self) -> Document:
        """Return the query for jobs that match now."""
        query = _matching(self, "")
        if self.states:
            query["state"] = {"$in": sorted(map(str, self.states))}
        return query

    def pipeline(self) -> list[Document]:
        """Return the pipeline for a change stream with document look-up.

        Each change has the job as read soon after it, without its request, and `step`, the number of its transition.
        """
        updated = "updateDescription.updatedFields"
        moved: Document = {"operationType": "update", f"{updated}.steps": {"$exists": True}}
        made: Document = {"operationType": "insert"}
        if self.states:
            states = sorted(map(str, self.states))
            # A transition into the same state does not change the field `state`: `includes` checks it later.
            moved["$or"] = [{f"{updated}.state": {"$in": states}}, {f"{updated}.state": {"$exists": False}}]
            made["fullDocument.transitions.state"] = {"$in": states}
        match: Document = {"$or": [moved, made]}
        if self.ids:
            match["documentKey._id"] = {"$in": list(self.ids)}
        matching = _matching(self, "fullDocument.")
        matching.pop("fullDocument._id", None)
        return [
            {"$match": match},
            {"$match": {"fullDocument": {"$type": "object"}, **matching}},
            {"$set": {"step": f"${updated}.steps"}},
            {"$unset": ["fullDocument.request", "updateDescription"]},
        ]


def checked(
    ids: tuple[str, ...], states: frozenset[State], model_name: str, tenant: str, labels: Mapping[str, str]
) -> JobFilter:
    """Return the filter of a request.

    Raises:
        InvalidArgument: a field is invalid; the message names it.
    """
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
