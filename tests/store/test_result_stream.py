"""StreamResults over the wire: each result once, oldest first, whatever breaks and whatever comes meanwhile."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import StatusCode

from services.store.artifacts.local_blobs import LocalBlobs
from services.store.config import StoreConfig
from shoal.errors import Unavailable
from shoal.store.v1 import store_pb2 as pb
from tests.breakable import until
from tests.store.conftest import Store, on_shared_loop, refused, running_store
from tests.store.test_result_rpc import BAD, FAILED, answer, forged, get, pages, put, result

pytestmark = pytest.mark.mongo


def stream(store: Store, *, cursor: str = "", watch: bool = False, bare: bool = False, **wanted: object):
    request = pb.StreamResultsRequest(
        filter=pb.ResultFilter(**wanted), cursor=cursor, omit_response=bare, want_watch_token=watch
    )
    return store.stub.StreamResults(request, timeout=60)


async def pieces(call: object) -> list[pb.StreamResultsResponse]:
    return [piece async for piece in call]


def jobs(found: Sequence[pb.StreamResultsResponse]) -> list[str]:
    return [result.job_id for piece in found for result in piece.results]


async def many(store: Store, count: int, **fields: object) -> list[str]:
    """Records results in several calls, so that they have several times; gives the jobs, oldest first."""
    named = [f"j{n:04}" for n in range(count)]
    for first in range(0, count, 150):
        await put(store, *(result(job, **fields) for job in named[first : first + 150]))
    return named


async def test_an_empty_store_streams_nothing(store: Store) -> None:
    (only,) = await pieces(stream(store))
    assert (only.complete, list(only.results), only.watch_token) == (True, [], "")
    (again,) = await pieces(stream(store, cursor=only.cursor))
    assert (again.complete, list(again.results)) == (True, [])


async def test_everything_oldest_first_with_its_answers(store: Store) -> None:
    named = await many(store, 700)
    found = await pieces(stream(store))
    assert jobs(found) == named
    assert [piece.complete for piece in found] == [False] * (len(found) - 1) + [True]
    assert not found[0].results
    assert found[1].results[7] == await get(store, "j0007")
    bare = await pieces(stream(store, bare=True))
    assert jobs(bare) == named
    assert not any(one.HasField("response") for piece in bare for one in piece.results)


async def test_it_goes_on_after_each_message_in_any_call(store: Store) -> None:
    named = await many(store, 700, tenant="t")
    await put(store, result("other", tenant="u"))
    found, cursor = [], ""
    while not (found and found[-1].complete):
        call = stream(store, cursor=cursor, tenant="t")
        for _ in range(2):  # The one that says where it stands, and one with results: then the reader goes away.
            piece = await call.read()
            if piece is grpc.aio.EOF:
                break
            found.append(piece)
            cursor = piece.cursor
        call.cancel()
    assert jobs(found) == named


@pytest.mark.parametrize("letter", ["雲", "\U0001f41f", '"', "\\"])
async def test_tokens_of_the_longest_job_ids(store: Store, letter: str) -> None:
    """A service takes back what it gave, whatever a job is called."""
    named = [f"{n}" + letter * 63 for n in range(3)]
    await put(store, *map(result, named))
    assert await pages(store, page_size=1) == [[job] for job in named[::-1]]
    for piece in await pieces(stream(store)):
        rest = jobs(await pieces(stream(store, cursor=piece.cursor)))
        assert rest == ([] if piece.results else named)


async def test_its_end_stands_when_it_is_opened(store: Store) -> None:
    named = await many(store, 450)
    call = stream(store)
    first = await call.read()
    await put(store, result("later"))
    assert jobs(await pieces(call)) == named
    again = await pieces(stream(store, cursor=first.cursor))
    assert jobs(again) == named
    assert jobs(await pieces(stream(store))) == [*named, "later"]


async def test_what_was_recorded_before_is_never_missed_beside_writers(store: Store) -> None:
    """Many writers at once, streams opened among them: each has all that was acknowledged before it began, once."""
    acknowledged: list[str] = []
    left = 12

    async def write(writer: int) -> None:
        nonlocal left
        for n in range(30):
            named = [f"{writer}-{n}-{m}" for m in range(5)]
            await put(store, *map(result, named))
            acknowledged.extend(named)
        left -= 1

    async def read() -> None:
        while left:
            before = list(acknowledged)
            found = jobs(await pieces(stream(store, bare=True)))
            assert len(found) == len(set(found))
            assert not set(before) - set(found)

    await asyncio.gather(*map(write, range(12)), read(), read())
    assert sorted(jobs(await pieces(stream(store)))) == sorted(acknowledged)


async def test_stream_and_watch_together_miss_nothing(store: Store) -> None:
    recorded: list[str] = []
    stop = asyncio.Event()

    async def write() -> None:
        while not stop.is_set() or len(recorded) < 100:
            job = f"w{len(recorded):05}"
            await put(store, result(job))
            recorded.append(job)

    writing = asyncio.create_task(write())
    call = stream(store, watch=True)
    token = (await call.read()).watch_token
    assert token
    streamed = jobs(await pieces(call))
    stop.set()
    await writing
    await put(store, result("last"))
    seen = set(streamed)
    watching = store.stub.WatchResults(pb.WatchResultsRequest(resume_token=token), timeout=60)
    async for item in watching:
        seen.add(item.result.job_id)
        if item.result.job_id == "last":
            break
    watching.cancel()
    assert seen - {""} == {*recorded, "last"}


async def test_filters_are_those_of_queries(store: Store) -> None:
    for n in range(24):
        fields = {
            "model_name": f"m{n % 2}",
            "tenant": f"t{n % 3}",
            "labels": {"n": str(n % 4)},
        }
        await put(store, result(f"j{n:02}", FAILED if n % 5 == 0 else 1, **fields))
    asked: list[dict[str, object]] = [
        {"model_name": "m1", "tenant": "t2"},
        {"outcome": FAILED, "labels": {"n": "0"}},
        {"model_name": "m1", "outcome": 1},
        {"job_ids": ["j01", "j09", "j05", "none"]},
    ]
    for wanted in asked:
        (expected,) = await pages(store, **wanted)
        assert expected
        assert jobs(await pieces(stream(store, **wanted))) == expected[::-1]


async def test_large_answers_have_messages_of_their_own(store: Store) -> None:
    named = [f"j{n}" for n in range(5)]
    for job in named:
        await put(store, result(job, response=answer(3 << 20)))
    found = await pieces(stream(store))
    assert jobs(found) == named
    assert max(len(piece.results) for piece in found) == 1


async def large(store: Store, job: str) -> Path:
    """Records a result whose answer is a blob; gives the blob."""
    folder = store.root / "responses"
    before = set(folder.rglob("*"))
    await put(store, result(job, response=answer(2 << 20)))
    (blob,) = [path for path in set(folder.rglob("*")) - before if path.is_file()]
    return blob


def rot(blob: Path) -> None:
    data = bytearray(blob.read_bytes())
    data[1 << 20] ^= 1
    blob.write_bytes(data)


async def test_a_damaged_answer_ends_no_stream(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    blobs = {job: await large(store, job) for job in "abcd"}
    rot(blobs["b"])
    blobs["c"].unlink()
    found = await pieces(stream(store))
    assert found[-1].complete
    by_job = {one.job_id: one for piece in found for one in piece.results}
    assert list(by_job) == ["a", "b", "c", "d"]
    assert [one.HasField("response") for one in by_job.values()] == [True, False, False, True]
    assert (by_job["a"].answer_lost, by_job["d"].answer_lost) == ("", "")
    for job, how in (("b", "damaged"), ("c", "missing")):
        assert how in by_job[job].answer_lost
        assert (by_job[job].outcome, by_job[job].model_name) == (by_job["a"].outcome, by_job["a"].model_name)
        assert any(f"job {job}:" in line and blobs[job].name in line for line in caplog.messages)
        assert (await get(store, job)) == by_job[job]
    assert jobs(await pieces(stream(store, cursor=found[1].cursor))) == ["b", "c", "d"]
    bare = await pieces(stream(store, bare=True))  # Who wants no answers hears of no damage.
    assert not any(one.answer_lost for piece in bare for one in piece.results)


async def test_a_damaged_answer_ends_no_watch(store: Store) -> None:
    call = stream(store, watch=True)
    token = (await call.read()).watch_token
    rot(await large(store, "a"))
    await put(store, result("b"))
    watching = store.stub.WatchResults(pb.WatchResultsRequest(resume_token=token), timeout=60)
    seen = []
    async for item in watching:
        if item.result.job_id:
            seen.append(item.result)
        if item.result.job_id == "b":
            break
    watching.cancel()
    assert [(one.job_id, bool(one.answer_lost)) for one in seen] == [("a", True), ("b", False)]


async def test_blobs_that_are_away_are_not_passed_over(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for job in "ab":
        await large(store, job)

    async def away(self: Any, key: str, start: int, end: int) -> memoryview:
        raise Unavailable(f"reading blob {key}: the blob store does not do it just now: retry in a moment")

    with monkeypatch.context() as patch:
        patch.setattr(LocalBlobs, "_window", away)
        call = stream(store)
        first = await call.read()
        await refused(call, StatusCode.UNAVAILABLE, "retry")
    assert jobs(await pieces(stream(store, cursor=first.cursor))) == ["a", "b"]
    elsewhere = store.root.rename(store.root.with_name("elsewhere"))  # Its disk is not mounted.
    await refused(stream(store), StatusCode.FAILED_PRECONDITION, "mounted")
    elsewhere.rename(store.root)
    found = await pieces(stream(store))
    assert [one.HasField("response") for piece in found for one in piece.results] == [True, True]


@on_shared_loop
@pytest.mark.parametrize(
    "cursor",
    ["x", "é", "\0", "====", "bnVsbA==", forged(1, 0, "j", ""), forged(2, 0, "j", ""), forged(2, 0, "j", 0, 1, ""),
     forged(2, 0, "j", -1, "j", ""), forged(2, "0", "j", 0, "j", ""), forged(2, 0, "\ud800", 0, "j", ""),
     forged(3, 0, "j", 0, "j", ""), "A" * 100_000],
)  # fmt: skip
async def test_a_bad_cursor_is_named(shared_store: Store, cursor: str) -> None:
    await refused(stream(shared_store, cursor=cursor), BAD, "cursor")


async def test_a_cursor_belongs_to_its_filter(store: Store) -> None:
    await put(store, result("j"))
    (first, _) = await pieces(stream(store))
    await refused(stream(store, cursor=first.cursor, tenant="t"), BAD, "cursor", "filter")
    await refused(stream(store, cursor=first.cursor, watch=True), BAD, "want_watch_token")
    await refused(stream(store, labels={"k" * 257: ""}), BAD, "labels")
    (_, digest) = (0, json.loads(base64.b64decode(first.cursor))[-1])
    backwards = forged(2, 9, "j", 0, "j", digest)
    (only,) = await pieces(stream(store, cursor=backwards))
    assert (only.complete, list(only.results)) == (True, [])


async def test_a_limit_on_streams(config: StoreConfig) -> None:
    async with running_store(config.model_copy(update={"max_streams": 1})) as store:
        # More than gRPC takes in ahead of its reader, so that the stream waits.
        await put(store, *(result(f"j{n}", response=answer(900 << 10)) for n in range(40)))
        held = stream(store)
        await held.read()
        await refused(stream(store), StatusCode.RESOURCE_EXHAUSTED, "1 streams")
        held.cancel()

        async def whole() -> bool:
            with contextlib.suppress(grpc.aio.AioRpcError):
                return len(jobs(await pieces(stream(store)))) == 40
            return False

        await until(whole, "the place of the stream that was given up is free")
