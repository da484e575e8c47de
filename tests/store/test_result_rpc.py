"""PutResults, GetResult, QueryResults, WatchResults: the promises of store.proto, over the wire."""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import os
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from itertools import chain, product
from types import SimpleNamespace
from typing import Any, cast

import bson
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from grpc import StatusCode
from pymongo import AsyncMongoClient

from mesh import change_tokens, log_reads
from mesh.mongo import Document
from services.store.artifacts.object_blobs import ObjectBlobs
from services.store.config import StoreConfig
from services.store.documents import Collections
from services.store.results import result_watch
from services.store.results.large_responses import LargeResponses
from services.store.results.read_gate import ReadGate
from services.store.results.result_documents import BlobRef
from services.store.results.result_rules import check_results
from services.store.results.result_watch import ResultWatch
from services.store.results.results import Results
from shoal.errors import InvalidArgument
from shoal.inference.v2 import inference_pb2 as oip
from shoal.store.v1 import store_pb2 as pb
from tests.breakable import PATIENCE_S, until
from tests.change_logs import Answers, Log
from tests.store.conftest import Store, on_shared_loop, refused, running_store

pytestmark = pytest.mark.mongo

OK, FAILED = pb.Result.OUTCOME_SUCCEEDED, pb.Result.OUTCOME_FAILED
BAD = StatusCode.INVALID_ARGUMENT


def answer(size: int = 12) -> oip.ModelInferResponse:
    response = oip.ModelInferResponse(model_name="m", model_version="1", id="r")
    response.outputs.add(name="y", datatype="UINT8", shape=[size])
    response.raw_output_contents.append(os.urandom(size))
    return response


def result(job_id: str, outcome: int = OK, **fields: object) -> pb.Result:
    if outcome == OK:
        fields.setdefault("response", answer())
    return pb.Result(job_id=job_id, outcome=outcome, **fields)


async def put(store: Store, *results: pb.Result) -> list[pb.PutResultsResponse.Entry]:
    return list((await store.stub.PutResults(pb.PutResultsRequest(results=results))).entries)


async def get(store: Store, job_id: str) -> pb.Result:
    return (await store.stub.GetResult(pb.GetResultRequest(job_id=job_id))).result


async def query(store: Store, **fields: object) -> tuple[list[str], str]:
    answer = await store.stub.QueryResults(pb.QueryResultsRequest(**fields))
    return [result.job_id for result in answer.results], answer.next_page_token


async def pages(store: Store, **fields: object) -> list[list[str]]:
    found, token = [], ""
    while True:
        ids, token = await query(store, page_token=token, **fields)
        found.append(ids)
        if not token:
            return found


async def test_what_is_put_is_what_is_got(store: Store) -> None:
    full = result(
        "01JD", OK, model_name="m", model_version="3", message="ünïcode\0", attempt=2, lease_id="l-1", tenant="acme",
        submitted_at=Timestamp(seconds=1_700_000_000, nanos=123_456_789), instance="local/infer-0",
        labels={"b": "1", "a": "ü"},
    )  # fmt: skip
    failed = result("j2", FAILED, code=13, message="boom", attempt=5)
    entries = await put(store, full, failed)
    assert [(entry.job_id, entry.recorded) for entry in entries] == [("01JD", True), ("j2", True)]
    for sent, entry in zip([full, failed], entries, strict=True):
        got = await get(store, sent.job_id)
        assert got.HasField("recorded_at")
        sent.recorded_at.CopyFrom(got.recorded_at)
        assert got == sent
        bare = pb.Result()
        bare.CopyFrom(got)
        bare.ClearField("response")
        assert entry.standing == bare


async def test_the_clock_of_the_store_counts(store: Store) -> None:
    before = datetime.now(UTC) - timedelta(milliseconds=1)
    await put(store, result("j", recorded_at=Timestamp(seconds=1)))
    recorded = (await get(store, "j")).recorded_at.ToDatetime(UTC)
    assert before <= recorded <= datetime.now(UTC)


