"""Duties of a batch, done by one instance at a time: list the inputs, plan the chunks, write the summary.

Each duty may be interrupted anywhere and done again. Files of the output:

    <output>/_batch.json        marker: the batch that owns the output
             _inputs.jsonl      the pinned inputs
             part-*.parquet     succeeded rows
             _dead/part-*       failed rows
             _manifest.json     the list of parts
             _summary.json      counts, speed, failures
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from mesh.mongo import Document
from mesh.process.threads import Threads
from services.ingest.batches.batch import (
    DEAD,
    LISTING,
    MANIFEST,
    MARKER,
    STAGING,
    SUFFIXES,
    SUMMARY,
    Batch,
    Chunk,
    Duty,
    Ending,
    Format,
    Totals,
    ending_of,
    seconds_of,
)
from services.ingest.batches.batch_repository import BatchRepository
from services.ingest.batches.chunk_repository import ChunkRepository
from services.ingest.batches.inputs.listing import line_of
from services.ingest.batches.inputs.locations import Entry, InputLocations
from services.ingest.batches.outputs.part_summary import part_name
from services.ingest.batches.plan import plan
from shoal.errors import AlreadyExists, InvalidArgument

# The marker has one short line. Markers of earlier versions also hold the inputs: up to 1,000 URLs of 2,048 characters.
MARKER_BYTES = 4 << 20
# Chunks in one write; chunks that are written can run while the rest is planned.
_PLANNED_AT_ONCE = 64


class Duties:
    """Executes the duties of batches."""

    def __init__(
        self,
        batches: BatchRepository,
        chunks: ChunkRepository,
        locations: InputLocations,
        threads: Threads,
        *,
        folder: Path,
    ) -> None:
        self._batches = batches
        self._chunks = chunks
        self._locations = locations
        self._threads = threads
        self._folder = folder

    async def do(self, batch: Batch, duty: Duty) -> None:
        """Do one duty of a batch, whose lease the caller holds and renews.

        Raises:
            InvalidArgument, DataLoss, NotFound: the inputs are bad. AlreadyExists: the output is another batch's.
            Unavailable and others: the duty cannot be done now.
        """
        if duty is Duty.LIST:
            await self._list(batch)
        elif duty is Duty.PLAN:
            await self._plan(batch)
        else:
            await self._finish(batch)

    async def _list(self, batch: Batch) -> None:
        assert batch.lease is not None
        await self._threads.run(mark_output, self._locations, batch)
        # Another instance may list too, so the file has the lease's name until the batch records which one counts.
        url = batch.output_url(STAGING, f"inputs-{batch.lease.id}.jsonl")
        files = await self._threads.run(self._write_listing, batch, url)
        entry = await self._threads.run(self._locations.stat, url)
        await self._batches.record_listing(batch, entry, files)

    def _write_listing(self, batch: Batch, url: str) -> int:
        path = _temporary_file(self._folder)
        try:
            files = 0
            with path.open("wb") as file:
                for entry in input_entries(self._locations, batch.inputs, batch.format):
                    file.write(line_of(entry))
                    files += 1
            self._locations.adopt(url, path)
        finally:
            path.unlink(missing_ok=True)
        return files

    async def _plan(self, batch: Batch) -> None:
        while True:
            tail = await self._chunks.last_chunk(batch.id)
            chunks = plan(self._locations, batch, tail)
            if await self._append(chunks):
                await self._batches.mark_planned(batch)
                return

    async def _append(self, chunks: Iterator[Chunk]) -> bool:
        """Add all chunks to the plan. False: another instance has extended the plan, so it must be read again."""
        while group := await self._threads.run(_next_group, chunks):
            if not await self._chunks.append(group):
                return False
        return True

    async def _finish(self, batch: Batch) -> None:
        if batch.totals is None:
            await self._chunks.drop_unfinished(batch.id)
            if not await self._batches.record_totals(batch, await self._chunks.totals(batch.id)):
                return
            batch = await self._batches.get(batch.id)
        ending = ending_of(batch)
        if batch.listing is not None:
            await self._write_end(batch, ending)
        if await self._batches.end(batch, ending):
            await self._chunks.forget(batch.id)

    async def _write_end(self, batch: Batch, ending: Ending) -> None:
        assert batch.listing is not None
        await self._threads.run(self._locations.publish, batch.listing.url, batch.output_url(LISTING))
        manifest = _temporary_file(self._folder)
        try:
            await write_manifest(manifest, batch, self._chunks.done(batch.id))
            await self._threads.run(self._locations.adopt, batch.output_url(MANIFEST), manifest)
        finally:
            manifest.unlink(missing_ok=True)
        summary = json.dumps(summary_of(batch, ending), indent=2).encode()
        await self._threads.run(self._locations.put, batch.output_url(SUMMARY), summary)
        await self._threads.run(self._locations.remove_all, batch.output_url(STAGING) + "/")


def mark_output(locations: InputLocations, batch: Batch) -> None:
    """Mark the output as the batch's own.

    Raises:
        AlreadyExists: the output belongs to another batch.
    """
    # The inputs are in the listing: the marker is read whole, so it stays small whatever a batch reads.
    marker = json.dumps({"batch": batch.id, "model": batch.model_name}).encode()
    try:
        locations.put(batch.output_url(MARKER), marker, only_new=True)
    except AlreadyExists:
        if (owner := owner_of(locations, batch.output)) != batch.id:
            raise AlreadyExists(
                f"output: {batch.output} has the results of batch {owner} already: "
                "use another folder or prefix, or remove what is there"
            ) from None


def owner_of(locations: InputLocations, output: str) -> str:
    """Return the id of the batch that an output belongs to.

    Raises:
        NotFound: the output belongs to no batch. PermissionDenied, Unavailable.
    """
    try:
        return str(json.loads(locations.read(f"{output.rstrip('/')}/{MARKER}", MARKER_BYTES))["batch"])
    except (ValueError, KeyError, TypeError, InvalidArgument):
        return "unknown"


def input_entries(locations: InputLocations, inputs: Sequence[str], kind: Format) -> Iterator[Entry]:
    """Yield the files or objects of the inputs. An input that ends with a slash is a prefix.

    Below a prefix, a file counts when it has the format's suffix and its name does not begin with an underscore.

    Raises:
        InvalidArgument: a prefix has no such file. NotFound: a file does not exist.
    """
    for url in inputs:
        if not url.endswith("/"):
            yield locations.stat(url)
            continue
        found = (entry for entry in locations.list(url) if kind is Format.OBJECTS or _is_of(entry.url, kind))
        first = next(found, None)
        if first is None:
            what = "an object" if kind is Format.OBJECTS else f"a {kind} file"
            raise InvalidArgument(f"inputs: {url} does not contain {what}")
        yield from itertools.chain([first], found)


def format_of(url: str) -> Format | None:
    """Return the format of a file's suffix, or None when the suffix is unknown."""
    name = url.rpartition("/")[2]
    return SUFFIXES.get("." + name.rpartition(".")[2].lower()) if "." in name else None


