"""Servicer of shoal.ingest.v1.IngestService: translates between protobuf messages and ingest's own types."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mesh.rpc.interceptors import Context
from mesh.rpc.server import Rpc
from mesh.rpc.tenant_scope import Scopes
from services.ingest.batches.rpc import BatchesRpc
from services.ingest.connectors.reports import Reports
from services.ingest.connectors.rpc import StreamsRpc
from services.ingest.connectors.run_stream import RunStreams
from services.ingest.dead_letters.dead_letters import DeadLetters
from services.ingest.dead_letters.rpc import DeadLettersRpc
from services.ingest.dispatch.cancel import JobCanceller
from services.ingest.intake.intake import Intake
from services.ingest.intake.stream import Stream
from services.ingest.messages import message_of, state_of
from services.ingest.operations.operation_repository import OperationRepository
from services.ingest.operations.rpc import JobOperationsRpc
from services.ingest.queries.filters import checked
from services.ingest.queries.jobs import Filter, Jobs, work_of
from services.ingest.queries.watch import Watch
from services.ingest.queries.watch_many import WatchMany
from services.ingest.retention.retention_repository import RetentionRepository
from services.ingest.retention.rpc import JobRetentionRpc
from services.ingest.schedules.rpc import SchedulesRpc
from services.ingest.schedules.schedule_repository import ScheduleRepository
from services.ingest.tenants.rpc import TenantsRpc
from services.ingest.tenants.tenant_repository import TenantRepository
from services.ingest.tenants.tenant_status import TenantStatuses
from shoal.ingest.v1 import ingest_pb2 as pb
from shoal.ingest.v1 import ingest_pb2_grpc

if TYPE_CHECKING:
    from services.ingest.batches.app import Batches

SERVICE = "shoal.ingest.v1.IngestService"


@dataclass(frozen=True, slots=True)
class RpcComponents:
    """Components that the methods call."""

    new_id: Callable[[], str]
    intake: Intake
    jobs: Jobs
    watch: Watch
    watch_many: WatchMany
    canceller: JobCanceller
    dead_letters: DeadLetters
    operations: OperationRepository
    schedules: ScheduleRepository
    retention: RetentionRepository
    tenants: TenantRepository
    tenant_statuses: TenantStatuses
    batches: Batches | None
    run_streams: RunStreams
    reports: Reports


class IngestRpc(
    DeadLettersRpc,
    JobOperationsRpc,
    SchedulesRpc,
    JobRetentionRpc,
    TenantsRpc,
    BatchesRpc,
    StreamsRpc,
    ingest_pb2_grpc.IngestServiceServicer,
):
    """Servicer of all methods. Folders with methods of their own contribute a mixin."""

    def __init__(self, components: RpcComponents, scopes: Scopes, *, stream_items: int, stream_bytes: int) -> None:
        DeadLettersRpc.__init__(self, components.dead_letters, scopes)
        JobOperationsRpc.__init__(self, components.operations, components.new_id, scopes)
        StreamsRpc.__init__(self, components.run_streams, components.reports, scopes)
        SchedulesRpc.__init__(self, components.schedules, scopes)
        JobRetentionRpc.__init__(self, components.retention)
        BatchesRpc.__init__(self, components.batches, scopes)
        TenantsRpc.__init__(self, components.tenants, components.tenant_statuses)
        self._scopes = scopes
        self._intake = components.intake
        self._jobs = components.jobs
        self._watch = components.watch
        self._canceller = components.canceller
        self._watch_many = components.watch_many
        self._stream_items = stream_items
        self._stream_bytes = stream_bytes

    async def Submit(self, request: pb.SubmitRequest, context: Context) -> pb.SubmitResponse:
        accepted = await self._intake.submit(request, self._scopes.of(context, "Submit"))
        return pb.SubmitResponse(job=message_of(accepted.job), existed=accepted.existed)

    async def SubmitStream(
        self, request_iterator: AsyncIterator[pb.SubmitStreamRequest], context: Context
    ) -> AsyncIterator[pb.SubmitStreamResponse]:
        scope = self._scopes.of(context, "SubmitStream")
        stream = Stream(self._intake, items=self._stream_items, nbytes=self._stream_bytes, scope=scope)
        async for response in stream.acknowledge(request_iterator):
            yield response

    async def GetJob(self, request: pb.GetJobRequest, context: Context) -> pb.GetJobResponse:
        job = await self._jobs.get(request.id, self._scopes.of(context, "GetJob"))
        return pb.GetJobResponse(job=message_of(job))

    async def GetPayload(self, request: pb.GetPayloadRequest, context: Context) -> pb.GetPayloadResponse:
        payload = await self._jobs.payload(request.id, self._scopes.of(context, "GetPayload"))
        response = pb.GetPayloadResponse()
        response.request.MergeFromString(payload)
        return response

    async def ListJobs(self, request: pb.ListJobsRequest, context: Context) -> pb.ListJobsResponse:
        tenant = self._scopes.of(context, "ListJobs").owner("tenant", request.tenant)
        filter_ = Filter(state_of(request.state), request.model_name, tenant)
        page = await self._jobs.page(filter_, request.page_size, request.page_token)
        response = pb.ListJobsResponse(next_page_token=page.next_token)
        async for job in self._jobs.pauses.each(page.jobs, weight=lambda job: work_of(job.transitions)):
            response.jobs.append(message_of(job))
        return response

    async def WatchJob(self, request: pb.WatchJobRequest, context: Context) -> AsyncIterator[pb.WatchJobResponse]:
        async for job in self._watch.follow(request.id, self._scopes.of(context, "WatchJob")):
            yield pb.WatchJobResponse(job=message_of(job))

    async def WatchJobs(self, request: pb.WatchJobsRequest, context: Context) -> AsyncIterator[pb.WatchJobsResponse]:
        states = frozenset(state for number in request.states if (state := state_of(number)) is not None)
        tenant = self._scopes.of(context, "WatchJobs").owner("tenant", request.tenant)
        filter_ = checked(tuple(request.ids), states, request.model_name, tenant, request.labels)
        watch = self._watch_many.follow(filter_, existing=request.include_existing, token=request.resume_token)
        async with aclosing(watch) as updates:
            async for update in updates:
                job = None if update.job is None else message_of(update.job)
                yield pb.WatchJobsResponse(job=job, resume_token=update.token, existing=update.is_existing)
                del job, update

    async def CancelJob(self, request: pb.CancelJobRequest, context: Context) -> pb.CancelJobResponse:
        scope = self._scopes.of(context, "CancelJob")
        return pb.CancelJobResponse(job=message_of(await self._canceller.cancel(request.id, request.reason, scope)))


def rpc(servicer: IngestRpc) -> Rpc:
    """Return the registration of `servicer` with a server."""
    return Rpc(
        pb.DESCRIPTOR.services_by_name["IngestService"],
        lambda server: ingest_pb2_grpc.add_IngestServiceServicer_to_server(servicer, server),
    )
