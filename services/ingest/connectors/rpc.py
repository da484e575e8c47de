"""RPC methods of IngestService for streams and connectors."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, cast

from mesh.rpc.call_context import CallMemory
from mesh.rpc.interceptors import Context
from mesh.rpc.tenant_scope import Scopes
from services.ingest.connectors.reports import Report, Reports
from services.ingest.connectors.run_stream import RunStreams
from services.ingest.messages import timestamp_of
from shoal.ingest.v1 import ingest_pb2 as pb


class StreamsRpc:
    """Servicer mixin: RunStream and ListConnectors."""

    def __init__(self, run_streams: RunStreams, reports: Reports, scopes: Scopes) -> None:
        self._scopes = scopes
        self._run_streams = run_streams
        self._reports = reports

    async def RunStream(
        self, request_iterator: AsyncIterator[pb.RunStreamRequest], context: Context
    ) -> AsyncIterator[pb.RunStreamResponse]:
        memory: CallMemory = cast("Any", context).memory
        scope = self._scopes.of(context, "RunStream")
        async with aclosing(self._run_streams.serve(request_iterator, memory, scope)) as responses:
            async for response in responses:
                yield response

    async def ListConnectors(self, request: pb.ListConnectorsRequest, context: Context) -> pb.ListConnectorsResponse:
        return pb.ListConnectorsResponse(connectors=map(_message, await self._reports.all(request.name)))


def _message(report: Report) -> pb.Connector:
    info = report.info
    message = pb.Connector(
        name=info.name,
        instance=report.instance,
        phase=f"CONNECTOR_PHASE_{report.phase.name}",
        source=info.source,
        sink=info.sink,
        dead_letters=info.dead_letters,
        model_name=info.model_name,
        model_version=info.model_version,
        tenant=info.tenant,
        messages=report.messages,
        answered=report.answered,
        dead=report.dead,
        in_flight=report.in_flight,
        lag=report.lag,
        lag_ms=report.lag_ms,
        last_error=report.error,
        updated_at=timestamp_of(report.updated_at),
        stale=report.is_stale,
        lanes=[
            pb.ConnectorLane(lane=partition.name, committed=partition.committed, lag=partition.lag)
            for partition in report.partitions
        ],
    )
    if report.error_at is not None:
        message.last_error_at.CopyFrom(timestamp_of(report.error_at))
    return message
