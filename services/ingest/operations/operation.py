"""An operation on many jobs, and the selection of its jobs. Immutable values; no clock, no database.

RUNNING ──every matching job was examined──> SUCCEEDED
   └──────abort──────────────────────────────> ABORTED
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from mesh.mongo import Document
from services.ingest.job import DEAD_LETTERS, State
from services.ingest.limits import REASON_CHARS
from services.ingest.queries.filters import JobFilter, checked
from shoal.errors import Code, InvalidArgument


class Action(StrEnum):
    """Action on each selected job."""

    CANCEL = "cancel"
    REQUEUE = "requeue"
    PURGE = "purge"


class OperationState(StrEnum):
    """State of an operation."""

    RUNNING = "running"
    SUCCEEDED = "succeeded"
    ABORTED = "aborted"


STATES_OF: Mapping[Action, frozenset[State]] = {
    Action.CANCEL: frozenset({State.QUEUED, State.RUNNING}),
    Action.REQUEUE: DEAD_LETTERS,
    Action.PURGE: DEAD_LETTERS,
}
"""States of the jobs that an action changes."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Selection of jobs by an operation; `matching.states` is not empty."""

    matching: JobFilter
    code: int = 0
    """Status code of the last attempt; 0: any."""
    updated_before: datetime | None = None

    def query(self, started_at: datetime) -> Document:
        """Return the MongoDB query for the jobs that are unchanged since before the operation's start.

        A job that runs is changed at its claim: it has no such condition, and its id tells when it was submitted.
        """
        query = self.matching.query()
        if self.code:
            query["last_code"] = self.code
        before = self.updated_before
        if self.matching.states <= DEAD_LETTERS:
            # A requeued job that dies again is not selected twice.
            before = started_at if before is None else min(before, started_at)
        if before is not None:
            query["updated_at"] = {"$lt": before}
        return query


@dataclass(frozen=True, slots=True)
class Operation:
    """An operation and its progress."""

    id: str
    tenant: str
    """Tenant of the jobs; empty: jobs of every tenant."""
    action: Action
    selection: Selection
    reason: str
    caller: bytes
    """The caller for whom requeued jobs run; empty without a policy."""
    started_at: datetime
    updated_at: datetime
    state: OperationState = OperationState.RUNNING
    position: str = ""
    """Id of the last examined job."""
    matched: int = 0
    matched_at_least: bool = False
    changed: int = 0
    skipped: int = 0


@dataclass(frozen=True, slots=True)
class Request:
    """Request for an operation, as the client has sent it."""

    action: Action
    states: Collection[State] = ()
    model_name: str = ""
    tenant: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    code: int = 0
    updated_before: datetime | None = None
    reason: str = ""


def checked_selection(request: Request, tenant: str) -> Selection:
    """Return the selection of a request, among the jobs of `tenant` (empty: of every tenant).

    Raises:
        InvalidArgument: a field is invalid, or no condition is set; the message names the field.
    """
    conditions = (request.states, request.model_name, request.tenant, request.labels, request.code)
    if not any(conditions) and request.updated_before is None:
        raise InvalidArgument(
            "selection: empty, which would select every job: set states, model_name, tenant, labels, code or "
            "updated_before"
        )
    allowed = STATES_OF[request.action]
    if foreign := frozenset(request.states) - allowed:
        raise InvalidArgument(
            f"selection.states: {request.action} is for jobs that are {' or '.join(sorted(allowed))}, "
            f"not {' or '.join(sorted(foreign))}"
        )
    if request.code and request.code not in set(Code):
        raise InvalidArgument(f"selection.code: expected a gRPC status code, 1 to 16, got {request.code}")
    if len(request.reason) > REASON_CHARS:
        raise InvalidArgument(f"reason: at most {REASON_CHARS} characters, got {len(request.reason)}")
    if request.reason and request.action is Action.PURGE:
        raise InvalidArgument("reason: not for a purge, which leaves nothing that would keep it")
    states = frozenset(request.states) or allowed
    matching = checked((), states, request.model_name, tenant, request.labels)
    return Selection(matching, request.code, request.updated_before)
