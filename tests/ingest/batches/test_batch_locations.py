"""Batches from and to a real object store (SeaweedFS), and what they say when it refuses or is away."""

from __future__ import annotations

import io
import json
import os
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import obstore
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mesh.process.threads import Threads
from services.ingest.batches.inputs.locations import InputLocations
from services.ingest.batches.submission import Submissions
from shoal.errors import AlreadyExists, InvalidArgument, NotFound, PermissionDenied
from shoal.ingest.v1 import ingest_pb2 as pb
from tests.breakable import until
from tests.ingest.batches.conftest import LEASE, BatchClient, BatchMesh
from tests.ingest.conftest import IngestProcess, StartIngest
from tests.seaweedfs import WeedProcess

S = grpc.StatusCode


@pytest.fixture(params=["file", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty place: a folder, or a prefix of a real object store."""
    if request.param == "file":
        yield f"file://{tmp_path}"
    else:
        yield request.getfixturevalue("s3_access").prefix()


def test_a_place_keeps_its_promises_wherever_it_is(root: str, tmp_path: Path) -> None:
    locations = InputLocations(["file:///", "s3://"])
    url = f"{root}/deep/a b.bin"
    with pytest.raises(NotFound):
        locations.stat(url)
    locations.put(url, bytes(range(256)) * 64, only_new=True)
    with pytest.raises(AlreadyExists):
        locations.put(url, b"other", only_new=True)
    entry = locations.stat(url)
    assert entry.size == 256 * 64
    assert locations.fetch(url) == (entry, bytes(range(256)) * 64)
    with locations.open(entry) as file:
        assert file.seek(-256, os.SEEK_END) == entry.size - 256
        assert file.read() == bytes(range(256))
        file.seek(10)
        assert file.read(3) == bytes([10, 11, 12])
    with pytest.raises(InvalidArgument):
        locations.read(url, 10)
    locations.put(url, b"new")
    assert locations.read(url, 10) == b"new"
    assert locations.stat(url) != entry, "another content is another version"
    local = tmp_path / "finished"
    local.write_bytes(b"x" * 9_000_000)
    locations.adopt(f"{root}/staged/one", local)
    assert not local.exists()
    locations.publish(f"{root}/staged/one", f"{root}/deep/one")
    locations.publish(f"{root}/staged/one", f"{root}/deep/one")
    assert locations.stat(f"{root}/deep/one").size == 9_000_000
    with pytest.raises(NotFound):
        locations.publish(f"{root}/staged/one", f"{root}/deep/two")
    names = {found.url for found in locations.list(f"{root}/deep/")}
    assert names == {url, f"{root}/deep/one"}
    assert all(locations.stat(found.url) == found for found in locations.list(f"{root}/deep/"))
    locations.remove_all(f"{root}/deep/")
    locations.remove_all(f"{root}/deep/")
    assert not [*locations.list(f"{root}/")] or root.startswith("file")


def test_wrong_credentials_and_a_missing_bucket_are_said(
    s3_access: WeedProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NotFound):
        InputLocations(["s3://"]).put(f"s3://nobody-{uuid.uuid4().hex}/x", b"")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    locations = InputLocations(["s3://"])
    for call in (lambda: locations.stat("s3://shoal/x"), lambda: locations.put("s3://shoal/x", b"")):
        with pytest.raises(PermissionDenied, match="credentials"):
            call()


def x_of(count: int) -> np.ndarray:
    return np.repeat(np.arange(count, dtype=np.float32), 4).reshape(count, 4)


def put_parquet(weed: WeedProcess, url: str, x: np.ndarray) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"x": list(x)}), buffer, row_group_size=70)
    put(weed, url, buffer.getvalue())


def put(weed: WeedProcess, url: str, data: bytes) -> None:
    folder, _, name = url.rpartition("/")
    obstore.put(weed.store(folder), name, data)


def parts(weed: WeedProcess, prefix: str) -> Any:
    store = weed.store(prefix)
    names = sorted(found["path"] for page in obstore.list(store) for found in page)
    requested = [name for name in names if name.startswith("part-")]
    assert not [name for name in names if name.startswith("_staging")]
    return pa.concat_tables([pq.read_table(io.BytesIO(bytes(obstore.get(store, name).bytes()))) for name in requested])


def document(weed: WeedProcess, prefix: str, name: str) -> Any:
    return json.loads(bytes(obstore.get(weed.store(prefix), name).bytes()))


@pytest.fixture
async def weedy(mesh: BatchMesh, start_ingest: StartIngest, s3_access: WeedProcess) -> Any:
    """A client of an instance that knows the object store."""
    ingest = start_ingest(**LEASE)
    await ingest.until_ready()
    made = BatchClient(ingest.address)
    yield made
    await made.channel.close()


async def test_from_a_bucket_to_a_bucket(weedy: BatchClient, weed: WeedProcess) -> None:
    root = weed.prefix()
    put_parquet(weed, f"{root}/in/a.parquet", x_of(150))
    put_parquet(weed, f"{root}/in/b.parquet", x_of(50))
    batch = await weedy.submit_batch(f"{root}/in/", f"{root}/out/", chunk_rows=40)
    ended = await weedy.batch_ended(batch.id)
    assert (ended.state, ended.files, ended.rows_ok) == (pb.BATCH_STATE_SUCCEEDED, 2, 200), ended
    table = parts(weed, f"{root}/out")
    assert table.column("row").to_pylist() == list(range(200))
    assert np.array_equal(np.array(table.column("y").to_pylist()), 2 * np.concatenate([x_of(150), x_of(50)]))
    assert document(weed, f"{root}/out", "_summary.json")["ok"] == 200
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await weedy.submit_batch(f"{root}/in/", f"{root}/out")
    assert refused.value.code() == S.FAILED_PRECONDITION


async def test_each_object_of_a_prefix_is_a_row(weedy: BatchClient, weed: WeedProcess) -> None:
    root = weed.prefix()
    for n in range(30):
        put(weed, f"{root}/texts/{n:02d}.txt", f"text {n}".encode())
    put(weed, f"{root}/texts/30.txt", b"\xff not text")
    batch = await weedy.submit_batch(
        f"{root}/texts/", f"{root}/out", model="length", chunk_rows=7, text_outputs=["text"]
    )
    ended = await weedy.batch_ended(batch.id)
    assert (ended.format, ended.files) == (pb.BATCH_FORMAT_OBJECTS, 31)
    assert (ended.rows_ok, ended.rows_failed) == (30, 1)
    table = parts(weed, f"{root}/out")
    assert table.column("source").to_pylist() == [f"{root}/texts/{n:02d}.txt" for n in range(30)]
    assert table.column("text").to_pylist() == [f"text {n}" for n in range(30)]
    assert table.column("n").to_pylist() == [len(f"text {n}") for n in range(30)]


async def test_a_store_that_refuses_is_named_at_once(
    mesh: BatchMesh, start_ingest: StartIngest, s3_access: WeedProcess, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    ingest: IngestProcess = start_ingest(**LEASE)
    await ingest.until_ready()
    client = BatchClient(ingest.address)
    for inputs, output in (
        ("s3://shoal/in.jsonl", f"file://{tmp_path}/out"),
        (f"file://{tmp_path}/in.jsonl", "s3://shoal/out"),
    ):
        (tmp_path / "in.jsonl").write_text('{"x": [1, 2, 3, 4]}\n')
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await client.submit_batch(inputs, output)
        assert refused.value.code() == S.PERMISSION_DENIED
        assert "credentials" in (refused.value.details() or "")
    await client.channel.close()


@pytest.mark.timeout(240)
async def test_an_outage_of_the_object_store_is_outlived(
    mesh: BatchMesh, start_ingest: StartIngest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with WeedProcess(tmp_path / "weed") as own:
        own.wait_until_ready()
        for name, value in own.access.items():
            monkeypatch.setenv(name, value)
        root = own.prefix()
        put_parquet(own, f"{root}/in.parquet", x_of(400))
        ingest = start_ingest(**LEASE)
        await ingest.until_ready()
        client = BatchClient(ingest.address)

        async def goes_away(rows: list[int], context: Any) -> None:
            if len(mesh.infer.sizes) == 10:
                own.kill()

        mesh.infer.before = goes_away
        batch = await client.submit_batch(f"{root}/in.parquet", f"{root}/out", chunk_rows=40)

        async def waits() -> bool:
            return "UNAVAILABLE" in (await client.get_batch(batch.id)).waits_for

        await until(waits, "it says what it waits for", within_s=60, every_s=0.2)
        own.start()
        own.wait_until_ready()
        ended = await client.batch_ended(batch.id, within_s=120)
        assert (ended.state, ended.rows_ok) == (pb.BATCH_STATE_SUCCEEDED, 400)
        table = parts(own, f"{root}/out")
        assert table.column("row").to_pylist() == list(range(400))
        await client.channel.close()


@pytest.mark.parametrize(
    "url",
    [
        "s3://data/acme2/x.jsonl",
        "s3://data/acm",
        "s3://data/acme/../globex/x.jsonl",
        "s3://data/acme/./x.jsonl",
        "s3://data//acme/x.jsonl",
        "s3://data/%61cme/x.jsonl",
        "s3://DATA/acme/x.jsonl",
        "S3://data/acme/x.jsonl",
        "s3://data",
        "s3://other/acme/x.jsonl",
        "s3://key:secret@data/acme/x.jsonl",
        "s3://data:9000/acme/x.jsonl",
        "s3://data?endpoint=http://10.0.0.1/acme/x.jsonl",
        "s3://data@evil/acme/x.jsonl",
        "https://data.s3.amazonaws.com/acme/x.jsonl",
        "gs://data/acme/x.jsonl",
        "file:///etc/passwd",
        "FILE:///etc/passwd",
        "file://localhost/etc/passwd",
        "{folder}/globex/x.jsonl",
        "{folder}/acme2/x.jsonl",
        "{folder}/acme/../globex/x.jsonl",
        "{folder}/acme/%2e%2e/globex/x.jsonl",
        "{folder}/acme%2f..%2fglobex/x.jsonl",
        "{folder}/acme/link/x.jsonl",
    ],
)
def test_a_verified_caller_leaves_the_folders_of_its_tenant_in_no_way(tmp_path: Path, url: str) -> None:
    for name in ("acme", "acme2", "globex"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.jsonl").write_text("{}\n")
    (tmp_path / "acme" / "link").symlink_to(tmp_path / "globex")
    folder = f"file://{tmp_path}"
    locations = InputLocations(["s3://data/{tenant}", f"{folder}/{{tenant}}", "s3://", "gs://", "file:///"])
    for own in ("s3://data/acme/x.jsonl", "s3://data/acme/deep/", f"{folder}/acme/x.jsonl"):
        assert locations.check("inputs[0]", own, "acme") == own
    with pytest.raises((PermissionDenied, InvalidArgument), match=r"inputs\[0\]: ") as refused:
        locations.check("inputs[0]", url.replace("{folder}", folder), "acme")
    if isinstance(refused.value, PermissionDenied):
        assert "SHOAL_INGEST_BATCH_URLS, such as s3://bucket/{tenant}" in str(refused.value)


def test_a_folder_that_is_reached_by_a_link_is_the_folder_that_the_operator_named(tmp_path: Path) -> None:
    (tmp_path / "real" / "acme").mkdir(parents=True)
    (tmp_path / "data").symlink_to(tmp_path / "real")
    locations = InputLocations([f"file://{tmp_path}/data/{{tenant}}"])
    assert locations.check("output", f"file://{tmp_path}/data/acme/out", "acme") == f"file://{tmp_path}/real/acme/out"


def test_a_folder_with_a_space_in_its_name_is_allowed_as_a_url_names_it(tmp_path: Path) -> None:
    folder = tmp_path / "my data"
    locations = InputLocations([folder.as_uri() + "/{tenant}"])
    assert locations.check("output", f"{folder.as_uri()}/acme/out", "acme") == f"file://{folder}/acme/out"


async def test_the_links_of_a_batchs_urls_are_looked_up_in_a_thread() -> None:
    threads_of_checks = set()

    class Locations(InputLocations):
        def check(self, field: str, url: str, tenant: str | None = None) -> str:
            threads_of_checks.add(threading.current_thread())
            raise InvalidArgument(field)

    class NoBatches:
        async def count_active(self, tenant: str = "") -> int:
            return 0

    nothing: Any = None
    with Threads(1, "test") as threads:
        batches: Any = NoBatches()
        submissions = Submissions(
            batches,
            nothing,
            Locations([]),
            threads,
            clock=nothing,
            new_id=nothing,
            instance="",
            on_accepted=nothing,
        )
        request = pb.SubmitBatchRequest(inputs=["file:///a"], output="file:///b", model_name="m")
        with pytest.raises(InvalidArgument, match=r"inputs\[0\]"):
            await submissions.submit(request)
    assert len(threads_of_checks) == 1
    assert threading.main_thread() not in threads_of_checks
