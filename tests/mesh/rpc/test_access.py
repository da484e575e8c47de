"""Access to a server: decisions by the caller that the gateway passes, and the end of open calls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mesh.rpc.access import ADDRESS, CALLER, Access
from mesh.rpc.channel import connect
from mesh.rpc.server import Server
from shoal.access import tokens
from shoal.access.caller_header import CALLER_HEADER, LAUNCHER, SERVICE, SIGNER_HEADER
from shoal.access.cluster import issuer_name
from shoal.access.decision import MODEL_NAME
from shoal.access.rpc_groups import INDEX, LOAD, MODEL_INFER
from shoal.access.tokens import Signer
from shoal.errors import PermissionDenied, ShoalError, Unauthenticated, Unavailable
from tests.access.policies import claims_of, issuer, key, passed, policy
from tests.breakable import until

CHECK = "/grpc.health.v1.Health/Check"


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    return tokens.create_signer(tmp_path_factory.mktemp("signer") / "signer.json")


def caller(signer: Signer, **options: object) -> bytes:
    return passed(claims_of(key(signer, **options)))[1].encode()


def test_a_caller_is_who_the_gateway_says(signer: Signer) -> None:
    access = Access(policy(signer))
    ann = access.check(MODEL_INFER, caller(signer, subject="ann"), "m")
    assert ann is not None
    assert (ann.tenant, ann.subject) == ("acme", "ann")
    with pytest.raises(PermissionDenied, match="no grant allows infer of the model 'm' to the role 'viewer'"):
        access.check_infer({CALLER: caller(signer, role="viewer")}, "m")


@pytest.mark.parametrize("value", [b"", b"x", b"e30", b"W10", b"eyJh", b"!" * 50, b"[" * 100_000, b"\xff"])
def test_a_value_that_no_gateway_sends_is_refused(signer: Signer, value: bytes) -> None:
    with pytest.raises(ShoalError):
        Access(policy(signer)).check_infer({CALLER: value}, "m")


def test_the_first_call_from_an_address_is_a_sign_in_whatever_happens_to_the_policy(signer: Signer) -> None:
    seen: list[tuple[str, str, bytes]] = []
    access = Access(policy(signer))
    access.on_sign_in = lambda rpc, caller, address: seen.append((rpc, caller.subject, address))
    ann, bob, viewer = caller(signer, subject="ann"), caller(signer, subject="bob"), caller(signer, role="viewer")
    for _ in range(2):
        for value, address in ((ann, b"10.0.0.1"), (bob, b"10.0.0.1"), (ann, b"10.0.0.2")):
            access.check_infer({CALLER: value, ADDRESS: address}, "m")
            access.check_call(INDEX, {CALLER: value, ADDRESS: address})
        # Neither calls that are refused, nor those of services or without a gateway.
        with pytest.raises(PermissionDenied):
            access.check_infer({CALLER: viewer, ADDRESS: b"10.0.0.1"}, "m")
        access.check_infer({CALLER: SERVICE, ADDRESS: b"10.0.0.3"}, "m")
        access.check_infer({CALLER: ann}, "m")
        access.set_policy(policy(signer))
    assert seen == [
        (MODEL_INFER, "ann", b"10.0.0.1"),
        (MODEL_INFER, "bob", b"10.0.0.1"),
        (MODEL_INFER, "ann", b"10.0.0.2"),
    ]


def test_the_addresses_of_a_caller_are_told_apart_up_to_a_bound(signer: Signer) -> None:
    seen: list[tuple[str, bytes]] = []
    access = Access(policy(signer))
    access.on_sign_in = lambda rpc, caller, address: seen.append((caller.subject, address))
    ann, bob = caller(signer, subject="ann"), caller(signer, subject="bob")
    for number in range(1_000):
        access.check_infer({CALLER: ann, ADDRESS: b"10.0.%d.%d" % divmod(number, 256)}, "m")
    assert len(seen) == 33
    assert seen[-1] == ("ann", b"")
    access.check_infer({CALLER: bob, ADDRESS: b"10.0.0.1"}, "m")
    assert seen[-1] == ("bob", b"10.0.0.1")


def test_the_callers_whose_addresses_are_remembered_are_bounded(signer: Signer) -> None:
    seen: list[str] = []
    access = Access(policy(signer))
    access.on_sign_in = lambda rpc, caller, address: seen.append(caller.key)
    claims = claims_of(key(signer))
    for number in (*range(9_000), 8_999):
        value = passed({**claims, "jti": f"k-{number}"})[1].encode()
        access.check_infer({CALLER: value, ADDRESS: b"10.0.0.1"}, "m")
    assert len(seen) == 9_000
    assert len(access._addresses) <= 8_192


def test_a_call_without_a_caller_may_check_the_health_and_nothing_else(signer: Signer) -> None:
    access = Access(policy(signer))
    assert access.check(CHECK, None) is None
    for rpc in (MODEL_INFER, INDEX, LOAD, "/inference.GRPCInferenceService/ServerLive"):
        with pytest.raises(Unauthenticated):
            access.check(rpc, None)


def test_a_service_of_the_mesh_may_call_everything(signer: Signer) -> None:
    for access in (Access(policy(signer)), Access(None)):
        for rpc in (MODEL_INFER, LOAD, "/shoal.store.v1.StoreService/PutResults"):
            assert access.check(rpc, SERVICE, "m") is None
        assert access.check_infer({CALLER: SERVICE}, "m") is None


def test_without_a_known_policy_every_caller_is_refused(signer: Signer) -> None:
    access = Access(None)
    assert access.check(CHECK, None) is None
    for header in (None, caller(signer, role="admin")):
        with pytest.raises(Unavailable, match="does not know the policy yet"):
            access.check_infer({CALLER: header}, "m")
    access.set_policy(policy(signer))
    assert access.check_infer({CALLER: caller(signer)}, "m") is not None


def test_the_launcher_may_list_the_models_and_nothing_else(signer: Signer) -> None:
    access = Access(policy(signer))
    assert access.check(INDEX, LAUNCHER) is None
    assert access.allows(INDEX, LAUNCHER, "m")
    for rpc in (MODEL_INFER, LOAD):
        with pytest.raises(Unauthenticated):
            access.check(rpc, LAUNCHER, "m")


def test_a_new_policy_replaces_cached_decisions(signer: Signer) -> None:
    access, ann = Access(policy(signer)), caller(signer)
    access.check_infer({CALLER: ann}, "m")
    access.set_policy(policy(signer, grants=[]))
    with pytest.raises(PermissionDenied):
        access.check_infer({CALLER: ann}, "m")
    access.set_policy(policy(signer))
    access.check_infer({CALLER: ann}, "m")


def test_many_callers_and_models_fill_no_memory(signer: Signer) -> None:
    access = Access(policy(signer))
    ann = caller(signer)
    for number in range(3_000):
        access.check_infer({CALLER: ann}, f"m{number}")
    (known,) = access._callers.values()
    assert len(known.inferable) <= 1024
    claims = claims_of(key(signer))
    for number in range(9_000):
        access.check_infer({CALLER: passed({**claims, "jti": f"k-{number}"})[1].encode()}, "m")
    assert len(access._callers) <= 8192


def test_many_callers_with_many_models_each_fill_no_memory(signer: Signer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller that its issuer gives many tokens is many callers: their decisions were gigabytes."""
    monkeypatch.setattr("mesh.rpc.access._TOGETHER", 1_000)
    access, claims = Access(policy(signer)), claims_of(key(signer))
    tokens = [passed({**claims, "jti": f"k-{number}"})[1].encode() for number in range(20)]
    for number in range(200):
        for token in tokens:
            access.check_infer({CALLER: token}, f"m{number}")
        assert sum(len(known._decisions) for known in access._callers.values()) <= 1_000