def _is_of(url: str, kind: Format) -> bool:
    return format_of(url) is kind and not url.rpartition("/")[2].startswith("_")


async def write_manifest(path: Path, batch: Batch, done: AsyncIterator[Document]) -> None:
    """Write the manifest: one line for each part, in the order of the rows."""
    with path.open("w") as file:
        head = {"batch": batch.id, "inputs": batch.inputs, "model": batch.model_name}
        file.write(json.dumps(head)[:-1] + ', "parts": [')
        separator = "\n"
        async for document in done:
            file.write(separator + json.dumps(_part_of(document)))
            separator = ",\n"
        file.write("\n]}\n")


def _part_of(document: Document) -> dict[str, Any]:
    name, done = part_name(document["number"]), document["done"]
    return {
        "first_row": document["first"],
        "rows": document["span"]["rows"],
        "part": name if done["ok"] else None,
        "ok": done["ok"],
        "dead": f"{DEAD}/{name}" if done["failed"] else None,
        "failed": done["failed"],
        "source": document["entry"]["url"],
        "source_row": document["span"]["row"],
    }


def summary_of(batch: Batch, ending: Ending) -> dict[str, Any]:
    """Return the summary of a batch, as JSON values."""
    totals = batch.totals or Totals()
    seconds = seconds_of(batch, batch.ended_at or batch.updated_at)
    return {
        "batch": batch.id,
        "state": str(ending.state),
        "reason": ending.reason,
        "model": batch.model_name,
        "model_versions": list(totals.versions),
        "files": batch.files,
        "rows": totals.rows,
        "ok": totals.ok,
        "failed": totals.failed,
        "failed_by_code": dict(totals.codes),
        "parts_bytes": totals.nbytes,
        "submitted_at": _iso(batch.submitted_at),
        "ended_at": _iso(batch.ended_at or batch.updated_at),
        "seconds": round(seconds, 3),
        "rows_per_second": round((totals.ok + totals.failed) / seconds, 3),
    }


def _iso(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _temporary_file(folder: Path) -> Path:
    descriptor, path = tempfile.mkstemp(dir=folder)
    os.close(descriptor)
    return Path(path)


def _next_group(chunks: Iterator[Chunk]) -> list[Chunk]:
    return list(itertools.islice(chunks, _PLANNED_AT_ONCE))
