"""Client of a node's batches: files of rows through one model, with outputs as Parquet."""

from __future__ import annotations

import builtins
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path

from shoal.client.jobs.batch import Batch, BatchFormat, BatchState, of_batch, to_url
from shoal.client.transport import methods
from shoal.client.transport.calls import Caller
from shoal.errors import InvalidArgument
from shoal.ingest.v1 import ingest_pb2 as ingest

SUBMIT_S = 60.0
"""Timeout of a submit: the node checks the files first, and an object store may be slow."""

READ_S = 10.0
"""Timeout of a read, which sums over the chunks of a batch."""

WATCH_S = 7 * 86_400.0
"""Timeout of a watch: batches may run for days; a week ends a forgotten watch."""


class AsyncBatches:
    """`client.batches`: submit, read, watch, pause and cancel batches."""

    def __init__(self, caller: Caller, tenant: str = "") -> None:
        self._caller = caller
        self._tenant = tenant

    async def submit(
        self,
        model: str,
        inputs: str | Path | Sequence[str | Path],
        output: str | Path,
        *,
        format: BatchFormat | str | None = None,
        columns: Mapping[str, str] | None = None,
        keep: Sequence[str] = (),
        outputs: Sequence[str] = (),
        text_outputs: Sequence[str] = (),
        version: int | str = "",
        idempotency_key: str = "",
        tenant: str = "",
        labels: Mapping[str, str] | None = None,
        chunk_rows: int = 0,
        max_attempts: int = 0,
        timeout: float | None = SUBMIT_S,
    ) -> Batch:
        """Submit a batch: run all rows of `inputs` through `model` and write the outputs to `output`.

        `inputs` are URLs of JSONL, Parquet or NPZ files, or paths that the node can read. A URL that ends with a slash
        is a prefix: all files of the format below it, or with `format="objects"` each object as one row. A column feeds
        the input of its name; `columns={"x": "features"}` maps others. `keep` lists columns to copy into the results.
        `text_outputs` lists BYTES outputs that are UTF-8. The batch is durable when this returns, and survives crashes.

        Raises:
            InvalidArgument: the message names the field, or the column and the model's input.
            NotFound: no such file or model. PermissionDenied: the node may not use that location.
            FailedPrecondition: the output holds the results of another batch.
        """
        request = ingest.SubmitBatchRequest(
            inputs=[to_url(place) for place in ([inputs] if isinstance(inputs, str | Path) else inputs)],
            output=to_url(output),
            model_name=model,
            model_version=str(version),
            format=_format(format),
            columns=dict(columns or {}),
            keep_columns=keep,
            outputs=outputs,
            text_outputs=text_outputs,
            idempotency_key=idempotency_key or uuid.uuid4().hex,
            tenant=tenant or self._tenant,
            labels=dict(labels or {}),
            chunk_rows=chunk_rows,
            max_attempts=max_attempts,
        )
        doing = f"submit a batch to {model}"
        response = await self._caller.call(methods.SUBMIT_BATCH, request, timeout_s=timeout, doing=doing)
        return of_batch(response.batch)

    async def get(self, batch_id: str, *, timeout: float | None = READ_S) -> Batch:
        """Return a batch.

        Raises:
            NotFound: no such batch.
        """
        request = ingest.GetBatchRequest(id=batch_id)
        return of_batch((await self._caller.call(methods.GET_BATCH, request, timeout_s=timeout)).batch)

    async def list(
        self,
        *,
        state: BatchState | str | None = None,
        model: str = "",
        tenant: str = "",
        limit: int = 100,
        timeout: float | None = READ_S,
    ) -> builtins.list[Batch]:
        """Return the newest `limit` batches; `state`, `model` and `tenant` are filters."""
        found: builtins.list[Batch] = []
        token, deadline = "", self._caller.deadline(timeout)
        while len(found) < limit:
            request = ingest.ListBatchesRequest(
                state=_state(state),
                model_name=model,
                tenant=tenant or self._tenant,
                page_size=min(limit - len(found), 1_000),
                page_token=token,
            )
            response = await self._caller.call(methods.LIST_BATCHES, request, timeout_s=deadline, doing="list batches")
            found += [of_batch(batch) for batch in response.batches]
            token = response.next_page_token
            if not token:
                break
        return found[:limit]

    async def watch(self, batch_id: str, *, timeout: float | None = WATCH_S) -> AsyncGenerator[Batch, None]:
        """Yield the batch now and after each change, until it has ended. A broken stream is reopened.

        Raises:
            NotFound: no such batch.
            DeadlineExceeded: the batch has not ended in time.
        """
        responses = self._caller.follow(
            methods.WATCH_BATCH,
            lambda: ingest.WatchBatchRequest(id=batch_id),
            timeout_s=timeout,
            ended=lambda response: of_batch(response.batch).ended,
            doing=f"watch batch {batch_id}",
        )
        async for response in responses:
            yield of_batch(response.batch)

    async def wait(self, batch_id: str, *, timeout: float | None = WATCH_S) -> Batch:
        """Wait until the batch has ended and return it. Raises as `watch` does."""
        # A watch ends with an ended batch or raises.
        ended = [batch async for batch in self.watch(batch_id, timeout=timeout) if batch.ended]
        return ended[-1]

    async def cancel(self, batch_id: str, reason: str = "", *, timeout: float | None = READ_S) -> Batch:
        """Request the end of a batch and return it; its written results stay. Usually the batch has ended on return.

        Raises:
            NotFound: no such batch.
        """
        request = ingest.CancelBatchRequest(id=batch_id, reason=reason)
        return of_batch((await self._caller.call(methods.CANCEL_BATCH, request, timeout_s=timeout)).batch)

    async def pause(self, batch_id: str, reason: str = "", *, timeout: float | None = READ_S) -> Batch:
        """Pause a batch until `resume`.

        Raises:
            NotFound: no such batch. FailedPrecondition: the batch has ended.
        """
        request = ingest.PauseBatchRequest(id=batch_id, reason=reason)
        return of_batch((await self._caller.call(methods.PAUSE_BATCH, request, timeout_s=timeout)).batch)

    async def resume(self, batch_id: str, reason: str = "", *, timeout: float | None = READ_S) -> Batch:
        """Resume a paused batch. Raises as `pause` does."""
        request = ingest.ResumeBatchRequest(id=batch_id, reason=reason)
        return of_batch((await self._caller.call(methods.RESUME_BATCH, request, timeout_s=timeout)).batch)


def _format(kind: BatchFormat | str | None) -> str:
    if kind is None:
        return "BATCH_FORMAT_UNSPECIFIED"
    try:
        return f"BATCH_FORMAT_{BatchFormat(kind).name}"
    except ValueError:
        raise InvalidArgument(f"format {str(kind)!r}: use one of {', '.join(BatchFormat)}") from None


def _state(state: BatchState | str | None) -> str:
    if state is None:
        return "BATCH_STATE_UNSPECIFIED"
    known = [str(each) for each in BatchState if each is not BatchState.UNKNOWN]
    if state not in known:
        raise InvalidArgument(f"state {str(state)!r}: use one of {', '.join(known)}")
    return f"BATCH_STATE_{BatchState(state).name}"
