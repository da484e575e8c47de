"""RPC methods for dead letters: translation between messages and `DeadLetters`."""

from __future__ import annotations

from collections.abc import Sequence

from mesh.rpc.interceptors import Context
from mesh.rpc.tenant_scope import Scopes, TenantScope
from services.ingest.dead_letters.dead_letters import DeadLetterOutcome, DeadLetters
from services.ingest.dead_letters.filters import DeadLetterSelection, checked_filter, checked_selection
from services.ingest.job_store import DeadFilter
from services.ingest.messages import message_of, moment_of, state_of
from services.ingest.queries.jobs import work_of
from shoal.ingest.v1 import ingest_pb2 as pb


class DeadLettersRpc:
    """Mixin of the servicer with the methods for dead letters."""

    def __init__(self, letters: DeadLetters, scopes: Scopes) -> None:
        self._letters = letters
        self._scopes = scopes

    async def ListDeadLetters(self, request: pb.ListDeadLettersRequest, context: Context) -> pb.ListDeadLettersResponse:
        filter_ = _filter(request.filter, self._scopes.of(context, "ListDeadLetters"))
        page = await self._letters.page(filter_, request.page_size, request.page_token)
        response = pb.ListDeadLettersResponse(next_page_token=page.next_token)
        async for job in self._letters.pauses.each(page.jobs, weight=lambda job: work_of(job.transitions)):
            response.jobs.append(message_of(job))
        return response

    async def RequeueDeadLetters(
        self, request: pb.RequeueDeadLettersRequest, context: Context
    ) -> pb.RequeueDeadLettersResponse:
        scope = self._scopes.of(context, "RequeueDeadLetters")
        done = await self._letters.requeue(_selected(request, scope), request.reason, scope)
        return pb.RequeueDeadLettersResponse(
            ids=done.ids, refused=_refused(done), more=bool(done.next_token), next_page_token=done.next_token
        )

    async def PurgeDeadLetters(
        self, request: pb.PurgeDeadLettersRequest, context: Context
    ) -> pb.PurgeDeadLettersResponse:
        scope = self._scopes.of(context, "PurgeDeadLetters")
        done = await self._letters.purge(_selected(request, scope), scope)
        return pb.PurgeDeadLettersResponse(
            ids=done.ids, refused=_refused(done), more=bool(done.next_token), next_page_token=done.next_token
        )


def _filter(message: pb.DeadLetterFilter, scope: TenantScope) -> DeadFilter:
    before = moment_of("filter.before", message.before) if message.HasField("before") else None
    tenant = scope.owner("filter.tenant", message.tenant)
    return checked_filter(state_of(message.state), message.model_name, tenant, message.code, before)


def _selected(
    request: pb.RequeueDeadLettersRequest | pb.PurgeDeadLettersRequest, scope: TenantScope
) -> DeadLetterSelection:
    filter_ = _filter(request.filter, scope) if request.HasField("filter") else None
    return checked_selection(request.ids, filter_, request.limit, request.page_token)


def _refused(done: DeadLetterOutcome) -> Sequence[pb.DeadLetterRefusal]:
    return [
        pb.DeadLetterRefusal(id=job_id, code=error.code, message=error.message)
        for job_id, error in done.refused.items()
    ]
