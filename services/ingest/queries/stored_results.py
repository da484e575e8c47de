"""Reads of results with their responses from the store, through the mesh."""

from __future__ import annotations

from collections.abc import Sequence

from mesh.rpc.channel import AnyChannel
from services.ingest.store_calls import store_errors
from shoal.store.v1 import store_pb2, store_pb2_grpc

# One page has up to 64 MiB of responses.
_TIMEOUT_S = 20.0


class StoredResults:
    """Reader of recorded results."""

    def __init__(self, channel: AnyChannel) -> None:
        self._stub = store_pb2_grpc.StoreServiceStub(channel)

    async def read(self, job_ids: Sequence[str]) -> tuple[dict[str, store_pb2.Result], bool]:
        """Return recorded results of at most 1,000 jobs, with their responses; jobs without a result are left out.

        Return one page of large results, and False; else True. The result of a damaged response has `answer_lost`.

        Raises:
            ShoalError: the store is unavailable.
        """
        request = store_pb2.QueryResultsRequest(job_ids=job_ids, page_size=len(job_ids), include_removed=True)
        while True:
            with store_errors("reading results"):
                page: store_pb2.QueryResultsResponse = await self._stub.QueryResults(request, timeout=_TIMEOUT_S)
            found = {result.job_id: result for result in page.results}
            if found or not page.next_page_token:
                return found, not page.next_page_token
            request.page_token = page.next_page_token