async def test_the_first_result_stands(store: Store) -> None:
    first = result("j", model_name="first", lease_id="l1")
    await put(store, first)
    standing = await get(store, "j")
    entries = await put(store, result("new"), result("j", FAILED, code=2, lease_id="l2"), result("newer"))
    assert [(e.job_id, e.recorded) for e in entries] == [("new", True), ("j", False), ("newer", True)]
    assert entries[1].standing.lease_id == "l1"
    assert entries[1].standing.recorded_at == standing.recorded_at
    assert not entries[1].standing.HasField("response")
    assert await get(store, "j") == standing


async def test_of_many_writers_at_once_one_stands(store: Store) -> None:
    jobs = [f"j{n}" for n in range(20)]
    answers = await asyncio.gather(
        *(put(store, *(result(job, lease_id=str(writer)) for job in jobs)) for writer in range(8))
    )
    for at, job in enumerate(jobs):
        winners = [writer for writer, entries in enumerate(answers) if entries[at].recorded]
        assert len(winners) == 1
        assert {entries[at].standing.lease_id for entries in answers} == {str(winners[0])}
        assert (await get(store, job)).lease_id == str(winners[0])


async def test_a_thousand_at_once(store: Store) -> None:
    entries = await put(store, *(result(f"j{n}") for n in range(1000)))
    assert all(entry.recorded for entry in entries)
    assert [entry.job_id for entry in entries] == [f"j{n}" for n in range(1000)]
    again = await put(store, *(result(f"j{n}") for n in range(500, 1500)))
    assert [entry.recorded for entry in again] == [False] * 500 + [True] * 500


@on_shared_loop
@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (pb.Result(outcome=OK), ["job_id"]),
        (pb.Result(job_id="x" * 65, outcome=OK), ["job_id"]),
        (pb.Result(job_id="a\0b", outcome=OK), ["job_id"]),
        (pb.Result(job_id="a\n", outcome=OK), ["job_id"]),
        (pb.Result(job_id="ok", outcome=OK), ["job_id", "results[0]"]),
        (pb.Result(job_id="j"), ["outcome"]),
        (pb.Result(job_id="j", outcome=99), ["outcome", "99"]),
        (pb.Result(job_id="j", outcome=-1), ["outcome"]),
        (pb.Result(job_id="j", outcome=FAILED, response=oip.ModelInferResponse()), ["response"]),
        (pb.Result(job_id="j", outcome=FAILED, code=17), ["code"]),
        (pb.Result(job_id="j", outcome=FAILED, code=-1), ["code"]),
        (pb.Result(job_id="j", outcome=OK, attempt=-1), ["attempt"]),
        (pb.Result(job_id="j", outcome=OK, model_name="m" * 1025), ["model_name"]),
        (pb.Result(job_id="j", outcome=OK, tenant="m" * 1025), ["tenant"]),
        (pb.Result(job_id="j", outcome=OK, message="m" * 65537), ["message"]),
        (pb.Result(job_id="j", outcome=OK, submitted_at=Timestamp(seconds=1 << 60)), ["submitted_at"]),
        (pb.Result(job_id="j", outcome=OK, submitted_at=Timestamp(nanos=-1)), ["submitted_at"]),
        (pb.Result(job_id="j", outcome=OK, labels={"k" * 257: ""}), ["labels"]),
        (pb.Result(job_id="j", outcome=OK, labels={"k": "v" * 257}), ["labels", "'k'"]),
        (pb.Result(job_id="j", outcome=OK, labels={str(n): "" for n in range(65)}), ["labels", "65"]),
    ],
)
async def test_a_wrong_result_is_named_and_none_is_recorded(
    shared_store: Store, wrong: pb.Result, words: list[str]
) -> None:
    await refused(put(shared_store, result("ok"), wrong), BAD, "results[1]", *words)
    assert await query(shared_store) == ([], "")


@on_shared_loop
async def test_the_number_of_results(shared_store: Store) -> None:
    await refused(put(shared_store), BAD, "1 to 1000")
    await refused(put(shared_store, *(result(f"j{n}", FAILED) for n in range(1001))), BAD, "1001")
    assert await query(shared_store) == ([], "")


