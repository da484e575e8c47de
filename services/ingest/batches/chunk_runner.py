"""Runs one chunk: reads its rows, sends them to the model and writes the part, concurrently and in bounded memory.

    reader ──piece──> cells to tensors ──> stacks ──> requests (several in flight) ──in order──> part
       ^                                                                                          │
       └──────────────── reading stops while too many stacks wait to be written ──────────────────┘

The part becomes visible only after the chunk repository has accepted this attempt as the one that counts.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from mesh.process.tasks import end
from mesh.process.threads import Threads
from services.ingest.batches.batch import DEAD, STAGING, Batch, Chunk
from services.ingest.batches.chunk_repository import ChunkCounts
from services.ingest.batches.inputs.locations import InputLocations
from services.ingest.batches.inputs.piece import Piece, Rows
from services.ingest.batches.mapping import RequestedColumns, kept_arrays, result_columns
from services.ingest.batches.outputs.part import OutputPart
from services.ingest.batches.outputs.part_summary import PartSummary, RowError, RowOrigins, part_name
from services.ingest.batches.readers import ReaderCache, naming_file
from services.ingest.batches.row_inference import FailedRow, InferenceClient, RequestSlots, RowInference, SucceededRows
from services.ingest.batches.rows.fitting import FittedInput, fit
from services.ingest.batches.rows.stacking import Stack, stacks
from services.ingest.batches.rows.wire import ModelTarget
from services.ingest.job import Policy
from shoal.errors import Code

# Stacks in flight or waiting to be written, for each request that a tenant may have in flight (two thirds of all): the
# next stack is ready when a request ends.
_STACKS_PER_REQUEST = 2


@dataclass(slots=True)
class ChunkProgress:
    """Progress of a running chunk."""

    now: ChunkCounts = field(default_factory=ChunkCounts)

    def add(self, ok: int, failed: int) -> None:
        """Count rows that are written."""
        self.now = replace(self.now, ok=self.now.ok + ok, failed=self.now.failed + failed)

    def set_note(self, note: str) -> None:
        """Record the cause for which the chunk waits; empty when it no longer waits."""
        if note != self.now.note:
            self.now = replace(self.now, note=note)


@dataclass(frozen=True, slots=True)
class Prepared:
    """Piece whose rows are converted and stacked for the model."""

    piece: Piece
    inputs: Sequence[FittedInput]
    kept: dict[str, Any]
    errors: dict[int, str]
    stacks: Sequence[Stack]


Outcomes = list[SucceededRows | FailedRow]
"""Outcomes of one call for the rows of a stack: outputs, or errors."""


@dataclass(frozen=True, slots=True)
class _Pending:
    """Stack in flight, or (without a task) rows that fit no tensor."""

    prepared: Prepared
    task: asyncio.Task[Outcomes] | None = None


class ChunkRunner:
    """Runs chunks, several concurrently."""

    def __init__(
        self,
        model: InferenceClient,
        locations: InputLocations,
        readers: ReaderCache,
        threads: Threads,
        *,
        folder: Path,
        max_requests: int,
        timeout_s: float,
    ) -> None:
        self._model = model
        self._locations = locations
        self._readers = readers
        self._threads = threads
        self._folder = folder
        self._slots = RequestSlots(max_requests)
        self._window = _STACKS_PER_REQUEST * max(1, max_requests * 2 // 3)
        self._timeout_s = timeout_s
        self.succeeded = self.failed = 0
        """Rows that were written, of all attempts."""
        self.running = 0
        """Chunks that run now."""

    async def run(
        self, batch: Batch, chunk: Chunk, progress: ChunkProgress, model_wait_s: float
    ) -> tuple[str, PartSummary, tuple[str, ...]]:
        """Run a chunk and stage its part. Return the part's staged name, its summary and the model's versions.

        Args:
            model_wait_s: how long to wait for an unavailable model.

        Raises:
            DataLoss: the input has changed. NotFound: the input was removed. Unavailable: the model was unavailable
            for too long, or a storage location is; and other errors of the locations.
        """
        assert chunk.lease is not None
        name = f"{chunk.number:08d}-{chunk.lease.id}"
        versions: set[str] = set()
        self.running += 1
        try:
            with OutputPart(self._folder, name, result_columns(batch)) as part:
                inference = self._row_inference(batch, progress, model_wait_s)
                await self._fill(batch, chunk, part, inference, progress, versions)
                summary = await self._threads.run(part.finish)
                if summary.rows:
                    await self._adopt(batch, f"{name}.parquet", part.file)
                if summary.failed:
                    await self._adopt(batch, f"{name}.dead.parquet", part.dead_file)
        finally:
            self.running -= 1
        return name, summary, tuple(sorted(versions))

    async def publish(self, batch: Batch, chunk: Chunk) -> None:
        """Move a staged part to its final URL; idempotent."""
        name = part_name(chunk.number)
        moves = [(f"{chunk.staged}.parquet", batch.output_url(name))] if chunk.ok else []
        moves += [(f"{chunk.staged}.dead.parquet", batch.output_url(DEAD, name))] if chunk.failed else []
        for staged, final in moves:
            await self._threads.run(self._locations.publish, batch.output_url(STAGING, staged), final)

    async def _adopt(self, batch: Batch, name: str, file: Path) -> None:
        await self._threads.run(self._locations.adopt, batch.output_url(STAGING, name), file)

    def _row_inference(self, batch: Batch, progress: ChunkProgress, model_wait_s: float) -> RowInference:
        return RowInference(
            self._model,
            ModelTarget(batch.model_name, batch.model_version, batch.signature, batch.tenant, batch.caller),
            self._slots,
            policy=Policy(max_attempts=batch.max_attempts),
            timeout_s=self._timeout_s,
            on_wait=progress.set_note,
            model_wait_s=model_wait_s,
        )

    async def _fill(
        self,
        batch: Batch,
        chunk: Chunk,
        part: OutputPart,
        row_inference: RowInference,
        progress: ChunkProgress,
        versions: set[str],
    ) -> None:
        requested = RequestedColumns.of(batch)
        pending: deque[_Pending] = deque()
        rows = await self._threads.run(self._readers.acquire, batch, chunk)
        left = chunk.span.rows
        try:
            while left:
                prepared = await self._threads.run(self._next, rows, left, batch, chunk, requested)
                left -= prepared.piece.count
                if prepared.errors:
                    pending.append(_Pending(prepared))
                for stack in prepared.stacks:
                    task = asyncio.create_task(row_inference.infer(prepared.inputs, stack))
                    pending.append(_Pending(prepared, task))
                    while len(pending) >= self._window:
                        await self._write(chunk, part, pending, progress, versions)
                # Pieces of nothing but failed rows have no stacks that wait.
                while len(pending) >= self._window:
                    await self._write(chunk, part, pending, progress, versions)
            while pending:
                await self._write(chunk, part, pending, progress, versions)
        except BaseException:
            rows.close()
            raise
        finally:
            await end(*(each.task for each in pending if each.task is not None))
        await self._threads.run(self._readers.release, batch, chunk, rows)

    def _next(self, rows: Rows, limit: int, batch: Batch, chunk: Chunk, requested: RequestedColumns) -> Prepared:
        with naming_file(chunk.entry):
            return prepare(requested, rows.read(limit), batch.signature.max_rows)

    async def _write(
        self, chunk: Chunk, part: OutputPart, pending: deque[_Pending], progress: ChunkProgress, versions: set[str]
    ) -> None:
        """Await the first pending stack, and write its outcome and those of the finished stacks after it."""
        ready: list[tuple[Prepared, Outcomes]] = []
        while pending and (not ready or pending[0].task is None or pending[0].task.done()):
            head = pending[0]
            ready.append((head.prepared, unfit_rows(head.prepared) if head.task is None else await head.task))
            pending.popleft()
        versions.update(each.version for _, outcomes in ready for each in outcomes if isinstance(each, SucceededRows))
        ok, failed = await self._threads.run(write, part, chunk, ready)
        self.succeeded += ok
        self.failed += failed
        progress.add(ok, failed)


def prepare(requested: RequestedColumns, piece: Piece, max_rows: int) -> Prepared:
    """Convert a piece to stacks of its valid rows, and the errors of the others."""
    inputs = [fit(spec, piece.columns[column]) for spec, column in requested.inputs]
    kept, errors = kept_arrays(requested, piece)
    for fitted in inputs:
        errors = {**errors, **fitted.errors}
    # A row that could not be read at all has the reader's error, instead of one about missing values.
    errors.update(piece.errors)
    valid = [row for row in range(piece.count) if row not in errors]
    # Cells that no row of a tensor holds are not kept while the stacks wait.
    piece = replace(piece, columns={}, arrow={})
    return Prepared(
        piece, inputs if valid else [], kept if valid else {}, errors, list(stacks(inputs, valid, max_rows))
    )


def unfit_rows(prepared: Prepared) -> Outcomes:
    """Return the rows that could not be sent to the model, as failures."""
    return [
        FailedRow(row, RowError(Code.INVALID_ARGUMENT.name, reason)) for row, reason in sorted(prepared.errors.items())
    ]


def write(part: OutputPart, chunk: Chunk, ready: Sequence[tuple[Prepared, Outcomes]]) -> tuple[int, int]:
    """Add outcomes to a part. Return the numbers of succeeded and of failed rows."""
    ok = failed = 0
    for prepared, outcomes in ready:
        failed_rows = [each for each in outcomes if isinstance(each, FailedRow)]
        for succeeded in (each for each in outcomes if isinstance(each, SucceededRows)):
            rejected = _add(part, chunk, prepared, succeeded)
            ok += len(succeeded.rows) - len(rejected)
            failed_rows += rejected
        if failed_rows:
            part.add_failed(
                origins_of(chunk, prepared.piece, [each.row for each in failed_rows]),
                [each.error for each in failed_rows],
            )
            failed += len(failed_rows)
    return ok, failed


def _add(part: OutputPart, chunk: Chunk, prepared: Prepared, succeeded: SucceededRows) -> list[FailedRow]:
    """Add the outputs of succeeded rows to the output part. Return the rows whose outputs Parquet cannot hold."""
    rows = list(succeeded.rows)
    kept = {name: array.take(pa.array(rows)) for name, array in prepared.kept.items()}
    try:
        part.add(origins_of(chunk, prepared.piece, rows), kept, succeeded.outputs)
    except ValueError as err:
        if len(rows) == 1:
            reason = f"the output cannot be written: {err}: leave the output out of text_outputs"
            return [FailedRow(rows[0], RowError(Code.INTERNAL.name, reason, 1))]
        each = (
            SucceededRows(
                (row,), {name: array[n : n + 1] for name, array in succeeded.outputs.items()}, succeeded.version
            )
            for n, row in enumerate(rows)
        )
        return [rejected for one in each for rejected in _add(part, chunk, prepared, one)]
    return []


def origins_of(chunk: Chunk, piece: Piece, rows: Sequence[int]) -> RowOrigins:
    """Return the origins of rows of a piece, numbered through the whole batch."""
    first = chunk.first + piece.first - chunk.span.row
    if piece.sources is None:
        return RowOrigins(
            [first + row for row in rows], [chunk.entry.url] * len(rows), [piece.first + row for row in rows]
        )
    return RowOrigins([first + row for row in rows], [piece.sources[row] for row in rows], [0] * len(rows))
