"""RPC methods for batches."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from mesh.rpc.interceptors import Context
from mesh.rpc.tenant_scope import Scopes
from services.ingest.batches.messages import message_of, state_of
from services.ingest.queries.jobs import Filter
from shoal.errors import Unimplemented
from shoal.ingest.v1 import ingest_pb2 as pb

if TYPE_CHECKING:
    from services.ingest.batches.app import Batches
    from services.ingest.batches.batch_control import BatchControl, BatchView

# A batch may have 1,000 inputs and 100 transitions.
_PAUSED_AFTER = 2


class BatchesRpc:
    """Servicer mixin: the batch methods of IngestService."""

    def __init__(self, batches: Batches | None, scopes: Scopes) -> None:
        self._batches = batches
        self._scopes = scopes

    @property
    def _enabled(self) -> Batches:
        if self._batches is None:
            raise Unimplemented("this node runs no batches: they need Arrow; install shoal[parquet] for ingest")
        return self._batches

    @property
    def _control(self) -> BatchControl:
        return self._enabled.control

    def _message(self, view: BatchView) -> pb.Batch:
        return message_of(view, self._enabled.clock())

    async def SubmitBatch(self, request: pb.SubmitBatchRequest, context: Context) -> pb.SubmitBatchResponse:
        scope = self._scopes.of(context, "SubmitBatch")
        batch, existed = await self._enabled.submissions.submit(request, scope)
        return pb.SubmitBatchResponse(batch=self._message(await self._control.get(batch.id, scope)), existed=existed)

    async def GetBatch(self, request: pb.GetBatchRequest, context: Context) -> pb.GetBatchResponse:
        view = await self._control.get(request.id, self._scopes.of(context, "GetBatch"))
        return pb.GetBatchResponse(batch=self._message(view))

    async def ListBatches(self, request: pb.ListBatchesRequest, context: Context) -> pb.ListBatchesResponse:
        tenant = self._scopes.of(context, "ListBatches").owner("tenant", request.tenant)
        requested = Filter(state_of(request.state), request.model_name, tenant)
        views, token = await self._control.page(requested, request.page_size, request.page_token)
        response = pb.ListBatchesResponse(next_page_token=token)
        async for view in self._control.pauses.each(views, every=_PAUSED_AFTER):
            response.batches.append(self._message(view))
        return response

    async def WatchBatch(self, request: pb.WatchBatchRequest, context: Context) -> AsyncIterator[pb.WatchBatchResponse]:
        async for view in self._control.follow(request.id, self._scopes.of(context, "WatchBatch")):
            yield pb.WatchBatchResponse(batch=self._message(view))

    async def CancelBatch(self, request: pb.CancelBatchRequest, context: Context) -> pb.CancelBatchResponse:
        view = await self._control.cancel(request.id, request.reason, self._scopes.of(context, "CancelBatch"))
        return pb.CancelBatchResponse(batch=self._message(view))

    async def PauseBatch(self, request: pb.PauseBatchRequest, context: Context) -> pb.PauseBatchResponse:
        view = await self._control.pause(request.id, request.reason, self._scopes.of(context, "PauseBatch"))
        return pb.PauseBatchResponse(batch=self._message(view))

    async def ResumeBatch(self, request: pb.ResumeBatchRequest, context: Context) -> pb.ResumeBatchResponse:
        view = await self._control.resume(request.id, request.reason, self._scopes.of(context, "ResumeBatch"))
        return pb.ResumeBatchResponse(batch=self._message(view))