async def test_a_response_that_does_not_fit_a_document(store: Store) -> None:
    sizes = [(256 << 10) - 200, (256 << 10) + 1, 20 << 20, 5]
    sent = [result(f"j{n}", response=answer(size)) for n, size in enumerate(sizes)]
    assert all(entry.recorded for entry in await put(store, *sent))
    for one in sent:
        assert (await get(store, one.job_id)).response == one.response
    blobs = [path for path in (store.root / "responses").rglob("*") if path.is_file()]
    assert len(blobs) == 2
    found = await store.stub.QueryResults(pb.QueryResultsRequest(job_ids=[one.job_id for one in sent]))
    assert {one.job_id: one.response for one in found.results} == {one.job_id: one.response for one in sent}
    bare = await store.stub.QueryResults(pb.QueryResultsRequest(omit_response=True))
    assert len(bare.results) == 4
    assert not any(one.HasField("response") for one in bare.results)
    # One that loses leaves no blob behind.
    (entry,) = await put(store, result("j2", response=answer(3 << 20)))
    assert not entry.recorded
    assert [path for path in (store.root / "responses").rglob("*") if path.is_file()] == blobs


async def test_how_much_lies_in_a_document_is_for_the_operator_to_say(config: StoreConfig) -> None:
    sent = [result(f"j{size}", response=answer(size)) for size in (100, 2_000, 300_000)]
    for inline_bytes, blobs in ((1_000, 2), (1 << 20, 0)):
        changed = {"inline_bytes": inline_bytes, "database": f"{config.database}-{blobs}"}
        changed["blobs"] = f"{config.blobs}-{blobs}"
        async with running_store(config.model_copy(update=changed)) as store:
            await put(store, *sent)
            assert len([path for path in (store.root / "responses").rglob("*") if path.is_file()]) == blobs
            assert [(await get(store, one.job_id)).response for one in sent] == [one.response for one in sent]


async def streamed(store: Store) -> list[str]:
    stream = store.stub.StreamResults(pb.StreamResultsRequest())
    return [one.job_id async for page in stream for one in page.results]


@pytest.mark.parametrize(
    ("call", "at_once"),
    [(lambda store: get(store, "j0"), 2), (query, 1), (streamed, 1)],
    ids=["get", "query", "stream"],
)
async def test_large_responses_that_are_read_at_a_time_are_bounded(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch, call: Callable[[Store], Awaitable[object]], at_once: int
) -> None:
    read, may_end, counts = LargeResponses.read, asyncio.Event(), [0]

    async def held(responses: LargeResponses, ref: BlobRef) -> bytes:
        counts.append(counts[-1] + 1)
        await may_end.wait()
        counts.append(counts[-1] - 1)
        return await read(responses, ref)

    # Of single responses two find room, of pages one.
    monkeypatch.setattr("services.store.results.results.ReadGate", lambda: ReadGate(5 << 20))
    monkeypatch.setattr(LargeResponses, "read", held)
    async with running_store(config) as store:
        for n in range(3):
            await put(store, result(f"j{n}", response=answer(2 << 20)))
        calls = [asyncio.ensure_future(call(store)) for _ in range(4)]
        await until(lambda: counts[-1] == at_once, "the first reads")
        # A small read overtakes them, and those that arrived before it have begun.
        assert not (await store.stub.QueryResults(pb.QueryResultsRequest(omit_response=True, tenant="none"))).results
        may_end.set()
        await asyncio.gather(*calls)
        assert max(counts) == at_once


async def test_a_response_near_the_limit_of_a_message(store: Store) -> None:
    huge = result("huge", response=answer((120 << 20) - 100))
    assert (await put(store, huge, result("small")))[0].recorded
    assert (await get(store, "huge")).response == huge.response
    assert await pages(store) == [["small"], ["huge"]]
    with pytest.raises(InvalidArgument, match=r"results\[0\]\.response"):
        check_results([result("more", response=answer((120 << 20) + 1))])


async def test_a_page_ends_before_it_outgrows_a_message(store: Store) -> None:
    for n in range(3):
        await put(store, *(result(f"{n}{m}", response=answer(15 << 20)) for m in range(3)))
    found = await pages(store)
    assert sorted(chain(*found)) == sorted(f"{n}{m}" for n in range(3) for m in range(3))
    assert max(map(len, found)) == 4
    assert [len(page) for page in await pages(store, omit_response=True)] == [9]


