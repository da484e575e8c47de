"""A real Envoy with a policy over ADS: closed without one, changed on open connections, and a part that it refuses."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from mesh.cluster.membership import Instance, State
from mesh.rpc.channel import connect
from mesh.rpc.server import Server
from mesh.xds import access
from mesh.xds.ads import AdsServer
from mesh.xds.extensions import GatewayAccess, _packed, gateway_access
from mesh.xds.resource import EXTENSION
from services.coord.traffic import AT_GATEWAY
from shoal.access import tokens
from shoal.access.cluster import issuer_name
from shoal.access.rpc_groups import GROUP_OF, INTERNAL, MODEL_INFER
from shoal.access.tokens import Signer
from tests.access.policies import issuer, key, policy, signed
from tests.breakable import EnvoyProcess, until
from tests.mesh.xds.gateway_snapshots import Source

pytestmark = [pytest.mark.envoy, pytest.mark.asyncio(loop_scope="module")]


class Gateway:
    """An Envoy, its ADS server, and a connection to its gateway."""

    def __init__(self, folder: Path, instances: tuple[Instance, ...] = ()) -> None:
        self.folder = folder
        self.source = Source(instances)
        self.ads = AdsServer(self.source)
        self.signer = tokens.create_signer(folder / "signer.json")

    async def start(self, stack: AsyncExitStack) -> None:
        coord = self.folder / "coord-0.sock"
        server = Server(f"unix:{coord}", [], drain_ms=0, methods=self.ads.methods())
        await (await stack.enter_async_context(server)).serve()
        self.envoy = stack.enter_context(EnvoyProcess(self.folder, [coord]))
        await self.envoy.until_ready()
        self.channel = await stack.enter_async_context(connect(self.envoy.gateway))
        self.outbound = await stack.enter_async_context(connect(f"unix:{self.envoy.outbound}"))

    async def code(self, signer: Signer | None, rpc: str = MODEL_INFER, *, role: str = "user", jti: str = "") -> str:
        return await self.answer(*([] if signer is None else [f"Bearer {key(signer, role=role).text}"]), rpc=rpc)

    async def answer(self, *authorizations: str, rpc: str = MODEL_INFER) -> str:
        metadata = [("authorization", value) for value in authorizations]
        try:
            await self.channel.unary_unary(rpc)(b"", metadata=metadata, timeout=30)
        except grpc.aio.AioRpcError as err:
            return err.code().name
        return "OK"

    def nack(self) -> str:
        (envoy,) = self.ads.status()
        return next((status.nack for status in envoy.types if status.type_url == EXTENSION), "")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway() -> AsyncIterator[Gateway]:
    # Paths of sockets must be short.
    folder = Path(tempfile.mkdtemp(prefix="shoal-"))
    async with AsyncExitStack() as stack:
        made = Gateway(folder)
        await made.start(stack)
        yield made
    shutil.rmtree(folder, ignore_errors=True)


async def test_without_a_known_policy_the_gateway_refuses_every_call(gateway: Gateway) -> None:
    gateway.source.access.set(gateway_access(None, AT_GATEWAY))
    await until(lambda: _is(gateway, None, "PERMISSION_DENIED"), "the gateway is closed")
    for rpc in ("/grpc.health.v1.Health/Check", "/shoal.coord.v1.CoordService/GetLeader"):
        assert await gateway.code(gateway.signer, rpc) == "PERMISSION_DENIED"


async def test_a_policy_is_in_force_on_the_connection_that_is_open(gateway: Gateway) -> None:
    gateway.source.access.set(gateway_access(policy(gateway.signer), AT_GATEWAY))
    await until(lambda: _is(gateway, gateway.signer, "UNAVAILABLE"), "the key is admitted")
    assert await gateway.code(None) == "UNAUTHENTICATED"
    assert await gateway.code(gateway.signer, role="viewer") == "PERMISSION_DENIED"
    assert await gateway.code(gateway.signer, "/shoal.coord.v1.AccessService/ListKeys") == "PERMISSION_DENIED"
    assert await gateway.code(gateway.signer, "/shoal.coord.v1.AccessService/ListKeys", role="admin") == "UNAVAILABLE"
    gateway.source.access.set(gateway_access(policy(gateway.signer, grants=[]), AT_GATEWAY))
    await until(lambda: _is(gateway, gateway.signer, "PERMISSION_DENIED"), "the grant is taken away")


async def test_methods_of_services_have_a_route_for_services_only(gateway: Gateway) -> None:
    everything = [{"name": "all", "allow": ["*"], "models": ["*"]}]
    gateway.source.access.set(gateway_access(policy(gateway.signer, grants=everything), AT_GATEWAY))
    await until(lambda: _is(gateway, gateway.signer, "UNAVAILABLE"), "the key is admitted")
    for rpc in (rpc for rpc, group in GROUP_OF.items() if group == INTERNAL):
        assert await gateway.code(gateway.signer, rpc, role="admin") == "PERMISSION_DENIED", rpc
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await gateway.outbound.unary_unary("/shoal.store.v1.StoreService/PutResults")(b"", timeout=30)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_part_that_envoy_refuses_keeps_the_former_one_and_is_shown(gateway: Gateway) -> None:
    good = gateway_access(policy(gateway.signer), AT_GATEWAY)
    gateway.source.access.set(good)
    await until(lambda: _is(gateway, gateway.signer, "UNAVAILABLE"), "the key is admitted")
    tree = access.rules(policy(gateway.signer), [])["matcher"]["on_no_match"]["matcher"]["matcher_tree"]
    empty = {"matcher_tree": {**tree}}
    empty["matcher_tree"]["exact_match_map"] = {"map": {}}
    wrong = _packed(access.RULES, {"@type": access.RBAC, "matcher": empty})
    other = gateway_access(policy(gateway.signer, open=["health"]), AT_GATEWAY)
    gateway.source.access.set(GatewayAccess((other.extensions[0], wrong)))
    await until(lambda: "at least" in gateway.nack(), "Envoy has refused the part")
    assert await gateway.code(gateway.signer) == "UNAVAILABLE"
    assert await gateway.code(gateway.signer, role="viewer") == "PERMISSION_DENIED"
    gateway.source.access.set(good)
    await until(lambda: gateway.nack() == "", "Envoy has the good part")
    assert await gateway.code(gateway.signer) == "UNAVAILABLE"


async def test_fields_of_a_key_that_envoy_cannot_read_harm_no_other_issuer(gateway: Gateway) -> None:
    deep: list[object] = []
    for _ in range(150):
        deep = [deep]
    foreign = {**issuer(gateway.signer), "issuer": "https://idp.example", "token_prefix": ""}
    foreign["jwks"] = {"keys": [{**gateway.signer.public_jwk(), "deep": deep, "long": 10**400}]}
    made = policy(gateway.signer, issuers=[issuer(gateway.signer), foreign], open=["health"])
    gateway.source.access.set(gateway_access(made, AT_GATEWAY))
    await until(lambda: _is(gateway, None, "UNAVAILABLE", "/grpc.health.v1.Health/Check"), "the policy is in force")
    assert gateway.nack() == ""
    assert await gateway.code(gateway.signer) == "UNAVAILABLE"


@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
async def test_keys_of_a_cluster_are_verified_and_must_name_their_signer(gateway: Gateway, scheme: str) -> None:
    signer = replace(gateway.signer, issuer=issuer_name("shoal", gateway.signer.kid))
    gateway.source.access.set(gateway_access(policy(signer, revoked=["k-gone"]), AT_GATEWAY))
    await until(lambda: _is(gateway, signer, "UNAVAILABLE"), "the key is admitted")
    now = int(time.time())
    assert await gateway.answer(f"{scheme} {key(signer).text}") == "UNAVAILABLE"
    assert await gateway.answer(f"{scheme} {signed(signer, jti='k-gone')}") == "PERMISSION_DENIED"
    assert await gateway.answer(f"{scheme} {signed(signer, aud='other')}") == "PERMISSION_DENIED"
    assert await gateway.answer(f"{scheme} {signed(signer, exp=now - 600)}") == "UNAUTHENTICATED"
    assert await gateway.answer(f"{scheme} {signed(signer, exp=None)}") == "UNAUTHENTICATED"
    assert await gateway.answer(f"{scheme} {signed(signer, iss='shoal:k-00000000')}") == "UNAUTHENTICATED"
    assert await gateway.answer(f"{scheme} {key(signer).text[:-8]}AAAAAAAA") == "UNAUTHENTICATED"
    # Signed by the right key, but without its id, or with another one.
    assert await gateway.answer(f"{scheme} {signed(signer, kid=None)}") == "PERMISSION_DENIED"
    assert await gateway.answer(f"{scheme} {signed(signer, kid='k-00000000')}") == "UNAUTHENTICATED"
    # The second of two tokens has no id.
    both = [f"{scheme} {key(signer).text}", f"{scheme} {signed(signer, kid=None, role=None, jti=None)}"]
    assert await gateway.answer(*both) in ("PERMISSION_DENIED", "UNAUTHENTICATED")


async def test_a_key_of_the_cluster_is_not_called_broken_under_a_policy_without_such_keys(gateway: Gateway) -> None:
    foreign = {**issuer(gateway.signer), "issuer": "https://idp.example", "token_prefix": ""}
    gateway.source.access.set(gateway_access(policy(gateway.signer, issuers=[foreign]), AT_GATEWAY))
    metadata = [("authorization", f"Bearer {key(gateway.signer).text}")]

    async def refusal() -> str:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await gateway.channel.unary_unary(MODEL_INFER)(b"", metadata=metadata, timeout=30)
        return str(caught.value.details())

    async def is_in_force() -> bool:
        return (await refusal()).startswith("Jwt header")

    await until(is_in_force, "the policy is in force")
    assert "no issuer of the policy in force has 'token_prefix: shoal_'" in await refusal()


async def test_services_tell_callers_of_issuers_with_fixed_tenants_apart_by_a_header() -> None:
    seen: list[str] = []

    async def answer(request: bytes, context: Any) -> bytes:
        seen.append(dict(context.invocation_metadata())["x-shoal-tenant"])
        return b""

    folder = Path(tempfile.mkdtemp(prefix="shoal-"))
    address = f"unix:{folder}/infer-0.sock"
    async with AsyncExitStack() as stack:
        methods = {MODEL_INFER: grpc.unary_unary_rpc_method_handler(answer, bytes, bytes)}
        await (await stack.enter_async_context(Server(address, [], drain_ms=0, methods=methods))).serve()
        gateway = Gateway(folder, (Instance("infer", "local", "infer-0", address, 1, State.READY, 1.0),))
        await gateway.start(stack)
        names = ("idp-a", "idp-b")
        signers = [replace(tokens.create_signer(folder / f"{name}.json"), issuer=name) for name in names]
        fixed = [issuer(one, tenant=tenant) for one, tenant in zip(signers, ("acme", "globex"), strict=True)]
        made = policy(gateway.signer, issuers=[issuer(gateway.signer), *fixed])
        gateway.source.access.set(gateway_access(made, AT_GATEWAY))
        await until(lambda: _is(gateway, signers[1], "OK"), "the policy is in force")
        seen.clear()
        for signer in (*signers, gateway.signer):
            assert await gateway.code(signer) == "OK"
    shutil.rmtree(folder, ignore_errors=True)
    assert seen == [*names, "acme"]


async def test_ten_thousand_revoked_keys_are_in_force_soon(gateway: Gateway) -> None:
    revoked = [f"k-{number:016x}" for number in range(10_000)]
    gateway.source.access.set(gateway_access(policy(gateway.signer, revoked=revoked, open=["health"]), AT_GATEWAY))
    await until(lambda: _is(gateway, None, "UNAVAILABLE", "/grpc.health.v1.Health/Check"), "the list is in force")
    assert gateway.nack() == ""
    assert await gateway.code(gateway.signer) == "UNAVAILABLE"


async def _is(gateway: Gateway, signer: Signer | None, code: str, rpc: str = MODEL_INFER) -> bool:
    return await gateway.code(signer, rpc) == code
