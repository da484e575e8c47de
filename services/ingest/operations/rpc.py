"""RPC methods for operations on many jobs: translation between messages and `OperationRepository`."""

from __future__ import annotations

from collections.abc import Callable

from mesh.rpc.interceptors import Context
from mesh.rpc.tenant_scope import Scopes
from services.ingest.job_access import storable_caller
from services.ingest.messages import STATES, moment_of, state_of, timestamp_of
from services.ingest.operations.operation import Action, Operation, OperationState, Request, checked_selection
from services.ingest.operations.operation_repository import OperationRepository
from shoal.errors import InvalidArgument
from shoal.ingest.v1 import ingest_pb2 as pb

_ACTIONS = {action: f"JOB_ACTION_{action.name}" for action in Action}
_ACTION_OF = {pb.JobAction.Value(name): action for action, name in _ACTIONS.items()}
_STATES = {state: f"JOB_OPERATION_STATE_{state.name}" for state in OperationState}


class JobOperationsRpc:
    """Mixin of the servicer with the methods for operations."""

    def __init__(self, operations: OperationRepository, new_id: Callable[[], str], scopes: Scopes) -> None:
        self._operations = operations
        self._new_id = new_id
        self._scopes = scopes

    async def StartJobOperation(
        self, request: pb.StartJobOperationRequest, context: Context
    ) -> pb.StartJobOperationResponse:
        scope = self._scopes.of(context, "StartJobOperation")
        tenant = scope.owner("selection.tenant", request.selection.tenant)
        requested = _request(request)
        selection = checked_selection(requested, tenant)
        now = self._operations.now()
        matched, at_least = await self._operations.count(selection, now)
        operation = Operation(
            id="" if request.dry_run else self._new_id(),
            tenant=tenant,
            action=requested.action,
            selection=selection,
            reason=request.reason,
            caller=storable_caller(scope),
            started_at=now,
            updated_at=now,
            matched=matched,
            matched_at_least=at_least,
        )
        if not request.dry_run:
            await self._operations.start(operation)
        return pb.StartJobOperationResponse(operation=_message(operation))

    async def GetJobOperation(self, request: pb.GetJobOperationRequest, context: Context) -> pb.GetJobOperationResponse:
        operation = await self._operations.get(request.id, self._scopes.of(context, "GetJobOperation"))
        return pb.GetJobOperationResponse(operation=_message(operation))

    async def ListJobOperations(
        self, request: pb.ListJobOperationsRequest, context: Context
    ) -> pb.ListJobOperationsResponse:
        tenant = self._scopes.of(context, "ListJobOperations").owner("tenant", request.tenant)
        return pb.ListJobOperationsResponse(operations=map(_message, await self._operations.list(tenant)))

    async def AbortJobOperation(
        self, request: pb.AbortJobOperationRequest, context: Context
    ) -> pb.AbortJobOperationResponse:
        operation = await self._operations.abort(request.id, self._scopes.of(context, "AbortJobOperation"))
        return pb.AbortJobOperationResponse(operation=_message(operation))


def _request(message: pb.StartJobOperationRequest) -> Request:
    if (action := _ACTION_OF.get(message.action)) is None:
        raise InvalidArgument(f"action: expected {', '.join(Action)}; got {message.action}")
    chosen = message.selection
    states = {state_of(number) for number in chosen.states}
    before = moment_of("selection.updated_before", chosen.updated_before) if chosen.HasField("updated_before") else None
    return Request(
        action,
        frozenset(state for state in states if state is not None),
        chosen.model_name,
        chosen.tenant,
        chosen.labels,
        chosen.code,
        before,
        message.reason,
    )


def _message(operation: Operation) -> pb.JobOperation:
    chosen = operation.selection
    selection = pb.JobSelection(
        states=[STATES[state] for state in sorted(chosen.matching.states)],
        model_name=chosen.matching.model_name,
        tenant=operation.tenant,
        labels=dict(chosen.matching.labels),
        code=chosen.code,
    )
    if chosen.updated_before is not None:
        selection.updated_before.CopyFrom(timestamp_of(chosen.updated_before))
    return pb.JobOperation(
        id=operation.id,
        action=_ACTIONS[operation.action],
        selection=selection,
        reason=operation.reason,
        state=_STATES[operation.state],
        started_at=timestamp_of(operation.started_at),
        updated_at=timestamp_of(operation.updated_at),
        matched=operation.matched,
        matched_at_least=operation.matched_at_least,
        changed=operation.changed,
        skipped=operation.skipped,
    )
