"""ExportResults over the wire: to a folder, to S3, to the caller; broken off anywhere; and where it may not write."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pyarrow.parquet as pq
import pytest
from grpc import StatusCode
from pymongo import AsyncMongoClient

from mesh.process.threads import Threads
from services.store.config import StoreConfig
from services.store.documents import Collections
from services.store.exports import part
from services.store.exports.claim import Claim
from services.store.exports.locations import ExportLocations, FolderLocation, name_of
from services.store.exports.table import table_of
from shoal.errors import Aborted, InvalidArgument, PermissionDenied
from shoal.store.v1 import store_pb2 as pb
from tests.breakable import until
from tests.seaweedfs import WeedProcess
from tests.store.conftest import Store, on_shared_loop, refused, running_store
from tests.store.test_result_rpc import BAD, FAILED, answer, get, put, result
from tests.store.test_result_stream import large, rot

pytestmark = pytest.mark.mongo

DENIED, PRECONDITION = StatusCode.PERMISSION_DENIED, StatusCode.FAILED_PRECONDITION


@pytest.fixture
def allowed(tmp_path: Path) -> Path:
    return tmp_path / "allowed" / "exports"


@pytest.fixture
async def store(config: StoreConfig, allowed: Path) -> AsyncIterator[Store]:
    exports = (allowed.as_uri(), "s3://shoal")
    # A call that was broken off counts until the part that it writes is on the disk: on a busy machine, longer than the
    # next calls of a test take.
    async with running_store(config.model_copy(update={"exports": exports, "max_exports": 100})) as running:
        yield running


def export(store: Store, url: str = "", **fields: object):
    return store.stub.ExportResults(pb.ExportResultsRequest(url=url, **fields), timeout=100)


async def whole(call: object) -> list[pb.ExportResultsResponse]:
    found = [piece async for piece in call]
    assert [piece.complete for piece in found] == [False] * (len(found) - 1) + [True]
    return found


async def recorded(store: Store, count: int) -> list[dict[str, object]]:
    """Records results of every kind; gives the rows that an export must have, in order."""
    named = [f"j{n:05}" for n in range(count)]
    for first in range(0, count, 100):
        some = named[first : first + 100]
        labels = [{"n": str(int(job[1:]) % 3)} for job in some]
        await put(
            store,
            *(result(job, FAILED if at % 10 == 0 else 1, labels=labels[at], tenant="t") for at, job in enumerate(some)),
        )
    return table_of([await get(store, job) for job in named]).to_pylist()


def read(folder: Path) -> list[dict[str, object]]:
    files = sorted(folder.glob("part-*.parquet"))
    manifest = json.loads((folder / "_manifest.json").read_text())
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    assert pq.read_table(folder).to_pylist() == rows  # The folder as it is: readers pass over the manifest.
    assert (manifest["parts"], manifest["rows"]) == (len(files), len(rows))
    assert manifest["bytes"] == sum(file.stat().st_size for file in files)
    assert [file.name for file in files] == [f"part-{n:05}.parquet" for n in range(len(files))]
    return rows


def written(folder: Path, pieces: list[pb.ExportResultsResponse]) -> Path:
    """Puts the files that came as messages into a folder."""
    folder.mkdir(exist_ok=True)
    for piece in pieces:
        if piece.file:
            with (folder / piece.file).open("r+b" if piece.offset else "wb") as out:
                out.seek(piece.offset)
                out.write(piece.chunk)
    return folder


async def test_to_a_folder(store: Store, allowed: Path) -> None:
    rows = await recorded(store, 250)
    told = await whole(export(store, f"{allowed.as_uri()}/monday", part_rows=100))
    assert read(allowed / "monday") == rows
    assert [piece.rows for piece in told] == sorted(piece.rows for piece in told)
    assert (told[-1].rows, told[-1].parts) == (250, 3)
    assert {path.name for path in (allowed / "monday").iterdir() if not path.name.startswith("_export-")} == {
        "part-00000.parquet", "part-00001.parquet", "part-00002.parquet", "_manifest.json"
    }  # fmt: skip


async def test_to_the_caller(store: Store, tmp_path: Path) -> None:
    rows = await recorded(store, 120)
    pieces = await whole(export(store, part_rows=50))
    assert read(written(tmp_path / "here", pieces)) == rows
    assert max(len(piece.chunk) for piece in pieces) <= 1 << 20


async def test_to_s3(store: Store, s3_access: WeedProcess, tmp_path: Path) -> None:
    rows = await recorded(store, 130)
    url = s3_access.prefix()
    await whole(export(store, url, part_rows=60))
    there = s3_access.store(url)
    folder = tmp_path / "fetched"
    folder.mkdir()
    for page in there.list():
        for meta in page:
            (folder / meta["path"]).write_bytes(bytes(there.get(meta["path"]).bytes()))
    assert read(folder) == rows
    await refused(export(store, url), PRECONDITION, "_manifest.json")


async def test_a_filter_and_no_answers(store: Store, allowed: Path) -> None:
    rows = await recorded(store, 90)
    url = f"{allowed.as_uri()}/some"
    await whole(export(store, url, filter=pb.ResultFilter(labels={"n": "1"}, outcome=1), omit_response=True))
    expected = [
        {**row, "outputs": None, "parameters": None}
        for row in rows
        if dict(row["labels"]) == {"n": "1"} and row["outcome"] == "succeeded"
    ]
    assert read(allowed / "some") == expected
    assert len(expected) > 20
    manifest = json.loads((allowed / "some" / "_manifest.json").read_text())
    assert (manifest["filter"], manifest["answers"]) == (
        {"labels": {"n": "1"}, "outcome": "OUTCOME_SUCCEEDED"}, False
    )  # fmt: skip


async def test_nothing_to_export(store: Store, allowed: Path) -> None:
    await whole(export(store, f"{allowed.as_uri()}/none"))
    assert read(allowed / "none") == []


async def test_a_made_up_cursor_replaces_no_file_of_an_export(store: Store, allowed: Path) -> None:
    rows = await recorded(store, 20)
    for name, count in (("finished", None), ("broken", 2)):
        url = f"{allowed.as_uri()}/{name}"
        call = export(store, url, part_rows=10)
        told = await whole(call) if count is None else [await call.read() for _ in range(count)]
        call.cancel()
        # Without the part that the broken export is writing.
        before = {path.name: path.read_bytes() for path in (allowed / name).iterdir() if path.name[0] != "."}
        parts, written_rows, size, lost, own, token = told[0].cursor.split(".")
        forged = ".".join([parts, written_rows, size, lost, "0" * len(own), token])

        async def is_free(url: str = url, forged: str = forged) -> bool:
            """The broken export has let its place go."""
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await whole(export(store, url, part_rows=10, cursor=forged))
            assert caught.value.code() == PRECONDITION
            return "belongs to no export" in (caught.value.details() or "")

        await until(is_free, "the refusal of the cursor")
        after = {path.name: path.read_bytes() for path in (allowed / name).iterdir()}
        assert {name: after[name] for name in before} == before
        # Its own cursor still resumes.
        await whole(export(store, url, part_rows=10, cursor=told[0].cursor))
        assert read(allowed / name) == rows


@pytest.mark.parametrize("to_caller", [False, True])
async def test_it_goes_on_after_every_part(store: Store, allowed: Path, tmp_path: Path, to_caller: bool) -> None:
    """Broken off after the first new part of each call, while results are recorded: the rows of the beginning, once."""
    rows = await recorded(store, 200)
    url = "" if to_caller else f"{allowed.as_uri()}/broken"
    folder = tmp_path / "broken" if to_caller else allowed / "broken"
    cursor, complete, calls = "", False, 0
    while not complete:
        call = export(store, url, part_rows=30, cursor=cursor)
        taken: list[pb.ExportResultsResponse] = []
        calls += 1
        async for piece in call:
            taken.append(piece)
            is_whole = not piece.file or piece.offset + len(piece.chunk) == piece.file_bytes
            complete = piece.complete
            if is_whole and piece.cursor != (cursor or taken[0].cursor):
                cursor = piece.cursor
                break
        call.cancel()
        if to_caller:
            written(folder, taken)
        await put(store, result(f"later{calls}"))
    assert calls >= 7
    assert read(folder) == rows


async def test_writers_of_one_part_do_not_meet(tmp_path: Path) -> None:
    """As when a call goes on with an export whose call before it is still writing."""
    data = os.urandom(100_000)
    with Threads(4) as threads:
        place = FolderLocation(tmp_path, threads)
        for _ in range(50):
            await asyncio.gather(*(place.put("part-00000.parquet", data) for _ in range(4)))
            assert (tmp_path / "part-00000.parquet").read_bytes() == data
    assert [file.name for file in tmp_path.iterdir()] == ["part-00000.parquet"]


async def test_a_part_with_large_answers_is_full_early(
    store: Store, allowed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(part, "PART_BYTES", 2 << 20)
    for n in range(8):
        await put(store, result(f"j{n}", response=answer(1500 << 10)))
    told = await whole(export(store, f"{allowed.as_uri()}/large"))
    assert told[-1].parts >= 3
    assert [row["job_id"] for row in read(allowed / "large")] == [f"j{n}" for n in range(8)]


async def test_an_export_never_mixes_with_another(store: Store, allowed: Path) -> None:
    await recorded(store, 20)
    url = f"{allowed.as_uri()}/twice"
    first = await whole(export(store, url))
    await refused(export(store, url), PRECONDITION, "holds an export already")
    # Its own cursor goes on: here, with nothing left but the manifest.
    (allowed / "twice" / "_manifest.json").unlink()
    await refused(export(store, url), PRECONDITION, "part-00000.parquet")
    await whole(export(store, url, cursor=first[-1].cursor))
    assert len(read(allowed / "twice")) == 20
    await refused(export(store, f"{url}/other", cursor=first[-1].cursor), BAD, "cursor")
    await refused(export(store, url, cursor=first[-1].cursor, omit_response=True), BAD, "cursor")


async def test_of_two_that_begin_at_the_same_moment_one_is_refused(store: Store, allowed: Path) -> None:
    await recorded(store, 20)
    url = f"{allowed.as_uri()}/race"
    for n in range(10):
        both = await asyncio.gather(
            whole(export(store, url + str(n))), whole(export(store, url + str(n))), return_exceptions=True
        )
        (failed,) = (each for each in both if isinstance(each, BaseException))
        assert failed.code() is PRECONDITION
        assert len(read(allowed / f"race{n}")) == 20


async def test_a_place_is_taken_as_long_as_an_export_is_written_there(
    store: Store, allowed: Path, mongo_uri: str, mongo_database: str
) -> None:
    for n in range(12):  # More than gRPC takes in ahead of its reader, so that the export waits.
        await put(store, result(f"j{n}", response=answer(2 << 20)))
    url = f"{allowed.as_uri()}/taken"
    first = export(store, url, part_rows=1)
    cursor = (await first.read()).cursor
    for same in (url, f"{url}/", f"{allowed.as_uri()}/other/../taken"):
        await refused(export(store, same), PRECONDITION, "is running")
    await whole(export(store, f"{url}-not"))
    # Who goes on with it takes over, though nobody has noticed that its first caller is gone.
    second = export(store, url, part_rows=1, cursor=cursor)
    told = [piece async for piece in second]
    assert told[-1].complete
    first.cancel()
    assert len(read(allowed / "taken")) == 12
    async with AsyncMongoClient(mongo_uri) as client:
        claims = client[mongo_database]["exports"]
        await until(lambda: _is_empty(claims), "the place is free")


async def _is_empty(collection: object) -> bool:
    return await collection.find_one({}) is None


async def test_what_a_killed_store_has_taken_is_free_a_minute_later(
    store: Store, allowed: Path, mongo_uri: str, mongo_database: str
) -> None:
    await recorded(store, 20)
    url = f"{allowed.as_uri()}/left"
    async with AsyncMongoClient(mongo_uri) as client:
        claims = client[mongo_database]["exports"]
        left = {
            "_id": url,
            "export": "e" * 32,
            "call": "c" * 32,
            "expires_at": datetime.now(UTC) + timedelta(seconds=50),
        }
        await claims.insert_one(left)
        await refused(export(store, url), PRECONDITION, "60 s if its store was killed")
        await claims.update_one({}, {"$set": {"expires_at": datetime.now(UTC) - timedelta(seconds=1)}})
        await whole(export(store, url))
    assert len(read(allowed / "left")) == 20


async def test_who_stood_still_writes_no_more(mongo_uri: str, mongo_database: str) -> None:
    now = 100.0
    async with AsyncMongoClient(mongo_uri) as client:
        collections = Collections(client[mongo_database])
        await collections.prepare()
        async with Claim(collections, "file:///x", "e", clock=lambda: now) as claim:
            claim.check()
            now += 59
            claim.check()
            now += 1
            with pytest.raises(Aborted, match="stalled"):
                claim.check()


def test_one_name_for_all_urls_of_a_place() -> None:
    urls = ("s3://bucket/a/b", "s3://bucket//a/b/", "s3://bucket/a/b//")
    assert {name_of(url, object()) for url in urls} == {"s3://bucket/a/b"}  # type: ignore[arg-type]


@on_shared_loop
@pytest.mark.parametrize(
    "cursor",
    [
        "x",
        "1.2.3.x",
        "1.2.3",
        "....",
        "-1.0.0.x",
        "9" * 30 + ".0.0.x",
        "\0",
        "99999999.0.0.x",
        "1.2.3.4..x",
        "1.2.3.4.zz.x",
    ],
)
async def test_a_bad_cursor_is_named(shared_store: Store, cursor: str) -> None:
    await refused(export(shared_store, cursor=cursor), BAD, "cursor")


async def test_where_it_may_not_write(store: Store, allowed: Path, tmp_path: Path) -> None:
    await recorded(store, 1)
    allowed.mkdir(parents=True)
    (allowed / "link").symlink_to(tmp_path)
    outside = [
        tmp_path.as_uri(), f"{allowed.as_uri()}/../x", f"{allowed.as_uri()}/%2e%2e/x", f"{allowed.as_uri()}/link/x",
        f"{allowed.as_uri()}x", "file:///", "file:///etc/x", "s3://other/x", "s3://shoalx", "gs://shoal/x",
        "s3://shoal/../x",
    ]  # fmt: skip
    for url in outside:
        code = BAD if url == "file:///" else DENIED
        await refused(export(store, url), code, "url")
    for url in ["x", "http://shoal/x", "s3:/x", "s3://", "file://host/x", "s3://shoal/x?a=b", "s3://shoal/x#y", "s3://[",
                "s3://shoal/\n", "s3://shoal/" + "x" * 3_000, "ftp://shoal/x"]:  # fmt: skip
        await refused(export(store, url), BAD, "url")
    found = {path.name for path in tmp_path.rglob("*") if path.name.startswith(("part-", "manifest"))}
    assert not found


async def test_a_place_that_is_a_file(store: Store, allowed: Path) -> None:
    allowed.mkdir(parents=True, exist_ok=True)
    (allowed / "file").write_bytes(b"mine")
    for name in ("file", "file/below"):
        said = await refused(whole(export(store, f"{allowed.as_uri()}/{name}")), PRECONDITION)
        assert "a file has that name" in said
    assert (allowed / "file").read_bytes() == b"mine"


async def test_a_damaged_answer_ends_no_export(store: Store, allowed: Path) -> None:
    blobs = {job: await large(store, job) for job in "abc"}
    rot(blobs["a"])
    rot(blobs["c"])
    url = (allowed / "x").as_uri()
    call = export(store, url, part_rows=1)
    first = next_part = await call.read()
    while next_part.parts < 1:
        next_part = await call.read()
    call.cancel()
    assert (first.answers_lost, next_part.answers_lost) == (0, 1)
    for path in (allowed / "x").glob("*1.parquet"):
        path.unlink()  # As if it had been given up there.
    last = (await whole(export(store, url, part_rows=1, cursor=next_part.cursor)))[-1]
    assert (last.rows, last.answers_lost) == (3, 2)
    rows = read(allowed / "x")
    assert [(row["job_id"], row["outputs"] is None, bool(row["answer_lost"])) for row in rows] == [
        ("a", True, True), ("b", False, False), ("c", True, True)
    ]  # fmt: skip
    assert blobs["a"].name in str(rows[0]["answer_lost"])
    assert json.loads((allowed / "x" / "_manifest.json").read_text())["answers_lost"] == 2


async def test_by_default_it_writes_nowhere_but_to_the_caller(config: StoreConfig, tmp_path: Path) -> None:
    async with running_store(config) as store:
        await refused(export(store, tmp_path.as_uri()), DENIED, "SHOAL_STORE_EXPORTS", "may use: none")
        await whole(export(store))


async def test_a_bucket_that_is_not_there_and_wrong_keys(
    config: StoreConfig, s3_access: WeedProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_store(config.model_copy(update={"exports": ("s3://",)})) as store:
        await recorded(store, 1)
        await refused(export(store, "s3://nowhere-at-all/x"), PRECONDITION, "bucket")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        await refused(export(store, s3_access.prefix()), DENIED, "credentials")


@on_shared_loop
@pytest.mark.parametrize("rows", [-1, 1_000_001])
async def test_bad_part_sizes(shared_store: Store, rows: int) -> None:
    await refused(export(shared_store, part_rows=rows), BAD, "part_rows")


async def test_a_limit_on_exports(config: StoreConfig) -> None:
    async with running_store(config.model_copy(update={"max_exports": 1})) as store:
        for n in range(12):  # More than gRPC takes in ahead of its reader, so that the export waits.
            await put(store, result(f"j{n}", response=answer(2 << 20)))
        held = export(store, part_rows=1)
        await held.read()
        await refused(export(store), StatusCode.RESOURCE_EXHAUSTED, "1 exports")
        held.cancel()


def test_the_setting_is_a_list_of_urls(config: StoreConfig) -> None:
    given = config.model_dump() | {"exports": " file:///data/exports, s3://reports/shoal ,gs://,"}
    assert StoreConfig.model_validate(given).exports == ("file:///data/exports", "s3://reports/shoal", "gs://")
    with pytest.raises(ValueError, match="exports"):
        StoreConfig.model_validate(given | {"exports": "/data"})


@pytest.mark.parametrize(
    "url",
    [
        "s3://reports/globex",
        "s3://reports/acme2",
        "s3://reports/acme/../globex",
        "s3://reports/acme/%2e%2e/globex",
        "s3://reports/acme%2f..%2fglobex",
        "s3://reports/acme/%2E./globex",
        "s3://reports",
        "s3://other/acme",
        "S3://reports/acme",
        "s3://key:secret@reports/acme",
        "s3://reports:9000/acme",
        "s3://reports/acme?endpoint=x",
        "s3://reports/acme#x",
        "gs://reports/acme",
        "https://reports.s3.amazonaws.com/acme",
        "{folder}/globex",
        "{folder}/acme2",
        "{folder}/acme/../globex",
        "{folder}/acme/%2e%2e/globex",
        "{folder}/acme%2f..%2fglobex",
        "{folder}/acme/link",
        "file:///etc",
        "FILE:///etc",
        "file://localhost/etc",
        "{folder}/acme/%00",
    ],
)
async def test_a_verified_caller_exports_into_the_folders_of_its_tenant_only(tmp_path: Path, url: str) -> None:
    for name in ("acme", "acme2", "globex"):
        (tmp_path / name).mkdir()
    (tmp_path / "acme" / "link").symlink_to(tmp_path / "globex")
    folder = tmp_path.as_uri()
    named = ("s3://reports/{tenant}", f"{folder}/{{tenant}}", "s3://", "gs://", "file:///")
    with Threads(1, "test") as threads:
        locations = ExportLocations(named, threads, checksums=True)
        assert name_of("", await locations.open(f"{folder}/acme/x", "acme")) == f"{folder}/acme/x"
        await locations.open("s3://reports/acme/x", "acme")
        with pytest.raises((PermissionDenied, InvalidArgument), match="url: ") as refused:
            await locations.open(url.replace("{folder}", folder), "acme")
    if isinstance(refused.value, PermissionDenied):
        assert "SHOAL_STORE_EXPORTS (s3://bucket/{tenant})" in str(refused.value)