def test_long_names_of_models_are_refused_in_short_words_and_not_kept(signer: Signer) -> None:
    access, ann = Access(policy(signer)), caller(signer)
    for number in range(64):
        with pytest.raises(PermissionDenied, match="no model has a name of 1000002 characters") as refused:
            access.check_infer({CALLER: ann}, f"{number:02}" + "m" * 1_000_000)
        assert len(refused.value.message) < 200
    access.check_infer({CALLER: ann}, "m" * MODEL_NAME)
    (known,) = access._callers.values()
    assert sum(len(model or "") for _, model in known._decisions) <= 2 * MODEL_NAME


@pytest.fixture
async def watched(signer: Signer, tmp_path: Path) -> AsyncIterator[tuple[Access, Clock, grpc.aio.Channel]]:
    clock = Clock()
    socket = f"unix:{tmp_path}/s"
    async with Access(policy(signer), clock) as access, Server(socket, [], drain_ms=1000, access=access) as server:
        await server.serve()
        async with connect(socket) as channel:
            yield access, clock, channel


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


async def opened(channel: grpc.aio.Channel, caller: bytes, signer: str = "") -> object:
    """Return a call that has had its first response and stays open."""
    stub = health_pb2_grpc.HealthStub(channel)
    metadata = [(CALLER_HEADER, caller.decode()), *([(SIGNER_HEADER, signer)] if signer else [])]
    call = stub.Watch(health_pb2.HealthCheckRequest(), metadata=metadata, timeout=60)
    await call.read()
    return call


