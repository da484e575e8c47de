"""PutArtifact, StatArtifact, GetArtifact: the promises of store.proto, over the wire."""

from __future__ import annotations

import asyncio
import contextlib
import os

import grpc
import pytest
from grpc import StatusCode

from services.store.config import StoreConfig
from shoal.store.v1 import store_pb2 as pb
from tests.breakable import until
from tests.store.conftest import Store, header, on_shared_loop, refused, running_store, sha256, upload

pytestmark = pytest.mark.mongo

MIB = 1 << 20
EMPTY = sha256(b"")


@on_shared_loop
@pytest.mark.parametrize("size", [0, 1, 1000, MIB - 1, MIB, MIB + 1, 9 * MIB + 12345])
async def test_what_is_put_is_what_is_got(shared_store: Store, size: int) -> None:
    data = os.urandom(size)
    answer = await shared_store.put(data, chunk_bytes=300_007)
    assert (answer.artifact.sha256, answer.artifact.size_bytes, answer.existed) == (sha256(data), size, False)
    assert answer.artifact.HasField("created_at")
    assert await shared_store.get(sha256(data)) == (size, data)
    stat = await shared_store.stub.StatArtifact(pb.StatArtifactRequest(sha256=sha256(data)))
    assert (stat.artifact, stat.received_bytes) == (answer.artifact, size)
    assert shared_store.staged == []


@on_shared_loop
async def test_the_same_again_is_not_read_again(shared_store: Store) -> None:
    data = os.urandom(3 * MIB)
    first = await shared_store.put(data)

    async def only_the_header():  # The stream stays open: the answer must come without its bytes.
        yield header(sha256=sha256(data), size_bytes=len(data))
        await asyncio.Event().wait()

    again = await shared_store.stub.PutArtifact(only_the_header(), timeout=20)
    assert again.existed
    assert again.artifact == first.artifact


@on_shared_loop
@pytest.mark.parametrize("offset", [0, 1, MIB - 1, MIB, 4 * MIB + 3, 5 * MIB + 99])
async def test_get_from_an_offset(shared_store: Store, offset: int) -> None:
    data = os.urandom(5 * MIB + 99)
    await shared_store.put(data)
    assert await shared_store.get(sha256(data), offset) == (len(data), data[offset:])


async def test_an_upload_goes_on_where_it_stopped(store: Store) -> None:
    data = os.urandom(5 * MIB + 7)
    digest = sha256(data)
    first = 2 * MIB + 11
    short = [header(sha256=digest, size_bytes=len(data)), pb.PutArtifactRequest(chunk=data[:first])]
    await refused(store.stub.PutArtifact(iter(short)), StatusCode.INVALID_ARGUMENT, str(first), str(len(data)))
    stat = await store.stub.StatArtifact(pb.StatArtifactRequest(sha256=digest))
    assert not stat.HasField("artifact")
    assert stat.received_bytes == first
    await refused(store.get(digest), StatusCode.NOT_FOUND)

    answer = await store.put(data, offset=first)
    assert (answer.existed, answer.artifact.size_bytes) == (False, len(data))
    assert await store.get(digest) == (len(data), data)
    assert store.staged == []


async def test_a_cancelled_upload_goes_on_where_it_stopped(store: Store) -> None:
    data = os.urandom(4 * MIB)
    digest = sha256(data)
    sent = asyncio.Event()

    async def broken():
        yield header(sha256=digest, size_bytes=len(data))
        yield pb.PutArtifactRequest(chunk=data[:MIB])
        sent.set()
        await asyncio.Event().wait()

    call = store.stub.PutArtifact(broken())
    await sent.wait()
    await until(lambda: any(p.stat().st_size == MIB for p in store.staged), "the chunk is in the staging file")
    call.cancel()
    stat = await store.stub.StatArtifact(pb.StatArtifactRequest(sha256=digest))
    assert stat.received_bytes == MIB
    # At once, while the store may still be clearing up after the cancelled call.
    await store.put(data, offset=MIB)
    assert await store.get(digest) == (len(data), data)


