"""VerifyStore, ReleaseArtifacts, ListReferences, CollectArtifacts: over the wire, and what they find."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from grpc import StatusCode
from pymongo import AsyncMongoClient

from shoal.inference.v2 import inference_pb2
from shoal.store.v1 import store_pb2 as pb
from tests.store.conftest import Store, failing_reads, refused, sha256

pytestmark = pytest.mark.mongo

MIB = 1 << 20
Kind = pb.VerifyStoreResponse.Kind


async def verified(
    store: Store, **options: bool
) -> tuple[list[pb.VerifyStoreResponse.Finding], pb.VerifyStoreResponse]:
    steps = [step async for step in store.stub.VerifyStore(pb.VerifyStoreRequest(**options))]
    return [step.finding for step in steps if step.HasField("finding")], steps[-1]


async def put_large_result(store: Store, job: str) -> Path:
    """A result whose response is a blob; gives its file."""
    response = inference_pb2.ModelInferResponse(raw_output_contents=[os.urandom(2 * MIB)])
    result = pb.Result(job_id=job, outcome=pb.Result.OUTCOME_SUCCEEDED, response=response)
    await store.stub.PutResults(pb.PutResultsRequest(results=[result]))
    (blob,) = (path for path in (store.root / "responses").rglob("*") if path.is_file())
    return blob


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


async def registered(store: Store, name: str, *contents: bytes) -> None:
    files = [pb.ModelFile(path=f"f{n}", sha256=sha256(content)) for n, content in enumerate(contents)]
    await store.stub.RegisterModel(pb.RegisterModelRequest(model=pb.ModelVersion(name=name, files=files)))


async def test_a_store_that_is_right(store: Store) -> None:
    await store.put(os.urandom(3 * MIB))
    await store.put(b"")
    await put_large_result(store, "j")
    found, last = await verified(store)
    assert found == []
    assert (last.blobs, last.blobs_in_all) == (3, 3)
    assert last.bytes > 5 * MIB


async def test_what_is_damaged_is_named_with_those_it_harms(store: Store) -> None:
    rotten, lost, fine = os.urandom(3 * MIB), os.urandom(10), os.urandom(10)
    for data in (rotten, lost, fine):
        await store.put(data)
    await store.put(lost, reference="job/1")
    await registered(store, "digits", rotten, fine)
    await registered(store, "letters", fine, rotten)
    flip(store.blob(sha256(rotten)), 2 * MIB + 5)
    store.blob(sha256(lost)).unlink()
    flip(await put_large_result(store, "j7"), MIB)

    found, last = await verified(store)
    assert last.blobs == last.blobs_in_all == 4
    by_digest = {finding.sha256: finding for finding in found}
    assert {finding.kind for finding in found} == {Kind.KIND_DAMAGED}
    assert list(by_digest[sha256(rotten)].users) == [
        "model digits version 1, file f0",
        "model letters version 1, file f1",
    ]
    assert f"bytes {2 * MIB} to {3 * MIB - 1}" in by_digest[sha256(rotten)].message
    assert list(by_digest[sha256(lost)].users) == ["job/1"]
    assert "missing" in by_digest[sha256(lost)].message
    (of_result,) = (finding for finding in found if finding.key.startswith("responses/"))
    assert list(of_result.users) == ["the result of job j7"]

    await refused(store.get(sha256(rotten)), StatusCode.NOT_FOUND)
    for data in (rotten, lost):
        assert not (await store.put(data)).existed  # The next upload repairs it.
    assert [finding.key for finding in (await verified(store))[0] if finding.kind != Kind.KIND_STRAY] == [of_result.key]


async def test_what_the_disk_has_lost_is_named_and_repaired(store: Store) -> None:
    lost, fine = os.urandom(3 * MIB), os.urandom(10)
    for data in (lost, fine):
        await store.put(data)
    blob, digest = store.blob(sha256(lost)), sha256(lost)
    with failing_reads(blob, errno.EIO):
        found, last = await verified(store)
        assert [(each.kind, each.sha256) for each in found] == [(Kind.KIND_DAMAGED, digest)]
        assert all(word in found[0].message for word in (blob.name, "the disk cannot read it: Input/output error"))
        assert last.blobs == 2
        assert not (await store.put(lost)).existed  # Under another name.
        assert await store.get(digest) == (3 * MIB, lost)


async def test_the_first_reader_of_what_the_disk_has_lost_marks_it(store: Store) -> None:
    data = os.urandom(3 * MIB)
    await store.put(data)
    with failing_reads(store.blob(sha256(data)), errno.EIO):
        await refused(store.get(sha256(data)), StatusCode.DATA_LOSS, "the disk cannot read it", "upload it again")
        await refused(store.get(sha256(data)), StatusCode.NOT_FOUND)


async def test_a_lost_answer_is_named_and_a_disk_that_is_away_is_not(store: Store) -> None:
    blob = await put_large_result(store, "j7")
    ask = pb.GetResultRequest(job_id="j7")
    with failing_reads(blob, errno.EIO):
        (finding,) = (await verified(store))[0]
        assert (finding.kind, list(finding.users)) == (Kind.KIND_DAMAGED, ["the result of job j7"])
        assert "Input/output error" in (await store.stub.GetResult(ask)).result.answer_lost
    with failing_reads(blob, errno.EIO, is_whole_disk=True):
        await refused(store.stub.GetResult(ask), StatusCode.UNAVAILABLE, "Input/output error: retry")
        await refused(store.stub.VerifyStore(pb.VerifyStoreRequest()), StatusCode.UNAVAILABLE, "retry")
    with failing_reads(blob, errno.EMFILE):
        await refused(store.stub.GetResult(ask), StatusCode.UNAVAILABLE, "Too many open files")
    assert (await verified(store))[0] == []
    assert (await store.stub.GetResult(ask)).result.HasField("response")


async def test_sizes_only(store: Store) -> None:
    flipped, short = os.urandom(1000), os.urandom(1000)
    for data in (flipped, short):
        await store.put(data)
    flip(store.blob(sha256(flipped)), 5)
    os.truncate(store.blob(sha256(short)), 999)
    found, _ = await verified(store, sizes_only=True)
    assert [finding.sha256 for finding in found] == [sha256(short)]


async def test_a_mark_on_what_is_whole_is_taken_away(store: Store) -> None:
    data = os.urandom(1000)
    await store.put(data)
    blob = store.blob(sha256(data))
    blob.rename(blob.with_name("aside"))
    await refused(store.get(sha256(data)), StatusCode.DATA_LOSS)
    blob.with_name("aside").rename(blob)  # As when a disk or a bucket is brought back.
    found, _ = await verified(store)
    assert [finding.kind for finding in found] == [Kind.KIND_WHOLE_AGAIN]
    assert await store.get(sha256(data)) == (1000, data)
    assert (await verified(store))[0] == []


async def test_a_stray_is_named(store: Store) -> None:
    await store.put(b"abc")
    stray = store.root / "artifacts" / "ab" / "stray"
    stray.parent.mkdir(exist_ok=True)
    stray.write_bytes(b"stray")
    found, _ = await verified(store)
    assert [(finding.kind, finding.key) for finding in found] == [(Kind.KIND_STRAY, "artifacts/ab/stray")]


async def test_the_folder_is_not_mounted(store: Store) -> None:
    await store.put(b"abc")
    store.root.rename(store.root.with_name("elsewhere"))
    store.root.mkdir()
    await refused(store.stub.VerifyStore(pb.VerifyStoreRequest()), StatusCode.FAILED_PRECONDITION, "mounted")
    await refused(store.get(sha256(b"abc")), StatusCode.FAILED_PRECONDITION, "mounted")
    store.root.rmdir()
    store.root.with_name("elsewhere").rename(store.root)
    assert await store.get(sha256(b"abc")) == (3, b"abc")


async def test_references_over_the_wire(store: Store) -> None:
    await store.put(b"abc", reference="job/1")
    assert (await store.put(b"abc", reference="job/2")).existed
    await store.put(b"abc", reference="job/2")
    page = await store.stub.ListReferences(pb.ListReferencesRequest(prefix="job/"))
    assert [(each.name, each.sha256) for each in page.references] == [
        ("job/1", sha256(b"abc")),
        ("job/2", sha256(b"abc")),
    ]
    release = pb.ReleaseArtifactsRequest(references=["job/1", "job/9"])
    assert (await store.stub.ReleaseArtifacts(release)).released == 1
    assert (await store.stub.ReleaseArtifacts(release)).released == 0
    await refused(store.put(b"abc", reference="x" * 129), StatusCode.INVALID_ARGUMENT, "header.reference")
    await refused(store.put(b"abc", reference="a\n"), StatusCode.INVALID_ARGUMENT, "printable")
    many = pb.ReleaseArtifactsRequest(references=map(str, range(1001)))
    await refused(store.stub.ReleaseArtifacts(many), StatusCode.INVALID_ARGUMENT, "1001")


async def test_collecting_by_hand(store: Store) -> None:
    await store.put(b"abc")
    await store.put(b"kept", reference="me")
    async with AsyncMongoClient(store.config.mongo) as client:
        artifacts = client[store.config.database].artifacts
        await artifacts.update_many({}, {"$unset": {"keep_until": ""}})  # As if they had been here for a day.
    done = await store.stub.CollectArtifacts(pb.CollectArtifactsRequest(strays=True))
    assert (done.condemned, done.collected, done.removed, done.strays) == (1, 0, 0, 0)
    assert await store.get(sha256(b"abc")) == (3, b"abc")