async def outcome(call: object) -> tuple[grpc.StatusCode, str]:
    async with asyncio.timeout(30):
        return await call.code(), await call.details()


async def test_an_open_call_ends_when_its_key_is_revoked_and_others_go_on(
    signer: Signer, watched: tuple[Access, Clock, grpc.aio.Channel]
) -> None:
    access, _, channel = watched
    ann, bob = key(signer), key(signer)
    first = await opened(channel, passed(claims_of(ann))[1].encode())
    second = await opened(channel, passed(claims_of(bob))[1].encode())
    access.set_policy(policy(signer, revoked=[ann.id]))
    assert await outcome(first) == (grpc.StatusCode.PERMISSION_DENIED, f"not allowed: the key {ann.id} is revoked")
    assert not second.done()
    second.cancel()
    await until(lambda: not access._open, "the end of all calls")


async def test_an_open_call_ends_when_the_key_of_its_signer_is_removed_and_others_go_on(
    signer: Signer, watched: tuple[Access, Clock, grpc.aio.Channel], tmp_path: Path
) -> None:
    access, _, channel = watched
    stolen = tokens.create_signer(tmp_path / "stolen.json")
    both = {"keys": [signer.public_jwk(), stolen.public_jwk()]}
    access.set_policy(policy(signer, issuers=[issuer(signer, jwks=both)]))
    first = await opened(channel, caller(stolen), stolen.kid)
    second = await opened(channel, caller(signer), signer.kid)
    third = await opened(channel, caller(signer))
    access.set_policy(policy(signer))
    assert await outcome(first) == (
        grpc.StatusCode.UNAUTHENTICATED,
        "the key that signed the token is no longer in the policy: use another token",
    )
    assert not second.done()
    assert not third.done()
    # A gateway that has the former keys for a moment longer.
    late = await opened(channel, caller(stolen), stolen.kid)
    assert (await outcome(late))[0] is grpc.StatusCode.UNAUTHENTICATED
    second.cancel()
    third.cancel()
    await until(lambda: not access._open, "the end of all calls")


async def test_an_open_call_of_an_issuer_with_its_signer_in_its_name_ends_with_that_signer(
    signer: Signer, watched: tuple[Access, Clock, grpc.aio.Channel], tmp_path: Path
) -> None:
    access, _, channel = watched
    named = replace(signer, issuer=issuer_name("shoal", signer.kid))
    access.set_policy(policy(named))
    # Its gateway does not pass the signer's id.
    call = await opened(channel, caller(named))
    other = tokens.create_signer(tmp_path / "other.json")
    both = {"keys": [signer.public_jwk(), other.public_jwk()]}
    access.set_policy(policy(named, issuers=[issuer(named, jwks=both)]))
    assert not call.done()
    access.set_policy(policy(named, issuers=[issuer(named, jwks=other.jwks())]))
    assert (await outcome(call))[0] is grpc.StatusCode.UNAUTHENTICATED
    await until(lambda: not access._open, "the end of all calls")


async def test_an_open_call_ends_when_its_token_expires(
    signer: Signer, watched: tuple[Access, Clock, grpc.aio.Channel]
) -> None:
    _, clock, channel = watched
    short = key(signer, life_s=60)
    call = await opened(channel, passed(claims_of(short))[1].encode())
    clock.now = short.expires_at + 31
    assert await outcome(call) == (grpc.StatusCode.UNAUTHENTICATED, "the token has expired")


async def test_a_call_that_the_policy_does_not_allow_does_not_begin(
    signer: Signer, watched: tuple[Access, Clock, grpc.aio.Channel]
) -> None:
    access, _, channel = watched
    access.set_policy(policy(signer, grants=[]))
    stub = health_pb2_grpc.HealthStub(channel)
    call = stub.Check(health_pb2.HealthCheckRequest(), metadata=((CALLER_HEADER, caller(signer).decode()),))
    assert (await outcome(call))[0] is grpc.StatusCode.PERMISSION_DENIED
    assert (await stub.Check(health_pb2.HealthCheckRequest(), timeout=30)).status == 1
