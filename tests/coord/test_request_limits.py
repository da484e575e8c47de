"""Limits of requests at real gateways: two Envoys share the limits of a policy, with coord's server of shares."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import grpc
import pytest
import pytest_asyncio

from mesh.cluster.mirror import Copy
from mesh.process.watched import Watched
from mesh.rpc.access import Access
from mesh.rpc.channel import connect
from mesh.rpc.cluster_access import InForce
from mesh.rpc.server import Server
from mesh.xds import quota
from mesh.xds.ads import AdsServer
from mesh.xds.extensions import gateway_access
from mesh.xds.quota import QuotaServer
from mesh.xds.resource import EXTENSION
from services.coord.share_claims import ShareClaims
from services.coord.traffic import AT_GATEWAY
from shoal.access import tokens
from shoal.access.policy import Policy
from shoal.access.rpc_groups import MODEL_INFER
from tests.access.policies import issuer, key, policy
from tests.breakable import EnvoyProcess, until
from tests.mesh.xds.gateway_snapshots import Source

pytestmark = [pytest.mark.envoy, pytest.mark.asyncio(loop_scope="module")]

ADMITTED = "UNAVAILABLE"
"""There is no instance."""
REFUSED = "RESOURCE_EXHAUSTED"
# No token comes back while a test runs.
SLOW = 0.001
# Envoy admits nothing before it has a share: what it admits is the burst of the share.
STRICT = {"requests_per_second": SLOW, "unrenewed": "deny"}


class Coord:
    """Coord's servers of configuration and shares, at one socket."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self.source = Source()
        self.in_force: Watched[InForce] = Watched(InForce())

    async def start(self) -> None:
        self._stack = AsyncExitStack()
        mirror: Any = type("Mirror", (), {"copy": Copy()})()
        self.claims = await self._stack.enter_async_context(ShareClaims(mirror, self.in_force, "local/coord-0"))
        self.ads = AdsServer(self.source)
        self.quotas = QuotaServer(self.claims, "local/coord-0")
        access = await self._stack.enter_async_context(Access(self.in_force.value.policy))
        methods = {**self.ads.methods(), **self.quotas.methods()}
        server = await self._stack.enter_async_context(
            Server(f"unix:{self.socket}", [], drain_ms=0, methods=methods, access=access)
        )
        await server.serve()

    async def stop(self) -> None:
        await self._stack.aclose()

    def held(self) -> dict[str, dict[str, float]]:
        """Return the shares by bucket (its parts), and claimant."""
        return {
            "/".join(filter(None, (bucket.limit, bucket.tenant, bucket.key))): {
                name: holding.share for name, holding in holdings.items()
            }
            for bucket, holdings in self.claims._shares._holdings.items()
        }