async def test_rot_of_a_large_response(store: Store) -> None:
    await put(store, result("j", response=answer(2 << 20)), result("k", response=answer(2 << 20)))
    for path in (store.root / "responses").rglob("*"):
        if path.is_file():
            data = bytearray(path.read_bytes())
            data[1 << 20] ^= 1
            path.write_bytes(data)
    await put(store, result("l", response=answer(2 << 20)))
    found = await get(store, "j")
    assert "the response is damaged" in found.answer_lost
    assert (found.outcome, found.model_name, found.HasField("response")) == (OK, "", False)
    page = (await store.stub.QueryResults(pb.QueryResultsRequest())).results
    assert [(one.job_id, bool(one.answer_lost), one.HasField("response")) for one in page] == [
        ("l", False, True),
        ("k", True, False),
        ("j", True, False),
    ]
    for path in (store.root / "responses").rglob("*"):
        if path.is_file():
            path.unlink()
    assert "missing" in (await get(store, "j")).answer_lost
    bare = (await store.stub.QueryResults(pb.QueryResultsRequest(omit_response=True))).results
    assert [(one.job_id, one.answer_lost) for one in bare] == [("l", ""), ("k", ""), ("j", "")]


async def test_an_answer_that_is_removed_while_it_is_read_is_not_damaged(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    await put(store, result("j", response=answer(2 << 20)))
    read = ObjectBlobs.read

    async def late(self: ObjectBlobs, key: str, offset: int, size: int) -> AsyncIterator[bytes]:
        (store.root / key).unlink()
        async with AsyncMongoClient(store.config.mongo) as client:
            await client[store.config.database]["results"].delete_one({"_id": "j"})
        async for chunk in read(self, key, offset, size):
            yield chunk

    monkeypatch.setattr(ObjectBlobs, "read", late)
    await refused(get(store, "j"), StatusCode.NOT_FOUND, "job j: no result (yet)")


@on_shared_loop
async def test_a_job_without_a_result(shared_store: Store) -> None:
    await refused(get(shared_store, "none"), StatusCode.NOT_FOUND, "none")
    await refused(get(shared_store, ""), BAD, "job_id")
    await refused(get(shared_store, "x" * 65), BAD, "job_id")
    await refused(get(shared_store, "a\0"), BAD, "job_id")


async def test_filters(store: Store) -> None:
    await put(store, result("a", model_name="m", model_version="1", tenant="t"))
    await put(store, result("b", model_name="m", model_version="2", tenant="u"))
    await put(store, result("c", FAILED, model_name="n", model_version="1", tenant="t"))
    await put(store, result("d", pb.Result.OUTCOME_CANCELLED, model_name="n"))
    assert await query(store) == (["d", "c", "b", "a"], "")
    assert await query(store, model_name="m") == (["b", "a"], "")
    assert await query(store, model_name="m", model_version="1") == (["a"], "")
    assert await query(store, model_version="1") == (["c", "a"], "")
    assert await query(store, tenant="t") == (["c", "a"], "")
    assert await query(store, tenant="t", model_name="n") == (["c"], "")
    assert await query(store, outcome=FAILED) == (["c"], "")
    assert await query(store, outcome=OK) == (["b", "a"], "")
    assert await query(store, job_ids=["a", "d", "x"]) == (["d", "a"], "")
    assert await query(store, job_ids=["a", "a", "d"], tenant="t") == (["a"], "")
    assert await query(store, tenant="nobody") == ([], "")
    assert await query(store, tenant="$ne") == ([], "")


async def test_filters_by_label(store: Store) -> None:
    await put(store, result("a", labels={"team": "x", "": "empty"}))
    await put(store, result("b", labels={"team": "x", "stage": "2"}))
    await put(store, result("c", labels={"stage": "2", "$where": "1"}, tenant="t"))
    await put(store, result("d", labels={"a.b": "\0", "team": "X"}))
    assert await query(store, labels={"team": "x"}) == (["b", "a"], "")
    assert await query(store, labels={"team": "x", "stage": "2"}) == (["b"], "")
    assert await query(store, labels={"": "empty"}) == (["a"], "")
    assert await query(store, labels={"a.b": "\0"}) == (["d"], "")
    assert await query(store, labels={"$where": "1"}, tenant="t") == (["c"], "")
    assert await query(store, labels={"team": ""}) == ([], "")
    got = await get(store, "a")
    assert dict(got.labels) == {"team": "x", "": "empty"}


async def test_the_time_window_is_half_open(store: Store) -> None:
    times = {}
    for job in "abc":
        await put(store, result(job))
        times[job] = (await get(store, job)).recorded_at
        await asyncio.sleep(0.002)  # Another millisecond: what is asked for below.
    assert await query(store, since=times["b"]) == (["c", "b"], "")
    assert await query(store, until=times["b"]) == (["a"], "")
    assert await query(store, since=times["b"], until=times["b"]) == ([], "")
    later = Timestamp(seconds=times["b"].seconds, nanos=times["b"].nanos + 1)
    assert await query(store, since=later) == (["c"], "")
    assert await query(store, since=times["b"], until=later) == (["b"], "")
    ages = {"since": Timestamp(seconds=-62135596800), "until": Timestamp(seconds=253402300799, nanos=999_999_999)}
    assert await query(store, **ages) == (["c", "b", "a"], "")


async def test_pages_among_results_of_one_moment(store: Store) -> None:
    jobs = [f"j{n:02}" for n in range(25)]
    await put(store, *map(result, jobs))
    for page_size, filter_ in product([1, 2, 7, 24, 25, 26], [{}, {"job_ids": jobs}]):
        found = await pages(store, page_size=page_size, **filter_)
        assert [*chain(*found)] == jobs[::-1]
        assert all(len(page) == page_size for page in found[:-1])


async def test_pages_stand_still_while_results_come(store: Store) -> None:
    await put(store, *(result(f"a{n}") for n in range(4)))
    first, token = await query(store, page_size=2)
    await put(store, *(result(f"b{n}") for n in range(4)))
    rest, token = await query(store, page_size=10, page_token=token)
    assert first + rest == ["a3", "a2", "a1", "a0"]
    assert token == ""


async def test_page_sizes(store: Store) -> None:
    await put(store, *(result(f"j{n}", FAILED) for n in range(150)))
    assert len((await query(store))[0]) == 100
    assert len((await query(store, page_size=1000))[0]) == 150
    for size in [-1, 1001, (1 << 31) - 1, -(1 << 31)]:
        await refused(query(store, page_size=size), BAD, "page_size", str(size))


async def test_a_token_belongs_to_its_filter(store: Store) -> None:
    await put(store, *(result(f"j{n}", tenant="t") for n in range(4)))
    _, token = await query(store, page_size=2, tenant="t")
    await refused(query(store, page_size=2, page_token=token), BAD, "page_token", "filter")
    await refused(query(store, page_size=2, tenant="u", page_token=token), BAD, "page_token", "filter")
    assert (await query(store, page_size=1, tenant="t", page_token=token))[0] == ["j1"]


def forged(*parts: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(parts).encode()).decode()


@on_shared_loop
@pytest.mark.parametrize(
    "token",
    ["x", "é", "\0", "====", "AAAA", "W10=", "bnVsbA==", "e30=",
     forged(1, 2), forged(2, 0, "j", ""), forged(1, "0", "j", ""),
     forged(1, -1, "j", ""), forged(1, 10**30, "j", ""), forged(1, 0, None, ""), forged(1, 0, {"$gt": ""}, ""),
     forged(1, True, "j", ""), forged(1, 0, "\ud800", ""), "W1tb" * 200, "[" * 1000, "A" * 100_000],
)  # fmt: skip
async def test_a_bad_page_token_is_named(shared_store: Store, token: str) -> None:
    await refused(query(shared_store, page_token=token), BAD, "page_token")


@on_shared_loop
async def test_bad_filters_are_named(shared_store: Store) -> None:
    await refused(query(shared_store, job_ids=["j"] * 1001), BAD, "job_ids")
    await refused(query(shared_store, job_ids=["a", ""]), BAD, "job_ids[1]")
    await refused(query(shared_store, job_ids=["x" * 65]), BAD, "job_ids[0]")
    await refused(query(shared_store, outcome=99), BAD, "outcome")
    await refused(query(shared_store, model_name="x" * 1025), BAD, "model_name")
    await refused(query(shared_store, since=Timestamp(seconds=1 << 62)), BAD, "since")
    await refused(query(shared_store, until=Timestamp(nanos=1_000_000_000)), BAD, "until")
    await refused(query(shared_store, labels={"k": "v" * 257}), BAD, "labels", "'k'")
    await refused(query(shared_store, labels={str(n): "" for n in range(65)}), BAD, "labels", "65")


def watch(store: Store, **fields: object):
    return store.stub.WatchResults(pb.WatchResultsRequest(**fields), timeout=60)


async def test_a_watch_shows_what_is_recorded_from_then_on(store: Store) -> None:
    await put(store, result("before"))
    call = watch(store)
    stands = await call.read()
    assert not stands.HasField("result")
    assert stands.resume_token
    sent = result("after", model_name="m")
    await put(store, sent, result("before"))
    got = await call.read()
    assert got.result == await get(store, "after")
    await put(store, result("large", response=answer(3 << 20)))
    assert (await call.read()).result == await get(store, "large")


async def test_an_idle_watch_keeps_nothing_of_its_last_result(store: Store) -> None:
    mib, watches = 1 << 20, [watch(store) for _ in range(5)]
    for call in watches:
        await call.read()
    await put(store, result("first", response=answer(3 * mib)))
    for call in watches:
        assert (await call.read()).HasField("result")
    gc.collect()
    tracemalloc.start()
    try:
        await put(store, result("second", response=answer(3 * mib)))
        for call in watches:
            assert (await call.read()).HasField("result")

        def kept() -> int:
            gc.collect()
            return tracemalloc.get_traced_memory()[0]

        await until(lambda: kept() < 3 * mib, "no watch keeps the result")
    finally:
        tracemalloc.stop()
    for call in watches:
        call.cancel()


async def test_a_watch_that_finds_nothing_renews_its_token(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(result_watch, "_HEARTBEAT_S", 0.0)
    monkeypatch.setattr(result_watch, "_AWAIT_MS", 20)
    call = watch(store, tenant="quiet")
    await call.read()
    beside = watch(store, tenant="noisy")
    await beside.read()
    await put(store, result("of another tenant", tenant="noisy"))
    noise = await beside.read()
    while not noise.HasField("result"):
        noise = await beside.read()
    beside.cancel()
    # MongoDB's own entries of the log, and those of other databases, renew the token, too: earlier than the result.
    renewed = await call.read()
    while position(renewed) <= position(noise):
        assert not renewed.HasField("result")
        renewed = await call.read()
    call.cancel()
    call = watch(store, resume_token=renewed.resume_token)
    await call.read()
    await put(store, result("later", tenant="quiet"))
    seen = [(await call.read()).result.job_id]
    while seen[-1] != "later":
        seen.append((await call.read()).result.job_id)
    # The token is past the other tenant's result, although the second watch would show it.
    assert "of another tenant" not in seen
    call.cancel()


def position(message: pb.WatchResultsResponse) -> str:
    """Of a token in MongoDB's log; ordered."""
    return str(change_tokens.decode(message.resume_token)["_data"])


async def test_a_watch_goes_on_after_a_token(store: Store) -> None:
    call = watch(store)
    tokens = [(await call.read()).resume_token]
    for job in "abc":
        await put(store, result(job))
        tokens.append((await call.read()).resume_token)
    call.cancel()
    for at, token in enumerate(tokens):
        call = watch(store, resume_token=token)
        stands = await call.read()
        assert (stands.HasField("result"), stands.resume_token) == (False, token)
        assert [(await call.read()).result.job_id for _ in "abc"[at:]] == list("abc"[at:])
        call.cancel()


async def test_a_watch_is_narrowed(store: Store) -> None:
    call = watch(store, model_name="m", tenant="t", omit_response=True)
    await call.read()
    await put(store, result("a", model_name="m"), result("b", tenant="t"), result("c", model_name="n", tenant="t"))
    await put(
        store,
        result("d", model_name="m", tenant="t"),
        result("e", model_name="m", tenant="t", response=answer(2 << 20)),
    )
    got = [(await call.read()).result for _ in range(2)]
    assert sorted(one.job_id for one in got) == ["d", "e"]
    assert not any(one.HasField("response") for one in got)


def token_of(**fields: object) -> str:
    return base64.urlsafe_b64encode(bson.encode(fields)).decode()


@on_shared_loop
@pytest.mark.parametrize(
    "token",
    ["x", "é", "\0", "AAAA", "====", "A" * 10_000, token_of(), token_of(_data=1), token_of(_data="zz"),
     token_of(_data=""),
     token_of(_data="00"), token_of(_data="82", x=1), token_of(_data="8263", _typeBits=3), token_of(_data="FF" * 50),
     token_of(_data="8263" + "00" * 20), token_of(_data={"$gt": ""})],
)  # fmt: skip
async def test_a_bad_resume_token_is_named(shared_store: Store, token: str) -> None:
    await refused(watch(shared_store, resume_token=token), BAD, "resume_token")


@on_shared_loop
async def test_a_watch_with_a_filter_that_is_too_long(shared_store: Store) -> None:
    await refused(watch(shared_store, model_name="x" * 1025), BAD, "model_name")


async def test_a_limit_on_watches(config: StoreConfig) -> None:
    async with running_store(config.model_copy(update={"max_watches": 2})) as store:
        open_ = [watch(store) for _ in range(2)]
        for call in open_:
            await call.read()
        await refused(watch(store), StatusCode.RESOURCE_EXHAUSTED, "2 watches")
        await put(store, result("j"))
        for call in open_:
            assert (await call.read()).result.job_id == "j"


async def test_an_answer_of_mongodb_has_few_results_however_many_there_are(
    store: Store, config: StoreConfig, mongo_uri: str
) -> None:
    call = watch(store)
    token = (await call.read()).resume_token
    call.cancel()
    await put(store, *(result(f"j{number:02}") for number in range(50)))
    answers = Answers()
    client: AsyncMongoClient[Document]
    async with AsyncMongoClient(mongo_uri, event_listeners=[answers], tz_aware=True) as client:
        collections = Collections(client[config.database])
        await collections.prepare()
        watches = ResultWatch(client[config.database], collections, reading_results(), 1)
        async with aclosing(watches.follow(pb.WatchResultsRequest(resume_token=token))) as items:
            found = [(await anext(items))[0] for _ in range(51)]
    assert [one.job_id for one in found if one] == [f"j{number:02}" for number in range(50)]
    assert 1 < max(answers.changes) <= 4


def reading_results() -> Results:
    """Results that a watch reads; nothing else of them works."""
    return Results(cast(Any, None), cast(Any, None), lambda: datetime.now(UTC))


async def test_watches_that_are_behind_take_turns_and_new_ones_need_none(monkeypatch: pytest.MonkeyPatch) -> None:
    log = Log()
    watches = ResultWatch(
        cast(Any, {"results": log}),
        cast(Any, SimpleNamespace(results=SimpleNamespace(name="results"))),
        reading_results(),
        100,
    )
    token = change_tokens.encode({"_data": "82"})

    async def follow(tenant: str, token: str) -> None:
        async with aclosing(watches.follow(pb.WatchResultsRequest(tenant=tenant, resume_token=token))) as items:
            async for _ in items:
                pass

    many = [asyncio.create_task(follow("many", token)) for _ in range(20)]
    await until(lambda: log.behind == ["many"] * (log_reads.AT_ONCE // 2), "they read the log")
    others = [asyncio.create_task(follow("other", token)), asyncio.create_task(follow("many", ""))]
    await until(lambda: log.behind.count("other") == log.live == 1, "neither waits for them")
    assert log.behind.count("many") == log_reads.AT_ONCE // 2
    log.may_end.set()
    await until(lambda: log.live == 22, "all wait for changes")
    for task in (*many, *others):
        task.cancel()
    await asyncio.wait([*many, *others], timeout=PATIENCE_S)


async def test_many_watches_do_not_starve_other_calls(store: Store) -> None:
    calls = [watch(store) for _ in range(100)]
    for call in calls:
        await call.read()
    await put(store, result("j"))
    for call in calls:
        assert (await call.read()).result.job_id == "j"
    assert (await get(store, "j")).job_id == "j"


async def test_the_documents_keep_to_the_schema(store: Store, config: StoreConfig) -> None:
    async with AsyncMongoClient(config.mongo) as client:
        with pytest.raises(Exception, match="failed validation"):
            await client[config.database].results.insert_one({"_id": "j", "surprise": 1})