async def test_everything_arrived_but_the_end(store: Store) -> None:
    data = os.urandom(MIB + 1)
    pause_s = 0.05

    async def never_closed(offset: int):
        for message in upload(data, offset=offset):
            yield message
        await asyncio.Event().wait()

    async def is_kept() -> bool:
        """Send what the store lacks, cancel the call, and look. A cancellation may overtake the last byte."""
        nonlocal pause_s
        offset = 0
        # NOT_FOUND: nothing has arrived.
        with contextlib.suppress(grpc.aio.AioRpcError):
            offset = (await store.stub.StatArtifact(pb.StatArtifactRequest(sha256=sha256(data)))).received_bytes
        if offset < len(data):
            call = store.stub.PutArtifact(never_closed(offset))
            await asyncio.sleep(pause_s)
            call.cancel()
            pause_s *= 2
        return offset == len(data)

    await until(is_kept, "what was gathered is kept")
    answer = await store.put(data, offset=len(data))
    assert answer.artifact.size_bytes == len(data)


async def test_two_uploads_of_one_digest_at_once(store: Store) -> None:
    data = os.urandom(3 * MIB + 5)
    barrier = asyncio.Barrier(4)

    async def slowly():
        for at, message in enumerate(upload(data, chunk_bytes=MIB)):
            if at == 2:
                await barrier.wait()
            yield message

    answers = await asyncio.gather(*(store.stub.PutArtifact(slowly()) for _ in range(4)))
    assert {answer.artifact.sha256 for answer in answers} == {sha256(data)}
    assert len({str(answer.artifact.created_at) for answer in answers}) == 1
    assert await store.get(sha256(data)) == (len(data), data)
    assert store.staged == []


async def test_a_wrong_upload_beside_a_right_one(store: Store) -> None:
    data = os.urandom(2 * MIB)
    digest = sha256(data)
    half = asyncio.Event()

    async def right():
        messages = list(upload(data, chunk_bytes=MIB))
        yield messages[0]
        yield messages[1]
        await half.wait()
        yield messages[2]

    call = store.stub.PutArtifact(right())
    await until(lambda: any(p.stat().st_size for p in store.staged), "the right one is under way")
    await refused(store.put(bytes(2 * MIB), sha256=digest), StatusCode.DATA_LOSS)
    half.set()
    assert not (await call).existed
    assert await store.get(digest) == (len(data), data)


async def test_bytes_that_do_not_hash_are_discarded(store: Store) -> None:
    data = os.urandom(MIB + 17)
    digest = sha256(data)
    await refused(store.put(data[:-1] + b"?", sha256=digest), StatusCode.DATA_LOSS, digest, "discarded")
    await refused(store.put(b"", sha256=digest, size_bytes=0), StatusCode.DATA_LOSS)
    await refused(store.stub.StatArtifact(pb.StatArtifactRequest(sha256=digest)), StatusCode.NOT_FOUND)
    await refused(store.get(digest), StatusCode.NOT_FOUND)
    assert store.staged == []
    assert store.blobs(digest) == []
    assert not (await store.put(data)).existed


async def test_a_resumed_upload_is_hashed_from_its_start(store: Store) -> None:
    data = os.urandom(2 * MIB)
    digest = sha256(data)
    wrong = [header(sha256=digest, size_bytes=len(data)), pb.PutArtifactRequest(chunk=bytes(MIB))]
    await refused(store.stub.PutArtifact(iter(wrong)), StatusCode.INVALID_ARGUMENT)
    await refused(store.put(data, offset=MIB), StatusCode.DATA_LOSS)
    await refused(store.stub.StatArtifact(pb.StatArtifactRequest(sha256=digest)), StatusCode.NOT_FOUND)
    assert not (await store.put(data)).existed


CHUNK = pb.PutArtifactRequest(chunk=b"abc")
ABC = sha256(b"abc")