class World:
    """Two gateways and a coord."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.coord = Coord(folder / "coord-0.sock")
        self.signer = tokens.create_signer(folder / "signer.json")
        self.envoys: list[EnvoyProcess] = []
        self.channels: list[grpc.aio.Channel] = []
        self._policies = 0

    async def start(self, stack: AsyncExitStack) -> None:
        self._set(policy(self.signer))
        await self.coord.start()
        stack.push_async_callback(self.coord.stop)
        for number in range(2):
            folder = self.folder / str(number)
            folder.mkdir()
            envoy = stack.enter_context(EnvoyProcess(folder, [self.coord.socket], node=f"node-{number}"))
            self.envoys.append(envoy)
            self.channels.append(await stack.enter_async_context(connect(envoy.gateway)))
        for envoy in self.envoys:
            await envoy.until_ready()

    def _set(self, made: Policy) -> None:
        self._policies += 1
        self.coord.in_force.set(InForce(made, self._policies, self._policies, is_known=True))
        self.coord.source.access.set(gateway_access(made, AT_GATEWAY))

    async def apply(self, *limits: dict[str, Any], **parts: Any) -> Policy:
        """Set the limits, and wait until both Envoys have them."""
        made = policy(self.signer, limits=[*limits], **parts)
        self._set(made)
        wanted = [f'"{limit["name"]}"' for limit in limits if "requests_per_second" in limit]

        async def has_them(envoy: EnvoyProcess) -> bool:
            dump = await envoy.admin_get("/config_dump?resource=ecds_filters")
            routes = await envoy.admin_get("/config_dump?resource=dynamic_route_configs")
            named = [line for line in dump.splitlines() if "string_value" in line]
            enabled = len(self.coord.source.access.value.limit_filters)
            return all(any(name in line for line in named) for name in wanted) and (
                routes.count('"shoal.limits-') == enabled
            )

        for envoy in self.envoys:
            await until(lambda envoy=envoy: has_them(envoy), "Envoy has the limits")
        assert self.nacks() == []
        return made

    def nacks(self) -> list[str]:
        return [t.nack for envoy in self.coord.ads.status() for t in envoy.types if t.type_url == EXTENSION and t.nack]

    async def call(self, at: int = 0, tenant: str = "acme", text: str = "", **options: Any) -> grpc.aio.AioRpcError:
        bearer = (("authorization", f"Bearer {text or key(self.signer, tenant, **options).text}"),)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.channels[at].unary_unary(MODEL_INFER)(b"", metadata=bearer, timeout=30)
        return caught.value

    async def codes(self, number: int, at: int = 0, tenant: str = "acme", **options: Any) -> Counter[str]:
        """Make calls, one after the other, with one key."""
        text = key(self.signer, tenant, **options).text
        return Counter([(await self.call(at, text=text)).code().name for _ in range(number)])

    async def until_refused(self, at: int = 0, tenant: str = "acme") -> None:
        async def is_refused() -> bool:
            return (await self.call(at, tenant)).code().name == REFUSED

        await until(is_refused, "the limit holds")

    async def admitted(self, at: int = 0, **options: Any) -> int:
        """Make calls with one key from its first share on, until three in a row are refused; return those admitted."""
        text = key(self.signer, **options).text
        found = refused = 0
        deadline = asyncio.get_running_loop().time() + 30
        while refused < 3:
            assert asyncio.get_running_loop().time() < deadline
            is_admitted = (await self.call(at, text=text)).code().name == ADMITTED
            found += is_admitted
            refused = 0 if is_admitted else refused + (found > 0)
        return found

    async def until_share(self, bucket: str, *amounts: float) -> None:
        """Wait until coord has handed out these shares of a bucket, and the Envoys have them."""
        await until(
            lambda: sorted(self.coord.held().get(bucket, {}).values()) == sorted(amounts), f"{amounts} of {bucket}"
        )

    async def rest(self, at: int, tenant: str) -> tuple[int, dict[str, str], str]:
        return await self._http(at, tenant, "GET /v2/models/m")

    async def web(self, at: int, tenant: str, kind: str) -> tuple[int, dict[str, str], str]:
        """Call over gRPC-Web, with a message that is empty."""
        empty = {"application/grpc-web+proto": "\0" * 5, "application/grpc-web-text": "AAAAAAA="}[kind]
        return await self._http(at, tenant, f"POST {MODEL_INFER}", f"content-type: {kind}\r\n", empty)

    async def _http(
        self, at: int, tenant: str, request: str, more: str = "", body: str = ""
    ) -> tuple[int, dict[str, str], str]:
        host, _, port = self.envoys[at].gateway.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        bearer = key(self.signer, tenant).text
        writer.write(
            f"{request} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {bearer}\r\n{more}"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n{body}".encode()
        )
        raw = (await asyncio.wait_for(reader.read(), 30)).decode()
        writer.close()
        head, _, body = raw.partition("\r\n\r\n")
        first, *lines = head.split("\r\n")
        return int(first.split()[1]), dict(line.split(": ", 1) for line in lines), body


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world() -> AsyncIterator[World]:
    # Paths of sockets must be short.
    folder = Path(tempfile.mkdtemp(prefix="shoal-"))
    async with AsyncExitStack() as stack:
        made = World(folder)
        await made.start(stack)
        yield made
    shutil.rmtree(folder, ignore_errors=True)


async def test_two_gateways_share_the_limit_of_a_tenant_and_another_tenant_is_unharmed(world: World) -> None:
    await world.apply({"name": "plan", "tenants": ["acme"], "burst_requests": 10, **STRICT})
    for at in (0, 1):
        await world.call(at)
    await world.until_share("plan/acme", SLOW / 2, SLOW / 2)
    # The first gateway had the whole burst for a moment.
    assert 10 <= await world.admitted(0) + await world.admitted(1) <= 15
    for at in (0, 1):
        assert await world.codes(10, at) == Counter({REFUSED: 10})
        assert await world.codes(20, at, "globex") == Counter({ADMITTED: 20})


async def test_a_refusal_says_the_limit_and_when_to_retry(world: World) -> None:
    await world.apply({"name": "said", "requests_per_second": 0.4, "burst_requests": 1})
    await world.until_refused()
    error = await world.call()
    assert error.details() == (
        "limit 'said' of the policy: a tenant has 0.4 requests a second: retry in 2500 ms, "
        "or ask the operator for a higher requests_per_second"
    )
    headers = {key: str(value) for key, value in (error.initial_metadata() or ())}
    headers |= {key: str(value) for key, value in (error.trailing_metadata() or ())}
    expected = {"retry-after-ms": "2500", "x-ratelimit-remaining": "0"}
    expected["x-ratelimit-limit"] = '0.4, 0.4;w=1;name="said/requests"'
    expected |= {"x-ratelimit-reset": "3", "retry-after": "3"}
    assert {name: headers.get(name) for name in expected} == expected
    status, headers, body = await world.rest(0, "acme")
    assert status == 429
    assert {name: headers.get(name) for name in expected} == expected
    assert json.loads(body) == {"error": error.details()}
    # Clients of gRPC-Web take a status of HTTP other than 200 for the call's: 429 is UNAVAILABLE to some.
    for kind in ("application/grpc-web+proto", "application/grpc-web-text"):
        status, headers, body = await world.web(0, "acme", kind)
        assert (status, headers["grpc-status"], unquote(headers["grpc-message"])) == (200, "8", error.details())
        assert {name: headers.get(name) for name in expected} == expected
        assert (headers["content-type"].startswith("application/grpc-web"), body) == (True, "")


async def test_each_key_has_its_own_numbers(world: World) -> None:
    await world.apply({"name": "keys", "per": "key", "burst_requests": 5, **STRICT})
    assert [await world.admitted(), await world.admitted()] == [5, 5]


@pytest.mark.parametrize("is_first", [True, False])
async def test_every_limit_that_applies_holds(world: World, is_first: bool) -> None:
    small = {"name": f"small-{is_first}", "burst_requests": 3, **STRICT}
    large = {"name": f"large-{is_first}", "burst_requests": 1000, "requests_per_second": SLOW}
    await world.apply(*((small, large) if is_first else (large, small)))
    assert await world.admitted() == 3
    await world.until_share(f"large-{is_first}/acme", SLOW)


async def test_tenants_that_grants_name_have_buckets_as_others_have(world: World) -> None:
    grants = [{"name": "roles", "models": ["*"]}, {"name": "named", "tenants": ["acme", "globex"], "models": ["*"]}]
    roles = {"name": "each", "roles": ["user"], "burst_requests": 3}
    await world.apply({**roles, "except_tenants": ["globex"], **STRICT}, grants=grants)
    assert [await world.admitted(tenant=tenant) for tenant in ("acme", "initech")] == [3, 3]
    assert await world.codes(10, tenant="acme") == await world.codes(10, tenant="initech") == Counter({REFUSED: 10})
    assert await world.codes(10, tenant="globex") == Counter({ADMITTED: 10})
    assert {"each/acme", "each/initech"} <= world.coord.held().keys()


async def test_a_limit_of_one_subject_holds_for_no_other(world: World) -> None:
    await world.apply({"name": "ann", "subjects": ["ann"], "burst_requests": 2, **STRICT})
    assert await world.admitted(subject="ann") == 2
    assert await world.codes(10, subject="bob") == Counter({ADMITTED: 10})


async def test_the_caller_cannot_choose_the_bucket(world: World) -> None:
    await world.apply({"name": "own", "requests_per_second": SLOW, "burst_requests": 1})
    await world.until_refused()
    bearer = ("authorization", f"Bearer {key(world.signer, 'acme').text}")
    for name in ("x-shoal-tenant", "X-Shoal-Key", "x-shoal-issuer", "x-shoal-subject", "x_shoal_tenant"):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await world.channels[0].unary_unary(MODEL_INFER)(
                b"", metadata=(bearer, (name.lower(), "globex")), timeout=30
            )
        assert caught.value.code().name == REFUSED, name


async def test_a_limit_that_an_issuer_gives_its_tenant_to_holds(world: World) -> None:
    await world.apply(
        {"name": "fixed", "tenants": ["initech"], "requests_per_second": SLOW, "burst_requests": 1},
        {"name": "rest", "except_tenants": ["initech"], "requests_per_second": 1000},
        issuers=[issuer(world.signer, tenant="initech")],
    )
    await world.until_refused()
    await world.until_share("fixed/initech", SLOW)
    assert "rest/acme" not in world.coord.held()


async def test_a_changed_limit_is_in_force_at_once_and_closes_no_stream(world: World) -> None:
    strict = {"name": "moving", "requests_per_second": SLOW, "burst_requests": 1}
    await world.apply(strict)
    await world.until_refused()
    before = [await envoy.stats("^http.gateway.downstream_cx_(total|destroy)$") for envoy in world.envoys]
    await world.apply({**strict, "requests_per_second": 1e6, "burst_requests": 1000})

    async def passes() -> bool:
        return (await world.call()).code().name == ADMITTED

    await until(passes, "the new limit holds")
    await world.until_share("moving/acme", 1e6)
    assert await world.codes(20) == Counter({ADMITTED: 20})
    await world.apply()
    assert await world.codes(20) == Counter({ADMITTED: 20})
    after = [await envoy.stats("^http.gateway.downstream_cx_(total|destroy)$") for envoy in world.envoys]
    assert after == before


async def test_while_coord_is_dead_the_last_share_holds_and_another_tenant_is_unharmed(world: World) -> None:
    await world.apply({"name": "kept", "tenants": ["acme"], "requests_per_second": SLOW, "burst_requests": 3})
    await world.until_refused()
    await world.coord.stop()
    try:
        assert await world.codes(10) == Counter({REFUSED: 10})
        assert await world.codes(10, tenant="globex") == Counter({ADMITTED: 10})
    finally:
        await world.coord.start()
    # The Envoy reports its buckets again, and its share goes on.
    await world.until_share("kept/acme", SLOW)
    assert await world.codes(10) == Counter({REFUSED: 10})


@pytest.mark.parametrize(("unrenewed", "code"), [("deny", REFUSED), ("open", ADMITTED)])
async def test_a_share_that_nobody_renews_ends_as_the_limit_says(
    world: World, monkeypatch: pytest.MonkeyPatch, unrenewed: str, code: str
) -> None:
    monkeypatch.setattr(quota, "_LIFE_S", 3)
    monkeypatch.setattr(quota, "_RENEWED_S", 1.0)
    burst = {"deny": 1_000_000, "open": 1}[unrenewed]
    limit = {"name": unrenewed, "unrenewed": unrenewed, "requests_per_second": SLOW, "burst_requests": burst}
    await world.apply(limit)

    async def gives(expected: str) -> bool:
        return (await world.call()).code().name == expected

    before = {REFUSED: ADMITTED, ADMITTED: REFUSED}[code]
    await until(lambda: gives(before), "the share holds")
    await world.coord.stop()
    try:
        await until(lambda: gives(code), "the share has ended")
        assert await world.codes(5) == Counter({code: 5})
    finally:
        await world.coord.start()
    await until(lambda: gives(before), "the share holds again")
