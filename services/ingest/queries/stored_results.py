"""The store's results with their answers, read through the mesh."""

from __future__ import annotations

from collections.abc import Sequence

from mesh.rpc.channel import AnyChannel
from services.ingest.store_calls import store_errors
from shoal.store.v1 import store_pb2, store_pb2_grpc

_TIMEOUT_S = 20.0
# Up to 64 MiB of answers in one page.


class StoredAnswers:
    """Reads what stands."""

    def __init__(self, channel: AnyChannel) -> None:
        self._stub = store_pb2_grpc.StoreServiceStub(channel)

    async def whole(self, job_ids: Sequence[str]) -> dict[str, store_pb2.Result]:
        """The results that stand for these jobs (at most 1,000), with their answers; jobs that have none are left out.

        Where an answer is damaged, `answer_lost` says so.

        Raises:
            ShoalError: they cannot be read just now.
        """
        found: dict[str, store_pb2.Result] = {}
        request = store_pb2.QueryResultsRequest(job_ids=job_ids, page_size=len(job_ids), include_removed=True)
        while True:
            with store_errors("reading results"):
                page: store_pb2.QueryResultsResponse = await self._stub.QueryResults(request, timeout=_TIMEOUT_S)
            found.update({result.job_id: result for result in page.results})
            if not page.next_page_token:
                return found
            request.page_token = page.next_page_token