@pytest.mark.parametrize(
    ("messages", "code", "words"),
    [
        ([], StatusCode.INVALID_ARGUMENT, ["header"]),
        ([CHUNK], StatusCode.INVALID_ARGUMENT, ["header"]),
        ([pb.PutArtifactRequest()], StatusCode.INVALID_ARGUMENT, ["header"]),
        ([header(sha256=ABC, size_bytes=3), header(sha256=ABC, size_bytes=3)], StatusCode.INVALID_ARGUMENT, ["header"]),
        ([header(sha256=ABC, size_bytes=3), pb.PutArtifactRequest()], StatusCode.INVALID_ARGUMENT, ["empty"]),
        ([header(sha256=ABC, size_bytes=3), CHUNK, CHUNK], StatusCode.INVALID_ARGUMENT, ["beyond"]),
        ([header(sha256=ABC, size_bytes=2), CHUNK], StatusCode.INVALID_ARGUMENT, ["beyond"]),
        ([header(sha256=ABC, size_bytes=-1)], StatusCode.INVALID_ARGUMENT, ["size_bytes", "-1"]),
        ([header(sha256=ABC, size_bytes=3, offset=-1)], StatusCode.INVALID_ARGUMENT, ["offset", "-1"]),
        ([header(sha256=ABC, size_bytes=3, offset=4)], StatusCode.INVALID_ARGUMENT, ["offset", "4"]),
        ([header(sha256=ABC, size_bytes=3, offset=2), CHUNK], StatusCode.FAILED_PRECONDITION, ["2"]),
        ([header(sha256=ABC, size_bytes=9 << 30)], StatusCode.RESOURCE_EXHAUSTED, [str(8 << 30)]),
        ([header(sha256=ABC, size_bytes=(1 << 63) - 1)], StatusCode.RESOURCE_EXHAUSTED, [str(8 << 30)]),
        ([header(sha256=ABC, size_bytes=8 << 20), pb.PutArtifactRequest(chunk=bytes((4 << 20) + 1))],
         StatusCode.INVALID_ARGUMENT, ["chunk"]),
    ],
)  # fmt: skip
async def test_a_hostile_upload_is_named(
    store: Store, messages: list[pb.PutArtifactRequest], code: StatusCode, words: list[str]
) -> None:
    await refused(store.stub.PutArtifact(iter(messages)), code, *words)
    await refused(store.get(ABC), StatusCode.NOT_FOUND)
    assert (await store.put(b"abc")).artifact.size_bytes == 3


@on_shared_loop
@pytest.mark.parametrize(
    "digest",
    [
        "",
        "0",
        EMPTY[:-1],
        EMPTY + "0",
        EMPTY.upper(),
        "g" * 64,
        "../" * 21 + "x",
        "\0" * 64,
        "é" * 64,
        EMPTY + "\n",
        "*" * 64,
    ],
)
async def test_a_hostile_digest_is_named(shared_store: Store, digest: str) -> None:
    await refused(
        shared_store.put(b"", sha256=digest), StatusCode.INVALID_ARGUMENT, "sha256", "64 lower-case hex digits"
    )
    await refused(
        shared_store.stub.StatArtifact(pb.StatArtifactRequest(sha256=digest)), StatusCode.INVALID_ARGUMENT, "sha256"
    )
    await refused(shared_store.get(digest), StatusCode.INVALID_ARGUMENT, "sha256")


async def test_a_size_that_contradicts_what_is_there(store: Store) -> None:
    await store.put(b"abc")
    await refused(store.put(b"abc", size_bytes=4), StatusCode.INVALID_ARGUMENT, "size_bytes")


async def test_offsets_of_get(store: Store) -> None:
    await store.put(b"abc")
    assert await store.get(ABC, 3) == (3, b"")
    await refused(store.get(ABC, 4), StatusCode.OUT_OF_RANGE, "4")
    await refused(store.get(ABC, (1 << 63) - 1), StatusCode.OUT_OF_RANGE)
    await refused(store.get(ABC, -1), StatusCode.INVALID_ARGUMENT, "offset")
    await refused(store.get(EMPTY, 0), StatusCode.NOT_FOUND)


@on_shared_loop
@pytest.mark.parametrize("harm", ["flip", "shorten", "lengthen", "remove"])
async def test_rot_is_found_and_the_next_upload_repairs_it(shared_store: Store, harm: str) -> None:
    data = os.urandom(6 * MIB + 1)
    digest = sha256(data)
    await shared_store.put(data)
    blob = shared_store.blob(digest)
    if harm == "flip":
        with blob.open("r+b") as file:
            file.seek(5 * MIB)
            file.write(bytes([data[5 * MIB] ^ 1]))
    elif harm == "remove":
        blob.unlink()
    else:
        os.truncate(blob, len(data) + (1 if harm == "lengthen" else -1))
    await refused(shared_store.get(digest), StatusCode.DATA_LOSS, digest)
    # Known to be damaged now: it counts as missing until it is uploaded again.
    await refused(shared_store.get(digest), StatusCode.NOT_FOUND)
    assert not (await shared_store.put(data)).existed
    assert await shared_store.get(digest) == (len(data), data)


