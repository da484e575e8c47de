"""A real Envoy starts from the bootstrap, gets the rest over ADS, and fails over to another coord."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from mesh.xds.messages import DeltaDiscoveryRequest, DeltaDiscoveryResponse, Listener, Packed
from mesh.xds.messages import Sent as Resource
from shoal.errors import InvalidArgument
from shoal.node import processes
from shoal.node.envoy_bootstrap import bootstrap
from shoal.node.envoy_overload import heap_bytes
from shoal.node.ports import Ports
from shoal.node.probes import http_ok
from shoal.node.processes import envoy_threads
from tests.breakable import Process, until

LISTENER = "type.googleapis.com/envoy.config.listener.v3.Listener"
TYPES = "type.googleapis.com/envoy.extensions.filters"


def test_the_bootstrap_has_the_node_and_the_coord_cluster_only() -> None:
    document = json.loads(
        bootstrap(
            node="n", gateway="127.0.0.1:80", outbound="/r/o.sock", admin="/r/admin.sock", coords=["/r/a", "/r/b"]
        )
    )
    assert document["node"] == {
        "id": "n",
        "cluster": "shoal",
        "metadata": {"shoal": {"gateway": "127.0.0.1:80", "outbound": "/r/o.sock"}},
    }
    assert document["admin"]["address"] == {"pipe": {"path": "/r/admin.sock", "mode": 0o600}}
    (cluster,) = document["static_resources"]["clusters"]
    assert "listeners" not in document["static_resources"]
    endpoints = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
    assert [one["endpoint"]["address"]["pipe"]["path"] for one in endpoints] == ["/r/a", "/r/b"]


def test_envoy_has_a_ceiling_of_memory_and_of_connections() -> None:
    document = json.loads(
        bootstrap(node="n", gateway="127.0.0.1:80", outbound="/o", admin="/r/admin.sock", coords=["/a"], heap=200 << 20)
    )
    manager = document["overload_manager"]
    assert manager["resource_monitors"][0]["typed_config"]["max_heap_size_bytes"] == 200 << 20
    limits = document["layered_runtime"]["layers"][0]["static_layer"]
    for listener in ("gateway", "outbound"):
        assert limits[f"envoy.resource_limits.listener.{listener}.connection_limit"] == 1024


@pytest.mark.parametrize("wrong", ["many", "-1", "127", "1e3"])
def test_a_wrong_ceiling_of_memory_is_named(wrong: str) -> None:
    assert heap_bytes({}) == 448 << 20
    assert heap_bytes({"SHOAL_ENVOY_HEAP_MB": "128"}) == 128 << 20
    with pytest.raises(InvalidArgument, match="SHOAL_ENVOY_HEAP_MB"):
        heap_bytes({"SHOAL_ENVOY_HEAP_MB": wrong})


@pytest.mark.parametrize("wrong", ["many", "0", "65", "-1", "4.0", "\u0664", "9" * 5_000])
def test_a_wrong_number_of_threads_is_named(wrong: str) -> None:
    assert envoy_threads({}) == envoy_threads({"SHOAL_ENVOY_THREADS": ""}) == 4
    assert envoy_threads({"SHOAL_ENVOY_THREADS": "64"}) == 64
    with pytest.raises(InvalidArgument, match="SHOAL_ENVOY_THREADS"):
        envoy_threads({"SHOAL_ENVOY_THREADS": wrong})


class Coord:
    """The least that is a control plane: one listener that answers 200, no cluster."""

    def __init__(self, path: Path, port: int) -> None:
        self.path, self.port = path, port
        self.nodes: list[str] = []
        """The node of each stream that was opened."""

    async def __aenter__(self) -> Coord:
        self._server = grpc.aio.server()
        method = grpc.stream_stream_rpc_method_handler(self._stream, DeltaDiscoveryRequest.parse, bytes)
        name = "envoy.service.discovery.v3.AggregatedDiscoveryService"
        handler = grpc.method_handlers_generic_handler(name, {"DeltaAggregatedResources": method})
        self._server.add_generic_rpc_handlers([handler])
        self._server.add_insecure_port(f"unix:{self.path}")
        await self._server.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._server.stop(0)

    async def _stream(self, requests: AsyncIterator[DeltaDiscoveryRequest], context: Any) -> AsyncIterator[Any]:
        told = set()
        async for request in requests:
            if not told and request.node:
                self.nodes.append(request.node.id)
            if request.type_url not in told:
                told.add(request.type_url)
                resources = [Resource(name="l", version="1", resource=Packed.pack(self._listener()))]
                yield DeltaDiscoveryResponse(
                    type_url=request.type_url,
                    nonce=request.type_url,
                    resources=resources if request.type_url == LISTENER else [],
                )

    def _listener(self) -> Listener:
        router = {"name": "r", "typed_config": {"@type": f"{TYPES}.http.router.v3.Router"}}
        route = {"match": {"prefix": "/"}, "direct_response": {"status": 200}}
        manager = {
            "@type": f"{TYPES}.network.http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": "l",
            "http_filters": [router],
            "route_config": {"virtual_hosts": [{"name": "v", "domains": ["*"], "routes": [route]}]},
        }
        address = {"socket_address": {"address": "127.0.0.1", "port_value": self.port}}
        filters = [{"filters": [{"name": "m", "typed_config": manager}]}]
        return Listener.from_dict({"name": "l", "address": address, "filter_chains": filters})


@pytest.mark.envoy
async def test_envoy_takes_its_configuration_from_whichever_coord_is_there(run_dir: Path) -> None:
    with Ports() as ports:
        gateway, admin = ports.reserve(), f"unix:{run_dir}/admin.sock"
        sockets = [run_dir / "coord-0.sock", run_dir / "coord-1.sock"]
        text = bootstrap(
            node="n",
            gateway=f"127.0.0.1:{gateway}",
            outbound=str(run_dir / "outbound.sock"),
            admin=admin.removeprefix("unix:"),
            coords=[str(path) for path in sockets],
        )
        (run_dir / "envoy.json").write_text(text)
        part = processes.envoy(run_dir / "envoy.json", admin, 1)
        with Process(part.argv, run_dir / "envoy.log") as envoy:
            await until(lambda: http_ok(admin, "/server_info"), "the admin endpoint")
            assert not await part.ready()  # No coord has answered yet.
            async with Coord(sockets[0], gateway) as first:
                await until(part.ready, "Envoy ready")
                await until(lambda: http_ok(f"127.0.0.1:{gateway}", "/"), "the gateway, on a port that we hold")
                assert first.nodes == ["n"]
            async with Coord(sockets[1], gateway) as second:
                assert await http_ok(f"127.0.0.1:{gateway}", "/")  # It keeps what it has.
                await until(lambda: second.nodes == ["n"], "the stream to the other coord")
            assert envoy.is_running()
