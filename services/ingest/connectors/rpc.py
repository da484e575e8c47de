"""The calls of IngestService that are about streams."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

from mesh.interceptors import Context
from services.ingest.connectors.run_stream import RunStreams
from shoal.ingest.v1 import ingest_pb2 as pb


class StreamsRpc:
    """A part of the servicer."""

    def __init__(self, run_streams: RunStreams) -> None:
        self._run_streams = run_streams

    async def RunStream(
        self, request_iterator: AsyncIterator[pb.RunStreamRequest], context: Context
    ) -> AsyncIterator[pb.RunStreamResponse]:
        async with aclosing(self._run_streams.serve(request_iterator)) as answers:
            async for response in answers:
                yield response
