"""`shoal store`, against a store that finds what a test tells it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from shoal.client.transport import methods
from shoal.store.v1 import store_pb2 as pb
from tests.cli.conftest import Shoal
from tests.client.served import Served

DAMAGED = pb.VerifyStoreResponse.Finding(
    kind=pb.VerifyStoreResponse.KIND_DAMAGED,
    key="artifacts/ab/abcd",
    message="bytes 0 to 9",
    sha256="ab" * 32,
    users=["model digits version 1, file model.onnx", "job/1"],
)
STRAY = pb.VerifyStoreResponse.Finding(kind=pb.VerifyStoreResponse.KIND_STRAY, key="responses/ab/x", message="7 bytes")


def finds(served: Served, *findings: pb.VerifyStoreResponse.Finding) -> list[pb.VerifyStoreRequest]:
    asked: list[pb.VerifyStoreRequest] = []

    async def verify(request: pb.VerifyStoreRequest, context: Any) -> AsyncIterator[pb.VerifyStoreResponse]:
        asked.append(request)
        yield pb.VerifyStoreResponse(blobs=1, blobs_in_all=2, bytes=10)
        for finding in findings:
            yield pb.VerifyStoreResponse(blobs=2, blobs_in_all=2, bytes=2048, finding=finding)

    served.on(methods.VERIFY_STORE, verify, "unary_stream")
    return asked


def test_a_store_without_damage(served: Served, shoal: Shoal) -> None:
    asked = finds(served)
    done = shoal("store", "verify")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "1 blobs (10 B) read and compared: none damaged\n"
    assert not asked[0].sizes_only
    assert "checked" in shoal("store", "verify", "--quick").stdout
    assert asked[1].sizes_only


def test_damage_is_shown_with_the_models_and_jobs_that_need_it(served: Served, shoal: Shoal) -> None:
    finds(served, DAMAGED, STRAY)
    done = shoal("store", "verify")
    assert done.returncode == 1
    for words in ("damaged", "artifacts/ab/abcd", "model digits version 1, file model.onnx", "job/1", "stray"):
        assert words in done.stdout
    assert "2 blobs (2.0 KiB) read and compared: 1 damaged" in done.stdout


def test_stray_blobs_alone_are_no_failure(served: Served, shoal: Shoal) -> None:
    finds(served, STRAY)
    assert shoal("store", "verify").returncode == 0


def test_verify_as_json(served: Served, shoal: Shoal) -> None:
    finds(served, DAMAGED)
    done = shoal("store", "verify", "--json")
    assert done.returncode == 1
    found, last = map(json.loads, done.stdout.splitlines())
    assert (found["kind"], found["users"][1]) == ("damaged", "job/1")
    assert last == {"blobs": 2, "bytes": 2048, "damaged": 1}


def test_a_verification_that_fails(served: Served, shoal: Shoal) -> None:
    async def verify(request: pb.VerifyStoreRequest, context: Any) -> AsyncIterator[pb.VerifyStoreResponse]:
        yield pb.VerifyStoreResponse(blobs=1, blobs_in_all=2)
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "the folder of blobs is not there: is it mounted?")

    served.on(methods.VERIFY_STORE, verify, "unary_stream")
    done = shoal("store", "verify")
    assert done.returncode == 1
    assert "is it mounted?" in done.stderr
    assert "compared" not in done.stdout


def test_collect(served: Served, shoal: Shoal) -> None:
    async def collect(request: pb.CollectArtifactsRequest, context: Any) -> pb.CollectArtifactsResponse:
        return pb.CollectArtifactsResponse(condemned=1, collected=2, removed=3, strays=4 if request.strays else 0)

    served.on(methods.COLLECT_ARTIFACTS, collect)
    assert shoal("store", "collect").stdout == "1 marked, 2 collected, 3 blobs removed\n"
    assert "4 stray blobs found" in shoal("store", "collect", "--strays").stdout
    assert json.loads(shoal("store", "collect", "--json").stdout)["removed"] == 3


def progress(**fields: Any) -> pb.BackupProgress:
    return pb.BackupProgress(backup_id="20261126T163000Z-1a2b3c4d", **fields)


@pytest.mark.parametrize("command", ["backup", "restore"])
def test_an_empty_place_is_rejected(shoal: Shoal, command: str) -> None:
    done = shoal("store", command, "")
    assert done.returncode == 2
    assert done.stderr.startswith("shoal: PLACE is empty")


def test_backup(served: Served, shoal: Shoal, tmp_path: Path) -> None:
    asked: list[pb.BackUpRequest] = []

    async def back_up(request: pb.BackUpRequest, context: Any) -> AsyncIterator[pb.BackUpResponse]:
        asked.append(request)
        yield pb.BackUpResponse(progress=progress(documents=5))
        done = progress(documents=7, blobs=3, blobs_in_all=3, copied=1, copied_bytes=2048, complete=True)
        yield pb.BackUpResponse(progress=done)

    served.on(methods.BACK_UP, back_up, "unary_stream")
    done = shoal("store", "backup", "there")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("backup 20261126T163000Z-1a2b3c4d: 7 documents, 3 blobs, 1 of them new (2.0 KiB)")
    assert asked[0].to == (tmp_path / "there").as_uri()
    assert json.loads(shoal("store", "backup", "s3://bucket/x", "--json").stdout)["documents"] == 7
    assert asked[1].to == "s3://bucket/x"
    assert shoal("store", "backup", "there", "--trust-sizes").returncode == 0
    assert [request.trust_sizes for request in asked] == [False, False, True]


def test_a_backup_without_damaged_blobs_fails_and_names_them(served: Served, shoal: Shoal) -> None:
    async def back_up(request: pb.BackUpRequest, context: Any) -> AsyncIterator[pb.BackUpResponse]:
        yield pb.BackUpResponse(progress=progress(missing=["ab" * 32], complete=True))

    served.on(methods.BACK_UP, back_up, "unary_stream")
    done = shoal("store", "backup", "/there")
    assert done.returncode == 1
    assert "ab" * 32 in done.stderr


def test_a_backup_reports_replaced_blobs(served: Served, shoal: Shoal) -> None:
    async def back_up(request: pb.BackUpRequest, context: Any) -> AsyncIterator[pb.BackUpResponse]:
        yield pb.BackUpResponse(progress=progress(blobs=9, copied=3, repaired=2, complete=True))

    served.on(methods.BACK_UP, back_up, "unary_stream")
    done = shoal("store", "backup", "/there")
    assert (done.returncode, done.stderr) == (
        0,
        "2 of the new ones replaced damaged copies in the backup: check that disk\n",
    )


def test_an_interrupted_backup_is_a_failure(served: Served, shoal: Shoal) -> None:
    async def back_up(request: pb.BackUpRequest, context: Any) -> AsyncIterator[pb.BackUpResponse]:
        yield pb.BackUpResponse(progress=progress(documents=5))

    served.on(methods.BACK_UP, back_up, "unary_stream")
    done = shoal("store", "backup", "/there")
    assert (done.returncode, done.stdout) == (1, "")
    assert "start it again" in done.stderr
    assert served.count(methods.BACK_UP) == 1


def test_restore(served: Served, shoal: Shoal) -> None:
    asked: list[pb.RestoreRequest] = []

    async def restore(request: pb.RestoreRequest, context: Any) -> AsyncIterator[pb.RestoreResponse]:
        asked.append(request)
        if not request.backup_id:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "this store is not empty")
        yield pb.RestoreResponse(progress=progress(documents=7, blobs=3, complete=True))

    served.on(methods.RESTORE, restore, "unary_stream")
    done = shoal("store", "restore", "/there", "--backup", "20261126T163000Z-1a2b3c4d")
    assert done.stdout == "restored 20261126T163000Z-1a2b3c4d: 7 documents, 3 blobs\n"
    assert (asked[0].source, asked[0].backup_id) == ("file:///there", "20261126T163000Z-1a2b3c4d")
    refused = shoal("store", "restore", "/there")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "not empty" in refused.stderr
