"""Client of a node's results: found, listed, streamed and exported, independently of their jobs."""

from __future__ import annotations

import asyncio
import builtins
from collections.abc import AsyncGenerator
from pathlib import Path

from shoal.client.store.export import Exported, ExportFolder
from shoal.client.store.result import JobResult, ResultFilter, of_stored, to_filter, to_query
from shoal.client.transport import methods
from shoal.client.transport.calls import Caller
from shoal.store.v1 import store_pb2 as store

READ_S = 10.0
"""Timeout of a read, one indexed query."""

STREAM_S = 24 * 3_600.0
"""Timeout of a stream, which normally ends with its results; a day ends a forgotten stream."""

_PAGE = 1_000


class AsyncResults:
    """`client.results`: read, list, stream and export results."""

    def __init__(self, caller: Caller, tenant: str = "") -> None:
        self._caller = caller
        self._tenant = tenant

    async def get(self, job_id: str, *, timeout: float | None = READ_S) -> JobResult:
        """Return the result of a job with its answer; `answer_lost` is set when the answer is damaged in the store.

        Raises:
            NotFound: the job has no result (yet, or any more).
        """
        request = store.GetResultRequest(job_id=job_id)
        response = await self._caller.call(methods.GET_RESULT, request, timeout_s=timeout, doing=f"result of {job_id}")
        return of_stored(response.result)

    async def list(
        self,
        filter: ResultFilter = ResultFilter(),  # noqa: B008 - frozen
        *,
        limit: int = 100,
        answers: bool = False,
        timeout: float | None = READ_S,
    ) -> builtins.list[JobResult]:
        """Return the newest `limit` results that match; with `answers` including their answers.

        A result whose answer is damaged in the store comes without it; `answer_lost` has the reason.

        Raises:
            InvalidArgument: the message names the field of the filter.
        """
        matching = self._filter(filter)
        found: builtins.list[JobResult] = []
        token, deadline = "", self._caller.deadline(timeout)
        while len(found) < limit:
            size = min(limit - len(found), _PAGE)
            query = to_query(matching, page_size=size, page_token=token, omit_response=not answers)
            response = await self._caller.call(methods.QUERY_RESULTS, query, timeout_s=deadline, doing="list results")
            found += map(of_stored, response.results)
            token = response.next_page_token
            if not token:
                break
        return found[:limit]

    async def stream(
        self,
        filter: ResultFilter = ResultFilter(),  # noqa: B008 - frozen
        *,
        answers: bool = True,
        timeout: float | None = STREAM_S,
    ) -> AsyncGenerator[JobResult, None]:
        """Yield every recorded result that matches, oldest first, each once. A broken stream is resumed.

        A result whose answer is damaged in the store comes without it; `answer_lost` has the reason.

        Raises:
            InvalidArgument: the message names the field of the filter.
            Unavailable: no node responds.
        """
        matching = self._filter(filter)
        cursor = ""
        pieces = self._caller.follow(
            methods.STREAM_RESULTS,
            lambda: store.StreamResultsRequest(filter=matching, cursor=cursor, omit_response=not answers),
            timeout_s=timeout,
            ended=lambda piece: piece.complete,
            doing="stream results",
        )
        async for piece in pieces:
            cursor = piece.cursor
            for result in piece.results:
                yield of_stored(result)

    async def export(
        self,
        to: str | Path,
        filter: ResultFilter = ResultFilter(),  # noqa: B008 - frozen
        *,
        answers: bool = True,
        part_rows: int = 0,
        cursor: str = "",
        timeout: float | None = STREAM_S,
    ) -> AsyncGenerator[Exported, None]:
        """Write every recorded result that matches to Parquet files, oldest first, and yield the progress.

        `to` is a local folder, or a URL (`s3://bucket/prefix`, `file:///folder`) to which the node's store writes. A
        broken connection is resumed; an ended export resumes with its last `cursor`. `part_rows` is the largest number
        of rows in a part; 0 is the store's default.

        Raises:
            InvalidArgument: the message names the field.
            PermissionDenied: the store may not write to `to`.
            FailedPrecondition: `to` holds an export, another export is writing there, or the folder is not writable.
            Aborted: the store was blocked for a minute, and another export may be writing there.
        """
        url = str(to) if "://" in str(to) else ""
        folder = None if url else ExportFolder(Path(to))
        matching = self._filter(filter)
        if folder is not None and not cursor:
            await asyncio.to_thread(folder.check_empty)
        responses = self._caller.follow(
            methods.EXPORT_RESULTS,
            lambda: store.ExportResultsRequest(
                filter=matching, url=url, cursor=cursor, omit_response=not answers, part_rows=part_rows
            ),
            timeout_s=timeout,
            ended=lambda piece: piece.complete,
            doing="export results",
        )
        try:
            async for piece in responses:
                if folder is None or await asyncio.to_thread(folder.add, piece):
                    cursor = piece.cursor
                yield Exported(piece.rows, piece.bytes, piece.parts, cursor, piece.complete, piece.answers_lost)
        finally:
            await responses.aclose()
            if folder is not None:
                folder.close()

    def _filter(self, filter: ResultFilter) -> store.ResultFilter:
        message = to_filter(filter)
        message.tenant = message.tenant or self._tenant
        return message
