"""Limits of the policy in infer: each way in which a request arrives, each way in which it ends, and bystanders."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from mesh.rpc.access import Access
from mesh.rpc.held_shares import HeldShares
from services.infer.scheduling.crash_guard import ATTEMPT
from services.infer.scheduling.queue import QueueLimits
from services.infer.scheduling.scheduler import Scheduler
from shoal.access import tokens
from shoal.access.caller_header import CALLER_HEADER, JOB_CALLER_HEADER, SERVICE
from shoal.access.limits import Kind
from shoal.access.tokens import Signer
from shoal.errors import ERROR_CODE_PARAMETER, RETRY_AFTER_PARAMETER, Code
from shoal.inference.v2 import bulk_pb2, bulk_pb2_grpc
from tests.access.policies import claims_of, key, passed, policy
from tests.breakable import until
from tests.infer import onnx_files
from tests.infer.conftest import Repository, Serving, floats, request, serving
from tests.infer.test_infer_access import ENSEMBLE
from tests.infer.test_infer_memory import Gate
from tests.mesh.http1.raw import RawClient

X = floats([1, 2, 3, 4])
BYTES = request("open", x=X).ByteSize()
# A third row comes in 17 minutes.
FEW_ROWS = {"name": "few", "tenants": ["acme", "globex"], "rows_per_second": 0.001, "burst_rows": 3}
QUEUED = 6
OK, EXHAUSTED = 0, int(Code.RESOURCE_EXHAUSTED)


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    return tokens.create_signer(tmp_path_factory.mktemp("signer") / "signer.json")


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


class Limited:
    """A server whose policy has limits, and calls of its callers."""

    def __init__(self, served: Serving, access: Access, signer: Signer) -> None:
        self.served = served
        self.access = access
        self.signer = signer
        assert access.shares is not None
        self.shares = access.shares
        # One key for each: `per: key` counts by it.
        self._callers = {tenant: passed(claims_of(key(signer, tenant)))[1] for tenant in ("acme", "globex", "free")}

    def limit(self, *limits: dict[str, Any]) -> None:
        self.access.set_policy(policy(self.signer, limits=[*limits]))

    def by(self, tenant: str) -> tuple[tuple[str, str], ...]:
        return ((CALLER_HEADER, self._callers[tenant]),)

    def for_job_of(self, tenant: str) -> tuple[tuple[str, str], ...]:
        return (CALLER_HEADER, SERVICE.decode()), (JOB_CALLER_HEADER, self._callers[tenant])

    def begin(self, tenant: str, *more: tuple[str, str], timeout: float = 30, **options: Any) -> Any:
        message = request("open", x=X, **options)
        return self.served.stub.ModelInfer(message, metadata=(*self.by(tenant), *more), timeout=timeout)

    async def unary(self, tenant: str, *more: tuple[str, str]) -> int:
        return await code(self.begin(tenant, *more))

    async def slow(self, tenant: str) -> int:
        """A retry of the mesh takes the slow path."""
        return await self.unary(tenant, (ATTEMPT, "2"))

    async def job(self, tenant: str) -> int:
        call = self.served.stub.ModelInfer(request("open", x=X), metadata=self.for_job_of(tenant), timeout=30)
        return await code(call)

    async def stream(self, tenant: str) -> int:
        """Send one message; return its error."""
        call = self.served.stub.ModelStreamInfer(
            iter([request("open", id="1", x=X)]), metadata=self.by(tenant), timeout=30
        )
        (answer,) = [answer async for answer in call]
        parameters = answer.infer_response.parameters
        found = parameters[ERROR_CODE_PARAMETER].int64_param
        assert (RETRY_AFTER_PARAMETER in parameters) == (found == EXHAUSTED)
        return found

    async def bulk(self, tenant: str) -> int:
        """Run one entry for a job; return its error."""
        (answer,) = await self.entries(tenant, 1)
        assert answer.is_limited == (answer.code == EXHAUSTED) == answer.HasField("retry_after_ms")
        return answer.code

    async def entries(self, tenant: str, count: int) -> list[bulk_pb2.InferBulkResponse.Answer]:
        message = request("open", x=X).SerializeToString()
        caller = self._callers[tenant].encode()
        made = [bulk_pb2.InferBulkRequest.Entry(number=n, request=message, caller=caller) for n in range(count)]
        call = bulk_pb2_grpc.BulkInferenceStub(self.served.channel).InferBulk(
            iter([bulk_pb2.InferBulkRequest(entries=made)]), metadata=((CALLER_HEADER, SERVICE.decode()),), timeout=30
        )
        return [answer async for response in call for answer in response.answers]

    async def rest(self, tenant: str) -> int:
        """Make a call over REST, and return its gRPC code."""
        assert self.served.server is not None
        tensor = {"name": "x", "shape": [1, 4], "datatype": "FP32", "parameters": {"binary_data_size": X.nbytes}}
        head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
        headers = [f"Inference-Header-Content-Length: {len(head)}", f"{CALLER_HEADER}: {self._callers[tenant]}"]
        async with await RawClient.connect(self.served.server.address) as client:
            answer = await client.request("POST", "/v2/models/open/infer", head + X.tobytes(), *headers)
        if answer.status == 429:
            assert int(answer.headers["retry-after-ms"]) > 0
            assert answer.headers["x-ratelimit-limit"].endswith('"')
            assert answer.headers["x-ratelimit-remaining"] == "0"
            assert "of the policy" in json.loads(answer.body)["error"]
        return {200: OK, 429: EXHAUSTED}[answer.status]

    async def until_free(self) -> None:
        await until(lambda: self.shares.in_flight == 0, "the end of every call")


async def code(call: Any) -> int:
    found = (await call.code()).value[0]
    if found == EXHAUSTED:
        trailing = dict(await call.trailing_metadata())
        assert int(trailing["retry-after-ms"]) > 0
        assert trailing["x-ratelimit-limit"].endswith('"')
        assert "of the policy: the tenant 'acme' has" in await call.details()
    return found


@pytest.fixture
async def limited(signer: Signer, models_folder: Repository, run_dir: Path) -> AsyncIterator[Limited]:
    models_folder.bare("open", onnx_files.scale(2))
    models_folder.bare("secret", onnx_files.scale(3))
    (models_folder.root / "both" / "1").mkdir(parents=True)
    (models_folder.root / "both" / "config.pbtxt").write_text(ENSEMBLE)
    shares = HeldShares(tuple(Kind), (Kind.IN_FLIGHT, Kind.ROWS), part=1.0)
    access = Access(policy(signer), shares=shares)
    async with serving(models_folder.root, run_dir / "infer.sock", QueueLimits(calls=QUEUED), access=access) as served:
        made = Limited(served, access, signer)
        # The first call of each form takes the slow path, and teaches the fast path.
        assert [await made.unary("free"), await made.rest("free")] == [OK, OK]
        yield made
        await made.until_free()


async def test_rows_beyond_the_limit_are_refused_by_every_way_and_other_tenants_run(limited: Limited) -> None:
    ways: list[Callable[[str], Awaitable[int]]] = [
        limited.unary,
        limited.slow,
        limited.job,
        limited.stream,
        limited.bulk,
        limited.rest,
    ]
    for way in ways:
        # A policy without limits forgets the buckets.
        limited.limit()
        limited.limit(FEW_ROWS)
        assert [await way("acme") for _ in range(5)] == [OK, OK, OK, EXHAUSTED, EXHAUSTED], way.__name__
        assert [await each("acme") for each in ways] == [EXHAUSTED] * len(ways)
        assert [await each("free") for each in ways] == [OK] * len(ways)
        assert await way("globex") == OK


async def test_bytes_beyond_the_limit_are_refused_and_those_of_jobs_were_counted_at_the_submit(
    limited: Limited,
) -> None:
    limited.limit({"name": "few", "tenants": ["acme"], "bytes_per_second": 0.001, "burst_bytes": 2 * BYTES})
    assert [await limited.unary("acme") for _ in range(3)] == [OK, OK, EXHAUSTED]
    assert [await limited.slow("acme"), await limited.stream("acme"), await limited.rest("acme")] == [EXHAUSTED] * 3
    assert [await limited.job("acme"), await limited.bulk("acme"), await limited.unary("free")] == [OK] * 3


async def test_requests_are_counted_where_no_gateway_counts_them(limited: Limited) -> None:
    limited.limit({"name": "few", "tenants": ["acme"], "requests_per_second": 0.001, "burst_requests": 2})
    assert [await limited.unary("acme"), await limited.rest("acme")] == [OK, OK]
    assert [await limited.unary("acme"), await limited.rest("acme"), await limited.stream("acme")] == [EXHAUSTED] * 3
    assert [await limited.job("acme"), await limited.unary("free")] == [OK, OK]


async def test_an_ensemble_counts_once(limited: Limited) -> None:
    limited.limit(FEW_ROWS)
    found = []
    for _ in range(4):
        call = limited.served.stub.ModelInfer(request("both", x=X), metadata=limited.by("acme"), timeout=30)
        found.append(await code(call))
    assert found == [OK, OK, OK, EXHAUSTED]


@pytest.mark.parametrize("path", ["fast", "slow"])
async def test_what_is_in_flight_ends_with_the_call_however_that_ends(limited: Limited, gate: Gate, path: str) -> None:
    more = ((ATTEMPT, "2"),) if path == "slow" else ()
    limited.limit({"name": "two", "tenants": ["acme"], "requests_in_flight": 2})
    gate.is_closed = True
    first, second = limited.begin("acme", *more), limited.begin("acme", *more)
    await until(lambda: limited.shares.in_flight == 2, "the arrival of both")
    assert [await limited.unary("acme"), await limited.rest("acme"), await limited.stream("acme")] == [EXHAUSTED] * 3
    # The client resets the stream of one call, and another takes its place, which expires in the queue.
    first.cancel()
    await until(lambda: limited.shares.in_flight == 1, "the end of a reset call")
    assert await code(limited.begin("acme", *more, timeout=0.3)) == int(Code.DEADLINE_EXCEEDED)
    await until(lambda: limited.shares.in_flight == 1, "the end of an expired call")
    gate.open()
    assert await code(second) == OK
    await limited.until_free()
    assert [await limited.unary("acme") for _ in range(3)] == [OK] * 3


async def test_messages_of_a_stream_and_entries_of_a_bulk_are_in_flight_one_by_one(
    limited: Limited, gate: Gate
) -> None:
    limited.limit({"name": "two", "tenants": ["acme"], "requests_in_flight": 2})
    gate.is_closed = True
    messages = iter([request("open", id=str(n), x=X) for n in range(5)])
    stream = limited.served.stub.ModelStreamInfer(messages, metadata=limited.by("acme"), timeout=30)
    reading = asyncio.ensure_future(collected(stream))
    await until(lambda: limited.shares.in_flight == 2, "the arrival of two messages")
    assert [answer.code for answer in await limited.entries("acme", 3)] == [EXHAUSTED] * 3
    gate.open()
    found = [answer.infer_response.parameters[ERROR_CODE_PARAMETER].int64_param for answer in await reading]
    assert found == [OK, OK, EXHAUSTED, EXHAUSTED, EXHAUSTED]
    gate.is_closed = True
    running = asyncio.ensure_future(limited.entries("acme", 5))
    await until(lambda: limited.shares.in_flight == 2, "the arrival of two entries")
    gate.open()
    assert sorted(answer.code for answer in await running) == [OK, OK, EXHAUSTED, EXHAUSTED, EXHAUSTED]
    # Lost with its stream.
    gate.is_closed = True
    lost = limited.served.stub.ModelStreamInfer(iter([request("open", x=X)]), metadata=limited.by("acme"), timeout=30)
    losing = asyncio.ensure_future(collected(lost))
    await until(lambda: limited.shares.in_flight == 1, "the arrival of a message")
    lost.cancel()
    await limited.until_free()
    gate.open()
    with pytest.raises(asyncio.CancelledError):
        await losing


async def test_rows_that_the_server_sheds_are_given_back(limited: Limited, gate: Gate) -> None:
    limited.limit({"name": "few", "tenants": ["acme"], "rows_per_second": 0.001, "burst_rows": QUEUED + 2})
    gate.is_closed = True
    queued = [limited.begin("acme") for _ in range(QUEUED)]
    await until(lambda: queued_in(limited) == QUEUED, "a full queue")
    for _ in range(5):
        call = limited.begin("acme")
        assert await call.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "policy" not in await call.details()
    gate.open()
    assert [await code(call) for call in queued] == [OK] * QUEUED
    assert [await limited.unary("acme") for _ in range(3)] == [OK, OK, EXHAUSTED]


def queued_in(limited: Limited) -> int:
    scheduler = limited.served.models.find("open", "").scheduler
    assert isinstance(scheduler, Scheduler)
    return len(scheduler._queue)


async def collected(stream: Any) -> list[Any]:
    return [answer async for answer in stream]
