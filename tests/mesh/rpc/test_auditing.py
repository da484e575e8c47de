"""Administrative acts are audited before they are done, and their outcome after."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import pytest

from mesh.rpc import audit_log, auditing
from mesh.rpc.access import Access
from mesh.rpc.auditing import Auditing
from mesh.rpc.channel import connect
from mesh.rpc.client.request import trace_metadata
from mesh.rpc.server import Rpc, Server
from shoal.access import tokens
from shoal.access.audit import AUDITED, AUDITED_AFTER, READS, Event
from shoal.access.caller_header import LAUNCHER
from shoal.access.rpc_groups import (
    ADMINISTER,
    APPLY_POLICY,
    CODE,
    CREATE_KEY,
    GROUP_OF,
    MODELS,
    OPERATE,
    ROLL_BACK,
    ROTATE_SIGNER,
    TRY_MODEL,
)
from shoal.access.tokens import Signer
from shoal.coord.v1 import access_pb2 as coord_pb2
from shoal.errors import NotFound, Unavailable
from shoal.inference.v2 import trial_pb2
from shoal.store.v1 import store_pb2 as pb
from shoal.store.v1 import store_pb2_grpc
from tests.access.policies import claims_of, key, passed, policy
from tests.breakable import until

Caller: TypeAlias = Callable[..., list[tuple[str, str]]]
GET_RESULT = "/shoal.store.v1.StoreService/GetResult"
SET_QUOTA = "/shoal.store.v1.StoreService/SetQuota"


class Log:
    def __init__(self) -> None:
        self.events: list[Event] = []
        self.sign_ins: list[Event] = []
        self.is_away = False
        self.open = asyncio.Event()
        self.open.set()

    async def record(self, events: Sequence[Event]) -> Sequence[str]:
        await self.open.wait()
        if self.is_away:
            raise Unavailable("MongoDB does not respond")
        for event in events:
            (self.sign_ins if event.kind == "sign-in" else self.events).append(event)
        return [str(len(self.events))] * len(events)

    async def ended(self) -> Event:
        await until(lambda: any(event.kind == "outcome" for event in self.events), "an outcome is written")
        return self.events[-1]


class Servicer(store_pb2_grpc.StoreServiceServicer):
    def __init__(self) -> None:
        self.quotas: list[str] = []
        self.leaving = asyncio.Event()

    async def SetQuota(self, request: pb.SetQuotaRequest, ctx: Any) -> pb.SetQuotaResponse:
        if request.tenant == "unknown":
            raise NotFound("no such tenant")
        self.quotas.append(request.tenant)
        return pb.SetQuotaResponse()

    async def GetResult(self, request: pb.GetResultRequest, ctx: Any) -> pb.GetResultResponse:
        if request.job_id == "unknown":
            raise NotFound("no such job")
        return pb.GetResultResponse(result=pb.Result(job_id=request.job_id))

    async def StreamResults(
        self, request: pb.StreamResultsRequest, ctx: Any
    ) -> AsyncIterator[pb.StreamResultsResponse]:
        yield pb.StreamResultsResponse(cursor="begin")
        for _ in range(3):
            yield pb.StreamResultsResponse(results=[pb.Result(), pb.Result()])

    async def ListUsage(self, request: pb.ListUsageRequest, ctx: Any) -> pb.ListUsageResponse:
        return pb.ListUsageResponse()

    async def BackUp(self, request: pb.BackUpRequest, ctx: Any) -> AsyncIterator[pb.BackUpResponse]:
        yield pb.BackUpResponse()
        if request.to == "s3://slow":
            self.leaving.set()
            await asyncio.sleep(60)
        yield pb.BackUpResponse()


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    return tokens.create_signer(tmp_path_factory.mktemp("signer") / "signer.json")


@pytest.fixture
def caller(signer: Signer) -> Caller:
    def metadata(role: str = "admin", tenant: str = "acme") -> list[tuple[str, str]]:
        claims = claims_of(key(signer, tenant, role, subject="ann"))
        return [passed(claims), ("x-envoy-external-address", "10.0.0.7")]

    return metadata


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def servicer() -> Servicer:
    return Servicer()


@pytest.fixture
async def stub(log: Log, servicer: Servicer, tmp_path: Path, signer: Signer) -> AsyncIterator[Any]:
    descriptor = pb.DESCRIPTOR.services_by_name["StoreService"]
    add = Rpc(descriptor, lambda server: store_pb2_grpc.add_StoreServiceServicer_to_server(servicer, server))
    access, listen = Access(policy(signer, audit={"reads": ["acme"]})), f"unix:{tmp_path}/s.sock"
    async with (
        access,
        Auditing(log, access, "node/store-0") as audited,
        Server(listen, [add], drain_ms=1_000, access=access, auditing=audited),
        connect(listen) as channel,
    ):
        yield store_pb2_grpc.StoreServiceStub(channel)


async def test_an_act_is_written_before_it_is_done_and_its_outcome_after(
    stub: Any, caller: Caller, log: Log, servicer: Servicer
) -> None:
    log.open.clear()
    call = asyncio.ensure_future(_set(stub, "acme", caller()))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(call), 0.1)
    assert servicer.quotas == []
    log.open.set()
    await call

    outcome = await log.ended()
    act = log.events[0]
    assert (act.kind, act.tenant, act.subject, act.role) == ("act", "acme", "ann", "admin")
    assert act.key.startswith("k-")
    assert (act.rpc, act.target, act.address, act.origin) == (SET_QUOTA, "acme", "10.0.0.7", "node/store-0")
    assert (outcome.of, outcome.code, outcome.subject, outcome.target) == ("1", 0, "ann", "acme")


async def _set(stub: Any, tenant: str, sent: list[tuple[str, str]]) -> None:
    await stub.SetQuota(pb.SetQuotaRequest(tenant=tenant), metadata=sent, timeout=30)


async def test_the_outcome_of_a_failed_act_has_its_error(stub: Any, caller: Caller, log: Log) -> None:
    with pytest.raises(grpc.aio.AioRpcError):
        await _set(stub, "unknown", caller())

    outcome = await log.ended()
    assert (outcome.code, outcome.reason) == (5, "no such tenant")


async def test_an_act_whose_entry_takes_too_long_is_not_done_and_the_error_says_so(
    stub: Any, caller: Caller, log: Log, servicer: Servicer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auditing, "_RECORD_S", 0.05)
    log.open.clear()
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await _set(stub, "acme", caller())

    assert refused.value.details().endswith("nothing was done: no answer in 0.05 s")
    assert servicer.quotas == []


async def test_an_act_that_cannot_be_written_is_not_done(
    stub: Any, caller: Caller, log: Log, servicer: Servicer
) -> None:
    log.is_away = True
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await _set(stub, "acme", caller())

    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
    assert "nothing was done" in refused.value.details()
    assert servicer.quotas == []
    # Reads go on.
    await stub.ListUsage(pb.ListUsageRequest(), metadata=caller(), timeout=30)


async def test_an_act_that_the_log_may_need_first_is_done_and_written_after(
    stub: Any, caller: Caller, log: Log, servicer: Servicer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auditing, "AUDITED_AFTER", {SET_QUOTA})
    log.is_away = True
    await _set(stub, "acme", caller())
    assert servicer.quotas == ["acme"]
    log.is_away = False

    outcome = await log.ended()
    assert (outcome.rpc, outcome.subject, outcome.target, outcome.code) == (SET_QUOTA, "ann", "acme", 0)
    assert (outcome.of, outcome.reason) == ("", "done while the audit log could not be written")
    assert len(log.events) == 1
    assert AUDITED_AFTER <= AUDITED


async def test_a_stream_that_its_caller_leaves_ends_as_cancelled(
    stub: Any, caller: Caller, log: Log, servicer: Servicer
) -> None:
    call = stub.BackUp(pb.BackUpRequest(to="s3://slow"), metadata=caller(), timeout=30)
    await call.read()
    await servicer.leaving.wait()
    call.cancel()

    outcome = await log.ended()
    assert (outcome.code, outcome.target) == (1, "s3://slow")


async def test_a_whole_stream_ends_well(stub: Any, caller: Caller, log: Log) -> None:
    assert len([one async for one in stub.BackUp(pb.BackUpRequest(to="s3://b"), metadata=caller(), timeout=30)]) == 2
    assert (await log.ended()).code == 0


async def test_refused_calls_and_reads_and_calls_of_services_are_no_acts(
    stub: Any, caller: Caller, log: Log, servicer: Servicer
) -> None:
    with pytest.raises(grpc.aio.AioRpcError):
        await _set(stub, "acme", caller("viewer"))
    await stub.ListUsage(pb.ListUsageRequest(), metadata=caller(), timeout=30)
    await _set(stub, "by-a-service", [("x-shoal-caller", "service")])

    assert servicer.quotas == ["by-a-service"]
    assert log.events == []


async def test_reads_of_results_are_counted_by_caller_job_and_rpc_where_the_policy_says_so(
    stub: Any, caller: Caller, log: Log
) -> None:
    for job, sent in (("a", caller("user")), ("b", caller("user")), ("c", caller("user", "globex"))):
        for _ in range(3):
            await stub.GetResult(pb.GetResultRequest(job_id=job), metadata=sent, timeout=30)
    await stub.GetResult(pb.GetResultRequest(job_id="a"), metadata=[("x-shoal-caller", "service")], timeout=30)
    with pytest.raises(grpc.aio.AioRpcError):
        await stub.GetResult(pb.GetResultRequest(job_id="unknown"), metadata=caller("user"), timeout=30)
    assert len([one async for one in stub.StreamResults(pb.StreamResultsRequest(), metadata=caller("user"))]) == 4

    def counts() -> dict[tuple[str, str], int]:
        found: Counter[tuple[str, str]] = Counter()
        for event in log.events:
            found[event.rpc.rpartition("/")[2], event.target] += event.count
        return dict(found)

    await until(lambda: sum(counts().values()) >= 12, "the reads are written")
    assert counts() == {("GetResult", "a"): 3, ("GetResult", "b"): 3, ("StreamResults", ""): 6}
    assert {(event.kind, event.tenant, event.subject, event.address) for event in log.events} == {
        ("read", "acme", "ann", "10.0.0.7")
    }


async def test_a_keys_first_call_from_an_address_is_written_and_no_later_one(
    stub: Any, caller: Caller, log: Log
) -> None:
    ann, elsewhere = caller("user"), [caller("user")[0], ("x-envoy-external-address", "10.0.0.8")]
    for _ in range(3):
        await stub.GetResult(pb.GetResultRequest(job_id="a"), metadata=ann, timeout=30)
    await _set(stub, "by-a-service", [("x-shoal-caller", "service"), ("x-envoy-external-address", "10.0.0.9")])
    with pytest.raises(grpc.aio.AioRpcError):
        await _set(stub, "acme", [caller("viewer")[0], ("x-envoy-external-address", "10.0.0.9")])
    await until(lambda: len(log.sign_ins) == 1, "the first is written")
    await stub.GetResult(pb.GetResultRequest(job_id="a"), metadata=elsewhere, timeout=30)
    await until(lambda: len(log.sign_ins) == 2, "the second is written")
    assert [(one.tenant, one.subject, one.role, one.rpc, one.address, one.origin) for one in log.sign_ins] == [
        ("acme", "ann", "user", GET_RESULT, address, "node/store-0") for address in ("10.0.0.7", "10.0.0.8")
    ]
    assert all(one.key.startswith("k-") for one in log.sign_ins)


async def test_reads_go_on_while_the_log_is_away_and_a_stop_writes_the_last_ones(signer: Signer, log: Log) -> None:
    async def respond(request: pb.GetResultRequest, headers: Any) -> pb.GetResultResponse:
        return pb.GetResultResponse(result=pb.Result())

    log.is_away = True
    access = Access(policy(signer, audit={"reads": ["*"]}))
    headers = {b"x-shoal-caller": passed(claims_of(key(signer, subject="ann")))[1].encode()}
    async with Auditing(log, access, "node/store-0") as audited:
        read = audited.counted(GET_RESULT, respond)
        for number in range(2 * audit_log.MAX_DISTINCT):
            await read(pb.GetResultRequest(job_id=f"job-{number}"), headers)
        log.is_away = False
    assert len(log.events) == audit_log.MAX_DISTINCT + 1
    assert [event.count for event in log.events if event.reason] == [audit_log.MAX_DISTINCT]


async def test_the_launchers_key_is_an_act_whose_outcome_names_the_key(
    signer: Signer, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auditing, "_RECORD_S", 0.2)
    async with Auditing(log, Access(policy(signer)), "node/coord-0") as audited:
        create = audited.wrap(CREATE_KEY, _create_key)
        launcher = _Call([("x-shoal-caller", LAUNCHER.decode())])
        await create(coord_pb2.CreateKeyRequest(tenant="local"), launcher)
        outcome = await log.ended()
        assert [event.kind for event in log.events] == ["act", "outcome"]
        assert (log.events[0].subject, log.events[0].target, outcome.target) == ("launcher", "local", "k-1")
        # A node without a store has no audit log, and its user has a key all the same.
        log.is_away = True
        await create(coord_pb2.CreateKeyRequest(tenant="local"), launcher)
    assert len(log.events) == 2


async def _create_key(request: coord_pb2.CreateKeyRequest, ctx: Any) -> coord_pb2.CreateKeyResponse:
    return coord_pb2.CreateKeyResponse(info=coord_pb2.KeyInfo(id="k-1"))


@pytest.mark.parametrize(
    ("rpc", "request_", "response", "reason", "made"),
    [
        (
            CREATE_KEY,
            coord_pb2.CreateKeyRequest(tenant="acme", role="admin", subject="ann", models=["a*", "b"], grants=["g"]),
            coord_pb2.CreateKeyResponse(info=coord_pb2.KeyInfo(id="k-1")),
            "role admin, tenant acme, subject ann, models a* b, grants g",
            "k-1",
        ),
        (
            APPLY_POLICY,
            coord_pb2.ApplyPolicyRequest(document="x", expected_version=6, force=True),
            coord_pb2.ApplyPolicyResponse(policy=coord_pb2.PolicyVersion(version=7)),
            "forced",
            "version 7",
        ),
        (
            ROLL_BACK,
            coord_pb2.RollBackPolicyRequest(version=5),
            coord_pb2.RollBackPolicyResponse(policy=coord_pb2.PolicyVersion(version=8)),
            "back to version 5",
            "version 8",
        ),
        (
            ROTATE_SIGNER,
            coord_pb2.RotateSignerRequest(stolen=True),
            coord_pb2.RotateSignerResponse(signer="s-2", key="a secret"),
            "stolen: the former keys end",
            "s-2",
        ),
        (
            ROTATE_SIGNER,
            coord_pb2.RotateSignerRequest(),
            coord_pb2.RotateSignerResponse(signer="s-2"),
            "the former keys stay valid",
            "s-2",
        ),
    ],
)
async def test_the_entries_of_an_act_on_keys_or_policy_say_what_it_did(
    signer: Signer, caller: Caller, log: Log, rpc: str, request_: Any, response: Any, reason: str, made: str
) -> None:
    async def behaviour(request: Any, ctx: Any) -> Any:
        return response

    async with Auditing(log, Access(policy(signer)), "node/coord-0") as audited:
        await audited.wrap(rpc, behaviour)(request_, _Call(caller()))
        outcome = await log.ended()
    assert (log.events[0].kind, log.events[0].reason) == ("act", reason)
    assert (outcome.kind, outcome.code, outcome.target, outcome.reason) == ("outcome", 0, made, reason)


async def test_an_act_has_a_trace_id_which_its_calls_of_other_services_have_too(
    signer: Signer, caller: Caller, log: Log
) -> None:
    sent: list[str] = []

    async def behaviour(request: Any, ctx: Any) -> Any:
        sent.append(trace_metadata()["traceparent"])
        return pb.SetQuotaResponse()

    async with Auditing(log, Access(policy(signer)), "node/store-0") as audited:
        for _ in range(2):
            await audited.wrap(SET_QUOTA, behaviour)(pb.SetQuotaRequest(tenant="acme"), _Call(caller()))
    acts = [event.trace_id for event in log.events if event.kind == "act"]
    assert acts == [event.trace_id for event in log.events if event.kind == "outcome"]
    # Not sampled: nobody has asked for spans.
    assert [
        re.fullmatch(f"00-{id_}-[0-9a-f]{{16}}-00", one) is not None for id_, one in zip(acts, sent, strict=True)
    ] == [True] * 2
    assert len(set(acts)) == 2


async def test_an_act_has_the_trace_id_of_its_caller(stub: Any, caller: Caller, log: Log) -> None:
    await _set(stub, "acme", [*caller(), ("traceparent", f"00-{7:032x}-{1:016x}-00")])
    assert {(await log.ended()).trace_id, log.events[0].trace_id} == {f"{7:032x}"}


class _Call:
    """Context of a call with these headers."""

    def __init__(self, headers: list[tuple[str, str]]) -> None:
        self._headers = headers

    def invocation_metadata(self) -> list[tuple[str, str]]:
        return self._headers


async def test_a_trial_of_a_model_is_an_act_on_that_model(signer: Signer, caller: Caller, log: Log) -> None:
    async def behaviour(request: Any, ctx: Any) -> AsyncIterator[Any]:
        yield trial_pb2.TryModelResponse(passed=True)

    async with Auditing(log, Access(policy(signer)), "node/infer-0") as audited:
        try_model = audited.wrap(TRY_MODEL, behaviour)
        for model in (pb.ModelVersion(name="ocr").SerializeToString(), b"\xff"):
            request = trial_pb2.TryModelRequest(model=model)
            assert len([one async for one in try_model(request, _Call(caller("publisher")))]) == 1
    assert [event.target for event in log.events if event.kind == "act"] == ["ocr", ""]


def test_every_rpc_that_administers_is_an_act_or_a_known_read() -> None:
    """A new RPC of these groups is an act, unless its name is added to READS."""
    groups = (MODELS, CODE, OPERATE, ADMINISTER)
    methods = {rpc.rpartition("/")[2] for rpc, group in GROUP_OF.items() if group in groups and "#" not in rpc}
    acts = {rpc.rpartition("/")[2] for rpc in AUDITED}
    assert acts | READS == methods
    assert not acts & READS
    assert not [name for name in acts if name.startswith(("List", "Get", "Watch"))]
    assert not [name for name in READS if name.startswith(("Set", "Remove", "Put")) and name != "PutArtifact"]
