"""Batches on a real ingest and a real MongoDB: submitted, run, watched, paused, cancelled, and what is refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mesh.rpc.channel import connect
from shoal.ingest.v1 import ingest_pb2 as pb
from shoal.ingest.v1 import ingest_pb2_grpc
from tests.breakable import until
from tests.ingest.batches.conftest import BatchClient, BatchMesh, batch_mesh
from tests.ingest.batches.making import write_lines, write_npz, write_parquet
from tests.ingest.conftest import IngestProcess
from tests.long_form import by_form

S = grpc.StatusCode


@pytest.fixture
async def mesh(shared_ingest: IngestProcess) -> AsyncIterator[BatchMesh]:
    async with batch_mesh(shared_ingest.folder) as one:
        yield one


@pytest.fixture
async def client(mesh: BatchMesh, shared_ingest: IngestProcess) -> AsyncIterator[BatchClient]:
    made = BatchClient(shared_ingest.address)
    await made.until_mesh_is_reached()
    yield made
    await made.channel.close()


def rows_of_x(count: int) -> np.ndarray:
    """Row n is n, n + 0.25, n + 0.5, n + 0.75."""
    return (np.arange(count, dtype=np.float32)[:, None] + np.arange(4, dtype=np.float32) / 4).astype(np.float32)


def results(out: Path) -> Any:
    """All parts, in the order of their names."""
    return pa.concat_tables([pq.read_table(path) for path in sorted(out.glob("part-*.parquet"))])


def dead(out: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(out.glob("_dead/*.parquet")) for row in pq.read_table(path).to_pylist()]


def assert_doubled(table: Any, x: np.ndarray, rows: list[int] | None = None) -> None:
    """Every one of `rows` (default: all) once, in order, with its own answer."""
    assert table.column("row").to_pylist() == (list(range(len(x))) if rows is None else rows)
    got = np.array(table.column("y").to_pylist(), np.float32)
    assert np.array_equal(got, 2 * (x if rows is None else x[rows]))


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "npz", "packed"])
async def test_each_format_from_end_to_end(kind: str, client: BatchClient, mesh: BatchMesh, tmp_path: Path) -> None:
    x = rows_of_x(100)
    names = [f"n{n}" for n in range(100)]
    url = {
        "jsonl": lambda: write_lines(
            tmp_path / "in.jsonl", [{"x": r.tolist(), "id": n} for r, n in zip(x, names, strict=True)]
        ),
        "parquet": lambda: write_parquet(tmp_path / "in.parquet", {"x": list(x), "id": names}, row_group_size=33),
        "npz": lambda: write_npz(tmp_path / "in.npz", x=x, id=np.array(names)),
        "packed": lambda: write_npz(tmp_path / "in.npz", packed=True, x=x, id=np.array(names)),
    }[kind]()
    out = tmp_path / "out"
    batch = await client.submit_batch(url, f"file://{out}/", chunk_rows=30, keep_columns=["id"])
    assert batch.state == pb.BATCH_STATE_RUNNING
    batch = await client.batch_ended(batch.id)
    assert batch.state == pb.BATCH_STATE_SUCCEEDED, batch
    assert (batch.rows, batch.rows_ok, batch.rows_failed, batch.chunks_done) == (100, 100, 0, 4)
    assert batch.model_versions == ["1"]
    table = results(out)
    assert_doubled(table, x)
    assert table.column("id").to_pylist() == names
    assert table.column("source_row").to_pylist() == list(range(100))
    assert set(table.column("source").to_pylist()) == {url}
    assert max(mesh.infer.sizes) == 8, "rows are stacked up to the model's batch size"
    check_papers(out, batch)


def check_papers(out: Path, batch: pb.Batch) -> None:
    """What is said about the parts is what they have."""
    summary = json.loads((out / "_summary.json").read_text())
    manifest = json.loads((out / "_manifest.json").read_text())
    assert (summary["rows"], summary["ok"], summary["failed"]) == (batch.rows, batch.rows_ok, batch.rows_failed)
    assert summary["batch"] == manifest["batch"] == batch.id
    assert (summary["rows_per_second"] > 0) == (batch.rows_ok + batch.rows_failed > 0)
    for part in manifest["parts"]:
        for name, count in ((part["part"], part["ok"]), (part["dead"], part["failed"])):
            assert (pq.read_metadata(out / name).num_rows if name else 0) == count
    names = {part["part"] for part in manifest["parts"] if part["part"]}
    assert names == {path.name for path in out.glob("part-*")}
    assert not (out / "_staging").exists()
    assert len((out / "_inputs.jsonl").read_text().splitlines()) == batch.files


async def test_rows_that_fail_are_kept_apart_with_their_reasons(
    client: BatchClient, mesh: BatchMesh, tmp_path: Path
) -> None:
    async def refuses(rows: list[int], context: Any) -> None:
        if 13 in rows:
            await context.abort(S.INVALID_ARGUMENT, "thirteen is not taken")
        if 21 in rows:
            await context.abort(S.INTERNAL, "boom")

    mesh.infer.before = refuses
    x = rows_of_x(40)
    lines = [json.dumps({"x": row.tolist()}) for row in x]
    lines[3] = "nonsense"
    lines[5] = json.dumps({"x": [1, 2]})
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    out = tmp_path / "out"
    batch = await client.submit_batch(f"file://{tmp_path}/in.jsonl", f"file://{out}", max_attempts=2)
    batch = await client.batch_ended(batch.id)
    assert batch.state == pb.BATCH_STATE_SUCCEEDED
    assert (batch.rows, batch.rows_ok, batch.rows_failed) == (40, 36, 4)
    assert {each.code: each.rows for each in batch.failures} == {"INVALID_ARGUMENT": 3, "INTERNAL": 1}
    assert_doubled(results(out), x, [n for n in range(40) if n not in (3, 5, 13, 21)])
    found = {row["row"]: row for row in dead(out)}
    assert sorted(found) == [3, 5, 13, 21]
    assert "not JSON" in found[3]["reason"]
    assert "expected the shape [4], got [2]" in found[5]["reason"]
    assert (found[13]["code"], found[13]["reason"]) == ("INVALID_ARGUMENT", "thirteen is not taken")
    assert (found[21]["code"], found[21]["attempts"]) == ("INTERNAL", 2)
    check_papers(out, batch)


async def test_a_batch_of_which_no_row_is_answered_has_failed(
    client: BatchClient, mesh: BatchMesh, tmp_path: Path
) -> None:
    async def refuses(rows: list[int], context: Any) -> None:
        await context.abort(S.INVALID_ARGUMENT, "never")

    mesh.infer.before = refuses
    url = write_lines(tmp_path / "in.jsonl", [{"x": row.tolist()} for row in rows_of_x(9)])
    ended = await client.batch_ended((await client.submit_batch(url, f"file://{tmp_path}/out")).id)
    assert ended.state == pb.BATCH_STATE_FAILED
    assert "no row succeeded (9 INVALID_ARGUMENT)" in ended.message
    assert [row["row"] for row in dead(tmp_path / "out")] == list(range(9))
    check_papers(tmp_path / "out", ended)


async def test_a_prefix_of_files_counts_rows_through_all_of_them(client: BatchClient, tmp_path: Path) -> None:
    x = rows_of_x(50)
    folder = tmp_path / "in"
    folder.mkdir()
    write_parquet(folder / "a.parquet", {"x": list(x[:20])})
    write_parquet(folder / "b.parquet", {"x": list(x[20:])})
    (folder / "_SUCCESS").write_text("")
    batch = await client.submit_batch(f"file://{folder}/", f"file://{tmp_path}/out", chunk_rows=7)
    batch = await client.batch_ended(batch.id)
    assert (batch.state, batch.files, batch.rows_ok) == (pb.BATCH_STATE_SUCCEEDED, 2, 50)
    assert batch.format == pb.BATCH_FORMAT_PARQUET
    table = results(tmp_path / "out")
    assert_doubled(table, x)
    assert table.column("source_row").to_pylist() == [*range(20), *range(30)]


async def test_watching_shows_progress_to_the_end(client: BatchClient, mesh: BatchMesh, tmp_path: Path) -> None:
    answered, is_seen = 0, asyncio.Event()

    async def held_back(rows: list[int], context: Any) -> None:
        nonlocal answered
        if answered >= 500:  # No chunk can end before progress was seen.
            await is_seen.wait()
        answered += len(rows)

    mesh.infer.before = held_back
    url = write_lines(tmp_path / "in.jsonl", [{"x": row.tolist()} for row in rows_of_x(2_000)])
    batch = await client.submit_batch(url, f"file://{tmp_path}/out", chunk_rows=1_000)
    seen = []
    async for answer in client.stub.WatchBatch(pb.WatchBatchRequest(id=batch.id), timeout=60):
        seen.append(answer.batch)
        if 0 < answer.batch.rows_ok < 2_000:
            is_seen.set()
    assert seen[-1].state == pb.BATCH_STATE_SUCCEEDED
    rows = [each.rows_ok for each in seen]
    assert rows == sorted(rows)
    assert any(0 < each.rows_ok < 2_000 for each in seen), "progress within chunks is seen"


async def test_a_paused_batch_stands_still_and_goes_on(client: BatchClient, mesh: BatchMesh, tmp_path: Path) -> None:
    is_paused = asyncio.Event()

    async def held_back(rows: list[int], context: Any) -> None:
        if len(mesh.infer.sizes) > 20:  # It cannot end before it is paused.
            await is_paused.wait()
        await asyncio.sleep(0.05)

    mesh.infer.before = held_back
    x = rows_of_x(1_000)
    url = write_lines(tmp_path / "in.jsonl", [{"x": row.tolist()} for row in x])
    batch = await client.submit_batch(url, f"file://{tmp_path}/out", chunk_rows=100)
    await until(lambda: len(mesh.infer.sizes) > 20, "some calls")
    paused = (await client.stub.PauseBatch(pb.PauseBatchRequest(id=batch.id, reason="lunch"), timeout=20)).batch
    assert paused.state == pb.BATCH_STATE_PAUSED
    is_paused.set()

    async def stands_still() -> bool:
        before = len(mesh.infer.sizes)
        await asyncio.sleep(0.5)
        return len(mesh.infer.sizes) == before

    await until(stands_still, "no more calls")
    again = (await client.stub.PauseBatch(pb.PauseBatchRequest(id=batch.id), timeout=20)).batch
    assert again.state == pb.BATCH_STATE_PAUSED
    await client.stub.ResumeBatch(pb.ResumeBatchRequest(id=batch.id), timeout=20)
    ended = await client.batch_ended(batch.id)
    assert ended.state == pb.BATCH_STATE_SUCCEEDED
    assert [step.state for step in ended.transitions] == [
        pb.BATCH_STATE_RUNNING,
        pb.BATCH_STATE_PAUSED,
        pb.BATCH_STATE_RUNNING,
        pb.BATCH_STATE_SUCCEEDED,
    ]
    assert ended.transitions[1].reason == "lunch"
    assert_doubled(results(tmp_path / "out"), x)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await client.stub.PauseBatch(pb.PauseBatchRequest(id=batch.id), timeout=20)
    assert refused.value.code() == S.FAILED_PRECONDITION


@pytest.mark.parametrize("first", ["", "pause"])
async def test_a_cancelled_batch_keeps_what_it_has(
    first: str, client: BatchClient, mesh: BatchMesh, tmp_path: Path
) -> None:
    async def slow(rows: list[int], context: Any) -> None:
        await asyncio.sleep(0.05)

    mesh.infer.before = slow
    x = rows_of_x(4_000)
    url = write_lines(tmp_path / "in.jsonl", [{"x": row.tolist()} for row in x])
    batch = await client.submit_batch(url, f"file://{tmp_path}/out", chunk_rows=50)

    async def has_some() -> bool:
        return (await client.get_batch(batch.id)).chunks_done >= 2

    await until(has_some, "two chunks")
    if first:
        await client.stub.PauseBatch(pb.PauseBatchRequest(id=batch.id), timeout=20)
    await client.stub.CancelBatch(pb.CancelBatchRequest(id=batch.id, reason="enough"), timeout=20)
    ended = await client.batch_ended(batch.id)
    assert ended.state == pb.BATCH_STATE_CANCELLED
    assert ended.message == "cancelled: enough"
    table = results(tmp_path / "out")
    assert 0 < table.num_rows == ended.rows_ok < 4_000
    assert_doubled(table, x, table.column("row").to_pylist())
    check_papers(tmp_path / "out", ended)
    calls = len(mesh.infer.sizes)
    again = (await client.stub.CancelBatch(pb.CancelBatchRequest(id=batch.id), timeout=20)).batch
    assert again.message == "cancelled: enough"
    assert len(mesh.infer.sizes) == calls


async def test_an_outage_of_the_model_is_waited_for(client: BatchClient, mesh: BatchMesh, tmp_path: Path) -> None:
    x = rows_of_x(64)
    url = write_lines(tmp_path / "in.jsonl", [{"x": row.tolist()} for row in x])
    seen = 0

    async def goes(rows: list[int], context: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == 3:
            mesh.infer.is_there = False

    mesh.infer.before = goes
    batch = await client.submit_batch(url, f"file://{tmp_path}/out", chunk_rows=16)

    async def waits() -> bool:
        return "NOT_FOUND" in (await client.get_batch(batch.id)).waits_for

    await until(waits, "it says what it waits for")
    mesh.infer.is_there = True
    ended = await client.batch_ended(batch.id)
    assert (ended.state, ended.rows_ok, ended.rows_failed) == (pb.BATCH_STATE_SUCCEEDED, 64, 0)
    assert_doubled(results(tmp_path / "out"), x)


async def test_a_batch_that_waits_for_its_model_leaves_room_for_others(
    client: BatchClient, mesh: BatchMesh, tmp_path: Path
) -> None:
    x = rows_of_x(64)
    url = write_lines(tmp_path / "in.jsonl", [{"x": row.tolist(), "data": "a"} for row in x])

    all_are_in = asyncio.Event()

    async def goes(rows: list[int], context: Any) -> None:
        await all_are_in.wait()
        mesh.infer.is_there = False

    mesh.infer.before = goes
    waiting = [await client.submit_batch(url, f"file://{tmp_path}/out{n}", chunk_rows=4) for n in range(by_form(2, 3))]
    all_are_in.set()

    async def waits() -> bool:
        return all(["NOT_FOUND" in (await client.get_batch(one.id)).waits_for for one in waiting[:1]])

    await until(waits, "it waits")
    other = await client.submit_batch(url, f"file://{tmp_path}/other", model="length", chunk_rows=4)
    assert (await client.batch_ended(other.id, within_s=90)).rows_ok == 64
    mesh.infer.before = None
    mesh.infer.is_there = True
    for n, one in enumerate(waiting):
        ended = await client.batch_ended(one.id, within_s=90)
        assert (ended.state, ended.rows_ok) == (pb.BATCH_STATE_SUCCEEDED, 64)
        assert_doubled(results(tmp_path / f"out{n}"), x)


async def test_an_input_that_changes_meanwhile_fails_the_batch(
    client: BatchClient, mesh: BatchMesh, tmp_path: Path
) -> None:
    url = write_lines(tmp_path / "in.jsonl", [{"x": row.tolist()} for row in rows_of_x(64)])

    async def changes(rows: list[int], context: Any) -> None:
        write_lines(tmp_path / "in.jsonl", [{"x": [0, 0, 0, 0]}])

    mesh.infer.before = changes
    batch = await client.submit_batch(url, f"file://{tmp_path}/out", chunk_rows=4)
    ended = await client.batch_ended(batch.id)
    assert ended.state == pb.BATCH_STATE_FAILED
    # Noticed before its rows are read, or while they are.
    told = ("has changed since the batch was submitted", "it was longer when the batch was planned")
    assert any(words in ended.message for words in told), ended.message
    check_papers(tmp_path / "out", ended)


async def test_a_key_makes_one_batch_and_an_output_has_one_owner(client: BatchClient, tmp_path: Path) -> None:
    url = write_lines(tmp_path / "in.jsonl", [{"x": row.tolist()} for row in rows_of_x(8)])
    out = f"file://{tmp_path}/out"
    first = await client.submit_batch(url, out, idempotency_key="k")
    await client.batch_ended(first.id)
    assert (await client.submit_batch(url, out, idempotency_key="k")).id == first.id
    for fields, code in (
        ({"idempotency_key": "k", "chunk_rows": 3}, S.ALREADY_EXISTS),
        ({}, S.FAILED_PRECONDITION),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await client.submit_batch(url, out, **fields)
        assert refused.value.code() == code


@pytest.mark.parametrize("name", ["part-00000000.parquet", "part-7.snappy.parquet", "_manifest.json", "_dead/part-1"])
async def test_an_output_with_results_of_somebody_else_is_refused_and_left_as_it_is(
    client: BatchClient, tmp_path: Path, name: str
) -> None:
    url = write_lines(tmp_path / "in.jsonl", [{"x": row.tolist()} for row in rows_of_x(8)])
    theirs = tmp_path / "out" / name
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"theirs")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await client.submit_batch(url, f"file://{tmp_path}/out")
    assert refused.value.code() == S.FAILED_PRECONDITION
    assert name in str(refused.value.details())
    assert theirs.read_bytes() == b"theirs"
    theirs.rename(tmp_path / "out" / "readme.txt")
    batch = await client.submit_batch(url, f"file://{tmp_path}/out")
    assert (await client.batch_ended(batch.id)).rows_ok == 8


async def test_a_file_is_no_output(client: BatchClient, tmp_path: Path) -> None:
    url = write_lines(tmp_path / "in.jsonl", [{"x": row.tolist()} for row in rows_of_x(8)])
    with pytest.raises(grpc.aio.AioRpcError, match=r"in\.jsonl is a file: name a folder") as refused:
        await client.submit_batch(write_lines(tmp_path / "more.jsonl", [{"x": [1, 2, 3, 4]}]), url)
    assert refused.value.code() == S.INVALID_ARGUMENT


async def test_empty_files_of_lines_come_first_and_say_nothing_of_columns(client: BatchClient, tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).touch()
    with pytest.raises(grpc.aio.AioRpcError, match="no line in it") as refused:
        await client.submit_batch(f"file://{tmp_path}/in/", f"file://{tmp_path}/out")
    assert refused.value.code() == S.INVALID_ARGUMENT
    write_lines(tmp_path / "in" / "c.jsonl", [{"x": row.tolist(), "id": n} for n, row in enumerate(rows_of_x(8))])
    batch = await client.submit_batch(f"file://{tmp_path}/in/", f"file://{tmp_path}/out", keep_columns=["id"])
    ended = await client.batch_ended(batch.id)
    assert (ended.rows_ok, ended.rows_failed, ended.files) == (8, 0, 3)


async def test_two_batches_for_one_output_at_once_have_one_winner(client: BatchClient, tmp_path: Path) -> None:
    url = write_lines(tmp_path / "in.jsonl", [{"x": row.tolist()} for row in rows_of_x(8)])
    tries = await asyncio.gather(
        *(client.submit_batch(url, f"file://{tmp_path}/out") for _ in range(4)), return_exceptions=True
    )
    ended = [await client.batch_ended(one.id) for one in tries if isinstance(one, pb.Batch)]
    assert sum(one.state == pb.BATCH_STATE_SUCCEEDED for one in ended) == 1
    assert all("has the results of batch" in one.message for one in ended if one.state == pb.BATCH_STATE_FAILED)
    assert_doubled(results(tmp_path / "out"), rows_of_x(8))


async def test_pages_of_batches(client: BatchClient, tmp_path: Path) -> None:
    before = len((await client.stub.ListBatches(pb.ListBatchesRequest(page_size=1_000), timeout=20)).batches)
    url = write_lines(tmp_path / "in.jsonl", [{"x": row.tolist()} for row in rows_of_x(2)])
    ids = []
    for n in range(3):
        ids.append((await client.submit_batch(url, f"file://{tmp_path}/{n}", tenant=f"t{n % 2}")).id)
    for batch_id in ids:
        await client.batch_ended(batch_id)
    first = await client.stub.ListBatches(pb.ListBatchesRequest(page_size=2), timeout=20)
    rest = await client.stub.ListBatches(
        pb.ListBatchesRequest(page_size=before + 1, page_token=first.next_page_token), timeout=20
    )
    assert [one.id for one in [*first.batches, *rest.batches]][:3] == ids[::-1]
    assert len(rest.batches) == before + 1
    assert not rest.next_page_token
    mine = await client.stub.ListBatches(
        pb.ListBatchesRequest(tenant="t1", state=pb.BATCH_STATE_SUCCEEDED, model_name="double"), timeout=20
    )
    assert [one.id for one in mine.batches] == [ids[1]]


def bad_requests(folder: Path) -> list[tuple[str, dict[str, Any], grpc.StatusCode, str]]:
    good = write_lines(folder / "good.jsonl", [{"x": [1, 2, 3, 4], "id": 1}])
    other = write_lines(folder / "other.jsonl", [{"a": 1}])
    nothing = folder / "nothing"
    nothing.mkdir()
    (folder / "fake.parquet").write_text("no")
    (folder / "mixed").mkdir()
    for name in ("a.parquet", "b.npz", "readme.txt"):
        (folder / "mixed" / name).write_text("no")
    ok = {"inputs": [good], "output": f"file://{folder}/o", "model_name": "double"}
    cases: list[tuple[dict[str, Any], grpc.StatusCode, str]] = [
        ({"inputs": []}, S.INVALID_ARGUMENT, "inputs: 1 to 1000 URLs"),
        ({"inputs": ["x"] * 1001}, S.INVALID_ARGUMENT, "inputs: 1 to 1000"),
        ({"inputs": ["rows.jsonl"]}, S.INVALID_ARGUMENT, "inputs[0]: 'rows.jsonl' is not a URL"),
        ({"inputs": ["gs://b/x.jsonl"]}, S.PERMISSION_DENIED, "SHOAL_INGEST_BATCH_URLS"),
        ({"inputs": [f"file://{folder}/none.jsonl"]}, S.NOT_FOUND, "none.jsonl"),
        ({"inputs": [f"file://{folder}/nothing/"]}, S.INVALID_ARGUMENT, "no file is below"),
        ({"inputs": [f"file://{folder}/mixed/"]}, S.INVALID_ARGUMENT, "several formats"),
        ({"inputs": [f"file://{folder}/nothing"]}, S.INVALID_ARGUMENT, "has no known suffix"),
        ({"inputs": [f"file://{folder}/fake.parquet"]}, S.INVALID_ARGUMENT, "fake.parquet: not a Parquet file"),
        ({"inputs": [other]}, S.INVALID_ARGUMENT, "the inputs have the columns a"),
        ({"inputs": [good], "format": pb.BATCH_FORMAT_NPZ}, S.INVALID_ARGUMENT, "not an NPZ file"),
        ({"inputs": [f"file://{folder}/"], "format": pb.BATCH_FORMAT_NPZ}, S.INVALID_ARGUMENT, "lies within"),
        ({"output": ""}, S.INVALID_ARGUMENT, "output: required"),
        ({"output": "here"}, S.INVALID_ARGUMENT, "output: 'here' is not a URL"),
        ({"output": f"file://{folder}"}, S.INVALID_ARGUMENT, "lies within"),
        ({"model_name": ""}, S.INVALID_ARGUMENT, "model_name: required"),
        ({"model_name": "nope"}, S.NOT_FOUND, "nope"),
        ({"columns": {"w": "x"}}, S.INVALID_ARGUMENT, "no input 'w': it takes x FP32 [4]"),
        ({"columns": {"x": "w"}}, S.INVALID_ARGUMENT, "needs a column 'w'"),
        ({"columns": {"x": "id"}}, S.INVALID_ARGUMENT, "expected the shape [4], got []"),
        ({"keep_columns": ["nope"]}, S.INVALID_ARGUMENT, "keep_columns: no column 'nope': there are id, x"),
        ({"keep_columns": ["id", "id"]}, S.INVALID_ARGUMENT, "occurs twice"),
        ({"outputs": ["nope"]}, S.INVALID_ARGUMENT, "no output 'nope'"),
        ({"text_outputs": ["y"]}, S.INVALID_ARGUMENT, "not a requested output"),
        ({"format": 99}, S.INVALID_ARGUMENT, "format: not a batch format: 99"),
        ({"chunk_rows": -1}, S.INVALID_ARGUMENT, "chunk_rows: 0"),
        ({"max_attempts": 101}, S.INVALID_ARGUMENT, "max_attempts: 0"),
        ({"idempotency_key": "k" * 129}, S.INVALID_ARGUMENT, "idempotency_key: at most 128"),
        ({"tenant": "t" * 65}, S.INVALID_ARGUMENT, "tenant: at most 64"),
        ({"labels": {"k" * 257: ""}}, S.INVALID_ARGUMENT, "at most 256"),
    ]
    return [(words, {**ok, **fields}, code, words) for fields, code, words in cases]


async def test_what_cannot_be_run_is_refused_by_name(client: BatchClient, mesh: BatchMesh, tmp_path: Path) -> None:
    before = await client.stub.ListBatches(pb.ListBatchesRequest(), timeout=20)
    for _, fields, code, words in bad_requests(tmp_path):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await client.stub.SubmitBatch(pb.SubmitBatchRequest(**fields), timeout=20)
        assert (refused.value.code(), words in (refused.value.details() or "")) == (code, True), (
            fields,
            refused.value.code(),
            refused.value.details(),
        )
    listed = await client.stub.ListBatches(pb.ListBatchesRequest(), timeout=20)
    assert listed == before, "nothing of it was taken"
    assert not mesh.infer.sizes


@pytest.mark.parametrize("method", ["GetBatch", "CancelBatch", "PauseBatch", "ResumeBatch", "WatchBatch"])
@pytest.mark.parametrize(
    ("batch_id", "code"), [("", S.INVALID_ARGUMENT), ("x", S.NOT_FOUND), ("0" * 26, S.NOT_FOUND)], ids=str
)
async def test_ids_that_name_no_batch(method: str, batch_id: str, code: Any, shared_ingest: IngestProcess) -> None:
    async with connect(shared_ingest.address) as channel:
        stub = ingest_pb2_grpc.IngestServiceStub(channel)
        call = getattr(stub, method)(getattr(pb, f"{method}Request")(id=batch_id), timeout=20)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await (anext(aiter(call)) if method == "WatchBatch" else call)
    assert refused.value.code() == code
