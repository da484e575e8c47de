"""Instances killed and frozen in the middle of a batch: every row is in the results once, with its own answer."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pymongo import AsyncMongoClient

from services.ingest.batches.batch import Chunk
from services.ingest.batches.documents import chunk_document
from services.ingest.batches.inputs.locations import Entry
from services.ingest.batches.inputs.piece import Span
from shoal.ingest.v1 import ingest_pb2 as pb
from tests.breakable import until
from tests.ingest.batches.conftest import LEASE, BatchClient, BatchMesh
from tests.ingest.batches.making import write_lines, write_npz, write_parquet
from tests.ingest.conftest import IngestProcess, StartIngest
from tests.long_form import by_form

pytestmark = pytest.mark.timeout(240)

ROWS = by_form(1_000, 2_000)
# Every third one kills both instances.
KILLS = by_form(3, 6)


async def slow(rows: list[int], context: Any) -> None:
    await asyncio.sleep(0.02)
    if 77 in rows:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "not this one")


async def until_ready(ingests: list[IngestProcess]) -> None:
    for ingest in ingests:
        await ingest.until_ready()


def write_input(kind: str, folder: Path, x: np.ndarray) -> str:
    if kind == "jsonl":
        return write_lines(folder / "in.jsonl", [{"x": row.tolist()} for row in x])
    if kind == "parquet":
        return write_parquet(folder / "in.parquet", {"x": list(x)}, row_group_size=700)
    return write_npz(folder / "in.npz", packed=True, x=x)


def assert_each_row_once(out: Path, x: np.ndarray) -> None:
    parts = sorted(out.glob("part-*.parquet"))
    table = pa.concat_tables([pq.read_table(path) for path in parts])
    dead = [row for path in sorted(out.glob("_dead/*.parquet")) for row in pq.read_table(path).to_pylist()]
    assert [row["row"] for row in dead] == [77]
    rows = table.column("row").to_pylist()
    assert rows == [n for n in range(len(x)) if n != 77]
    assert np.array_equal(np.array(table.column("y").to_pylist(), np.float32), 2 * x[rows])


# A kill is the same for every format; `test_batch_life.py` reads each of them.
@pytest.mark.parametrize("kind", by_form(["jsonl"], ["jsonl", "parquet", "npz"]))
async def test_killed_again_and_again(
    kind: str, mesh: BatchMesh, start_ingest: StartIngest, mongo_uri: str, mongo_database: str, tmp_path: Path
) -> None:
    mesh.infer.before = slow
    x = np.arange(4 * ROWS, dtype=np.float32).reshape(ROWS, 4)
    x[:, 0] = np.arange(ROWS)
    url = write_input(kind, tmp_path, x)
    ingests = [start_ingest(n, **LEASE) for n in range(2)]
    await until_ready(ingests)
    clients = [BatchClient(ingest.address) for ingest in ingests]
    batch = await clients[0].submit_batch(url, f"file://{tmp_path}/out", chunk_rows=60)
    for kill in range(KILLS):
        before = len(mesh.infer.sizes)
        await until(lambda seen=before: len(mesh.infer.sizes) > seen + 12, "some more calls")
        for victim in ingests if kill % 3 == 2 else [ingests[kill % 2]]:
            victim.kill()
            victim.start()
    await until_ready(ingests)
    ended = await clients[1].batch_ended(batch.id, within_s=120)
    assert ended.state == pb.BATCH_STATE_SUCCEEDED, ended
    assert (ended.rows, ended.rows_ok, ended.rows_failed) == (ROWS, ROWS - 1, 1)
    assert_each_row_once(tmp_path / "out", x)
    summary = json.loads((tmp_path / "out" / "_summary.json").read_text())
    assert (summary["rows"], summary["ok"], summary["failed"]) == (ROWS, ROWS - 1, 1)
    assert not (tmp_path / "out" / "_staging").exists()
    await chunks_are_gone(mongo_uri, mongo_database)
    for client in clients:
        await client.channel.close()


async def chunks_are_gone(mongo_uri: str, database: str) -> None:
    async with AsyncMongoClient[dict[str, Any]](mongo_uri) as mongo:

        async def none() -> bool:
            return not await mongo[database]["batch_chunks"].count_documents({})

        await until(none, "no chunk is left")


async def test_what_a_kill_at_the_end_has_left_goes_soon_after_the_start(
    start_ingest: StartIngest, mongo_uri: str, mongo_database: str
) -> None:
    async with AsyncMongoClient[dict[str, Any]](mongo_uri) as mongo:
        left = Chunk("ended", 0, Entry("file:///in.jsonl", 100, "v1"), 0, 10, Span(0, 10, 0, 1), 0)
        await mongo[mongo_database]["batch_chunks"].insert_one(chunk_document(left) | {"free_at": datetime.now(UTC)})
    start_ingest(0, **LEASE)
    await chunks_are_gone(mongo_uri, mongo_database)


async def test_one_that_was_frozen_writes_nothing_when_it_is_back(
    mesh: BatchMesh, start_ingest: StartIngest, tmp_path: Path
) -> None:
    """Its chunks are run by the other meanwhile; what it stages then is not published."""
    mesh.infer.before = slow
    x = np.arange(4 * 600, dtype=np.float32).reshape(600, 4)
    x[:, 0] = np.arange(600)
    url = write_input("jsonl", tmp_path, x)
    ingests = [start_ingest(n, **LEASE) for n in range(2)]
    await until_ready(ingests)
    client = BatchClient(ingests[1].address)
    batch = await client.submit_batch(url, f"file://{tmp_path}/out", chunk_rows=100)
    await until(lambda: len(mesh.infer.sizes) > 4, "both are at it")
    ingests[0].freeze()
    ended = await client.batch_ended(batch.id, within_s=90)
    ingests[0].thaw()
    assert ended.state == pb.BATCH_STATE_SUCCEEDED
    again = BatchClient(ingests[0].address)
    assert (await again.get_batch(batch.id)).rows_ok == 599
    assert_each_row_once(tmp_path / "out", x)
    await client.channel.close()
    await again.channel.close()


async def test_a_stop_gives_its_chunks_back_at_once(
    mesh: BatchMesh, start_ingest: StartIngest, mongo_uri: str, mongo_database: str, tmp_path: Path
) -> None:
    mesh.infer.before = slow
    url = write_input("jsonl", tmp_path, np.zeros((400, 4), np.float32))
    ingest = start_ingest(0, **{**LEASE, "lease_ms": 60_000})
    await ingest.until_ready()
    client = BatchClient(ingest.address)
    await client.submit_batch(url, f"file://{tmp_path}/out", chunk_rows=200)
    await until(lambda: len(mesh.infer.sizes) > 2, "it runs")
    assert ingest.terminate(30) == 0
    async with AsyncMongoClient[dict[str, Any]](mongo_uri) as mongo:
        chunks = await mongo[mongo_database]["batch_chunks"].find().to_list()
    assert chunks
    assert all("lease" not in chunk and chunk["attempts"] == 0 for chunk in chunks), chunks
    await client.channel.close()


async def test_a_chunk_that_kills_whoever_runs_it_ends_its_batch(
    mesh: BatchMesh, start_ingest: StartIngest, tmp_path: Path
) -> None:
    ingest = start_ingest(0, **LEASE)
    await ingest.until_ready()
    under_way = 0
    beside: list[int] = []

    async def kills(rows: list[int], context: Any) -> None:
        nonlocal under_way
        if min(rows) >= 10:  # Another chunk's.
            under_way += 1
            try:
                await asyncio.sleep(1)
            finally:
                under_way -= 1
        if 3 not in rows:
            return
        await asyncio.sleep(0.5)
        beside.append(under_way)
        ingest.kill()
        ingest.start()

    mesh.infer.before = kills
    x = np.repeat(np.arange(40, dtype=np.float32), 4).reshape(40, 4)
    client = BatchClient(ingest.address)
    batch = await client.submit_batch(write_input("jsonl", tmp_path, x), f"file://{tmp_path}/out", chunk_rows=10)
    ended = await client.batch_ended(batch.id, within_s=150)
    assert ended.state == pb.BATCH_STATE_FAILED
    assert "rows 0 to 9: they were started 8 times" in ended.message
    # Others died with it, until it was run by itself.
    assert len(beside) == 8
    assert any(beside[:4])
    assert not any(beside[4:])
    await client.channel.close()
