"""The results of a node: found, listed, streamed and exported, long after their jobs are forgotten."""

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
"""One indexed query."""

STREAM_S = 24 * 3_600.0
"""A stream ends with its results; a day ends one that was forgotten."""

_PAGE = 1_000


class AsyncResults:
    """`client.results`."""

    def __init__(self, caller: Caller, tenant: str = "") -> None:
        self._caller = caller
        self._tenant = tenant

    async def get(self, job_id: str, *, timeout: float = READ_S) -> JobResult:
        """The result of a job, with its answer; where that is damaged in the store, `answer_lost` says why.

        Raises:
            NotFound: it has none (yet, or no more).
        """
        request = store.GetResultRequest(job_id=job_id)
        answer = await self._caller.call(methods.GET_RESULT, request, timeout_s=timeout, doing=f"result of {job_id}")
        return of_stored(answer.result)

    async def list(
        self,
        filter: ResultFilter = ResultFilter(),  # noqa: B008 - frozen
        *,
        limit: int = 100,
        answers: bool = False,
        timeout: float = READ_S,
    ) -> builtins.list[JobResult]:
        """The newest `limit` results that match, with their answers when `answers` is true.

        One whose answer is damaged in the store comes without it: `answer_lost` says why.

        Raises:
            InvalidArgument: names what is wrong with the filter.
        """
        wanted = self._wanted(filter)
        found: builtins.list[JobResult] = []
        token = ""
        while len(found) < limit:
            size = min(limit - len(found), _PAGE)
            query = to_query(wanted, page_size=size, page_token=token, omit_response=not answers)
            answer = await self._caller.call(methods.QUERY_RESULTS, query, timeout_s=timeout, doing="list results")
            found += map(of_stored, answer.results)
            token = answer.next_page_token
            if not token:
                break
        return found[:limit]

    async def stream(
        self,
        filter: ResultFilter = ResultFilter(),  # noqa: B008 - frozen
        *,
        answers: bool = True,
        timeout: float = STREAM_S,
    ) -> AsyncGenerator[JobResult, None]:
        """Every result that matches and is recorded now, oldest first, each once. Goes on where a stream breaks.

        One whose answer is damaged in the store comes without it: `answer_lost` says why.

        Raises:
            InvalidArgument: names what is wrong with the filter.
            Unavailable: nobody answers.
        """
        wanted = self._wanted(filter)
        cursor = ""
        pieces = self._caller.follow(
            methods.STREAM_RESULTS,
            lambda: store.StreamResultsRequest(filter=wanted, cursor=cursor, omit_response=not answers),
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
        timeout: float = STREAM_S,
    ) -> AsyncGenerator[Exported, None]:
        """Writes every result that matches and is recorded now to Parquet files, oldest first, and says how far it is.

        `to` is a folder here, or a URL (`s3://bucket/prefix`, `file:///folder`) that the node's store writes to. Goes
        on where the connection breaks; one that was given up goes on with its last `cursor`. `part_rows`: rows of one
        part at most; 0 for the store's default.

        Raises:
            InvalidArgument: names what is wrong.
            PermissionDenied: the store may not write there.
            FailedPrecondition: an export lies there already, another is being written there, or the folder cannot be
                written.
            Aborted: the store stood still for a minute, and another export may be written there by now.
        """
        url = str(to) if "://" in str(to) else ""
        folder = None if url else ExportFolder(Path(to))
        wanted = self._wanted(filter)
        if folder is not None and not cursor:
            await asyncio.to_thread(folder.check_empty)
        answered = self._caller.follow(
            methods.EXPORT_RESULTS,
            lambda: store.ExportResultsRequest(
                filter=wanted, url=url, cursor=cursor, omit_response=not answers, part_rows=part_rows
            ),
            timeout_s=timeout,
            ended=lambda piece: piece.complete,
            doing="export results",
        )
        try:
            async for piece in answered:
                if folder is None or await asyncio.to_thread(folder.take, piece):
                    cursor = piece.cursor
                yield Exported(piece.rows, piece.bytes, piece.parts, cursor, piece.complete, piece.answers_lost)
        finally:
            await answered.aclose()
            if folder is not None:
                folder.close()

    def _wanted(self, filter: ResultFilter) -> store.ResultFilter:
        wanted = to_filter(filter)
        wanted.tenant = wanted.tenant or self._tenant
        return wanted
