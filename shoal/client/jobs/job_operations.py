"""`client.jobs.operations`: cancel, requeue or purge every job that a filter selects."""

from __future__ import annotations

import builtins
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum

from shoal.client.jobs.job import JobState, of_state, to_code, to_state
from shoal.client.models.registry import of_time
from shoal.client.transport import methods
from shoal.client.transport.calls import Caller
from shoal.errors import Code, InvalidArgument
from shoal.ingest.v1 import ingest_pb2 as ingest

TIMEOUT_S = 15.0
"""Timeout of a call: matching jobs are counted for up to 5 s."""


class JobAction(StrEnum):
    """Action on each selected job."""

    CANCEL = "cancel"
    """Jobs that are queued or running."""
    REQUEUE = "requeue"
    """Jobs that are dead or failed."""
    PURGE = "purge"
    """Jobs that are dead or failed; they are removed with their requests."""


class JobOperationState(StrEnum):
    """State of an operation."""

    RUNNING = "running"
    SUCCEEDED = "succeeded"
    """Every matching job has been examined."""
    ABORTED = "aborted"

    @property
    def ended(self) -> bool:
        return self is not JobOperationState.RUNNING


@dataclass(frozen=True)
class JobSelection:
    """Selection of jobs: a job must match every field that is set. At least one must be."""

    states: Sequence[JobState | str] = ()
    """States that the action applies to; empty: all of them."""
    model: str = ""
    tenant: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    code: Code | str | None = None
    """Status code of the last attempt."""
    updated_before: datetime | None = None
    """Only jobs whose last transition was before this time."""


@dataclass(frozen=True)
class JobOperation:
    """Snapshot of an operation at the time of the call."""

    id: str
    """Empty for a preview."""
    action: JobAction
    selection: JobSelection
    state: JobOperationState
    reason: str = ""
    started_at: datetime | None = None
    updated_at: datetime | None = None
    matched: int = 0
    """Jobs that matched at the start."""
    matched_at_least: bool = False
    """True when `matched` is a lower bound, since not all jobs were counted."""
    changed: int = 0
    """Jobs that were cancelled, requeued or removed."""
    skipped: int = 0
    """Jobs that matched, and changed by themselves before their turn."""


class AsyncJobOperations:
    """Client of the operations on many jobs. The node carries them out; the client may go away."""

    def __init__(self, caller: Caller, tenant: str) -> None:
        self._caller = caller
        self._tenant = tenant

    async def preview(
        self, action: JobAction | str, selection: JobSelection, *, timeout: float | None = TIMEOUT_S
    ) -> JobOperation:
        """Count the jobs that an operation would examine. Nothing changes.

        Raises:
            InvalidArgument: the selection is empty, or a field is invalid.
        """
        return await self._start(action, selection, "", timeout, dry_run=True)

    async def start(
        self,
        action: JobAction | str,
        selection: JobSelection,
        *,
        reason: str = "",
        timeout: float | None = TIMEOUT_S,
    ) -> JobOperation:
        """Start an operation on the jobs that match now.

        Args:
            reason: recorded with each job; not for a purge.

        Raises:
            InvalidArgument: the selection is empty, or a field is invalid.
            ResourceExhausted: too many operations run.
        """
        return await self._start(action, selection, reason, timeout, dry_run=False)

    async def get(self, operation_id: str, *, timeout: float | None = TIMEOUT_S) -> JobOperation:
        """Return an operation. Raises NotFound; ended ones are kept for 7 days."""
        request = ingest.GetJobOperationRequest(id=operation_id)
        return _operation((await self._caller.call(methods.GET_JOB_OPERATION, request, timeout_s=timeout)).operation)

    async def list(self, *, tenant: str = "", timeout: float | None = TIMEOUT_S) -> builtins.list[JobOperation]:
        """Return the operations, newest first."""
        request = ingest.ListJobOperationsRequest(tenant=tenant or self._tenant)
        response = await self._caller.call(methods.LIST_JOB_OPERATIONS, request, timeout_s=timeout)
        return [_operation(one) for one in response.operations]

    async def abort(self, operation_id: str, *, timeout: float | None = TIMEOUT_S) -> JobOperation:
        """Abort an operation; jobs that it has changed stay changed. Raises NotFound."""
        request = ingest.AbortJobOperationRequest(id=operation_id)
        return _operation((await self._caller.call(methods.ABORT_JOB_OPERATION, request, timeout_s=timeout)).operation)

    async def _start(
        self, action: JobAction | str, selection: JobSelection, reason: str, timeout: float | None, *, dry_run: bool
    ) -> JobOperation:
        request = ingest.StartJobOperationRequest(
            action=_action(action), selection=self._selection(selection), reason=reason, dry_run=dry_run
        )
        response = await self._caller.call(methods.START_JOB_OPERATION, request, timeout_s=timeout)
        return _operation(response.operation)

    def _selection(self, chosen: JobSelection) -> ingest.JobSelection:
        message = ingest.JobSelection(
            states=[to_state(state) for state in chosen.states],
            model_name=chosen.model,
            tenant=chosen.tenant or self._tenant,
            labels=chosen.labels,
            code=0 if chosen.code is None else to_code(chosen.code),
        )
        if chosen.updated_before is not None:
            message.updated_before.FromDatetime(chosen.updated_before.astimezone(UTC))
        return message


def _action(action: JobAction | str) -> str:
    try:
        return f"JOB_ACTION_{JobAction(action).name}"
    except ValueError:
        raise InvalidArgument(f"action {str(action)!r}: expected {', '.join(JobAction)}") from None


def _operation(message: ingest.JobOperation) -> JobOperation:
    chosen = message.selection
    prefix = "JOB_OPERATION_STATE_"
    return JobOperation(
        id=message.id,
        action=JobAction[ingest.JobAction.Name(message.action).removeprefix("JOB_ACTION_")],
        selection=JobSelection(
            states=tuple(of_state(state) for state in chosen.states),
            model=chosen.model_name,
            tenant=chosen.tenant,
            labels=dict(chosen.labels),
            code=Code(chosen.code) if chosen.code else None,
            updated_before=of_time(chosen, "updated_before"),
        ),
        state=JobOperationState[ingest.JobOperationState.Name(message.state).removeprefix(prefix)],
        reason=message.reason,
        started_at=of_time(message, "started_at"),
        updated_at=of_time(message, "updated_at"),
        matched=message.matched,
        matched_at_least=message.matched_at_least,
        changed=message.changed,
        skipped=message.skipped,
    )