async def test_an_upload_that_nobody_goes_on_with_is_discarded(config: StoreConfig) -> None:
    async with running_store(config.model_copy(update={"upload_age_ms": 1_000})) as store:
        short = [header(sha256=ABC, size_bytes=3), pb.PutArtifactRequest(chunk=b"ab")]
        await refused(store.stub.PutArtifact(iter(short)), StatusCode.INVALID_ARGUMENT)
        assert len(store.staged) == 1
        await until(lambda: store.staged == [], "it is too old")


async def test_flow_control_holds_a_slow_reader_back(store: Store) -> None:
    data = os.urandom(40 * MIB)
    await store.put(data)
    call = store.stub.GetArtifact(pb.GetArtifactRequest(sha256=sha256(data)))
    first = await call.read()
    assert first.size_bytes == len(data)
    # Meanwhile the store answers others, and after a while the rest still comes.
    assert (await store.put(b"abc")).artifact.size_bytes == 3
    received = first.chunk
    while (message := await call.read()) is not grpc.aio.EOF:
        received += message.chunk
    assert received == data


async def test_a_limit_on_size(config: StoreConfig) -> None:
    async with running_store(config.model_copy(update={"max_artifact_bytes": 1000})) as store:
        await refused(store.put(bytes(1001)), StatusCode.RESOURCE_EXHAUSTED, "1001", "1000")
        assert (await store.put(bytes(1000))).artifact.size_bytes == 1000


async def test_a_limit_on_uploads(config: StoreConfig) -> None:
    async with running_store(config.model_copy(update={"max_uploads": 2})) as store:

        async def open_upload(n: int):
            yield header(sha256=sha256(b"%d" % n), size_bytes=100)
            await asyncio.Event().wait()

        calls = [store.stub.PutArtifact(open_upload(n)) for n in range(2)]
        await until(lambda: len(store.staged) == 2, "both are open")
        await refused(store.put(b"abc"), StatusCode.RESOURCE_EXHAUSTED, "2 uploads")
        for call in calls:
            call.cancel()

        async def taken() -> bool:
            try:
                return (await store.put(b"abc")).artifact.size_bytes == 3
            except grpc.aio.AioRpcError as err:
                if err.code() != StatusCode.RESOURCE_EXHAUSTED:
                    raise
                return False

        await until(taken, "the store takes uploads again")


async def test_an_upload_that_says_nothing_is_ended(config: StoreConfig) -> None:
    async with running_store(config.model_copy(update={"upload_idle_ms": 100})) as store:

        async def silent():
            yield header(sha256=ABC, size_bytes=3)
            yield pb.PutArtifactRequest(chunk=b"ab")
            await asyncio.Event().wait()

        await refused(store.stub.PutArtifact(silent()), StatusCode.DEADLINE_EXCEEDED, "nothing")
        assert (await store.stub.StatArtifact(pb.StatArtifactRequest(sha256=ABC))).received_bytes == 2
        await store.put(b"abc", offset=2)
        assert await store.get(ABC) == (3, b"abc")


async def test_slow_readers_of_one_tenant_leave_places_to_others(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.store.artifact_rpc.READS_AT_ONCE", 6)
    data = os.urandom(24 * MIB)
    digest = sha256(data)
    async with running_store(config) as store:

        def reading(tenant: str) -> grpc.aio.UnaryStreamCall[pb.GetArtifactRequest, pb.GetArtifactResponse]:
            named = (("x-shoal-tenant", tenant),) if tenant else ()
            return store.stub.GetArtifact(pb.GetArtifactRequest(sha256=digest), metadata=named)

        async def begun(tenant: str) -> grpc.aio.UnaryStreamCall[pb.GetArtifactRequest, pb.GetArtifactResponse]:
            call = reading(tenant)
            response = await call.read()
            assert isinstance(response, pb.GetArtifactResponse)
            assert response.size_bytes == len(data)
            return call

        for tenant in ("slow", "other"):
            named = (("x-shoal-tenant", tenant),)
            chunks = (pb.PutArtifactRequest(chunk=data[at : at + MIB]) for at in range(0, len(data), MIB))
            messages = iter([header(sha256=digest, size_bytes=len(data)), *chunks])
            await store.stub.PutArtifact(messages, metadata=named)
        # They read nothing but the first message.
        slow = [await begun("slow") for _ in range(4)]
        await refused(reading("slow").read(), StatusCode.RESOURCE_EXHAUSTED, "4 reads of artifacts of this tenant")
        others = [await begun("other"), await begun("")]
        for call in (*slow, *others):
            call.cancel()
