"""Envoy in front of `shoal serve`, for addresses that other machines can reach.

    clients ──HTTP/1.1, HTTP/2──> Envoy at the address ──HTTP/2, unix sockets──> infer workers

The configuration is static: one listener, one cluster. It is written as plain JSON, because importing the generated
classes of Envoy's messages takes most of a second. Fields: envoy.config.bootstrap.v3.Bootstrap.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mesh.xds import refusals, senders, tls, web
from shoal.access.rpc_groups import MODEL_STREAM_INFER
from shoal.node import probes, processes
from shoal.node.envoy_overload import DEFAULT_HEAP_MB, memory
from shoal.node.envoy_runtime import runtime
from shoal.node.ports import joined
from shoal.node.workers import Workers

if TYPE_CHECKING:
    from shoal.access.policy import Policy

ADMIN_SOCKET = "admin.sock"
"""Name of Envoy's admin socket in the folder."""

log = logging.getLogger(__name__)

_TYPES = "type.googleapis.com/envoy.extensions"
_CLUSTER = "infer"
_STAT_PREFIX = "front"
_LISTENERS = (_STAT_PREFIX, "front-http")
_CONNECTION = "shoal.connection"

_STREAM_WINDOW = 1 << 20
_CONNECTION_WINDOW = 16 << 20
# The calls of one thread to a worker share one connection. A few clients that do not read could fill a smaller window,
# and then no other call to the worker would get a response.
_WORKER_WINDOW = (1 << 31) - 1
# Concurrent calls of one client connection. A worker's queue would reject more.
_STREAMS = 4096
# Request headers of one call. A larger block, or one more header, costs its own call only. Real clients send a few kB,
# and gRPC's own servers take 16 at most.
_HEADERS_KB = 16
_HEADERS = 256
# Longest time for a header block to arrive whole.
_HEADERS_TIMEOUT = "10s"
# Longest time for a client to take the rest of a response after the worker has sent all of it.
_FLUSH_TIMEOUT = "300s"
# Messages are forwarded as they arrive; no filter needs a whole one. Larger buffers would only hold more data for
# clients that do not read.
_BUFFER_BYTES = 1 << 20
# Envoy reads at most so much, and one piece of 16 KiB more, of a connection in one iteration of its event loop. Frames
# of ten bytes cost 2 us each: with the default of 1 MiB, other callers wait for 0.2 s. A lower value changes nothing.
_READ_BYTES = 16 << 10
# Frames that wait for a worker to read. At 10,000, the default, Envoy closes the connection with all calls on it: one
# client that sends a body byte by byte would end the calls of others. Watermarks bound the bytes.
_MAX_FRAMES = 1 << 30
# A request is held until its response begins, for a retry at another worker. Larger requests are not retried.
_RETRY_BYTES = 1 << 20

# Longest time without progress of streams: a year. When the heap is full it is a second (shoal.node.envoy_overload), so
# that idle streams cannot keep it full. Inferences take their time.
_UNTIL_FULL = "31536000s"

_NOTICE_S = 0.3
# Time from the begin of a stop for clients to read the last responses, and after the workers' end. A client that does
# not read may not delay the stop.
_FLUSH_S, _LAST_FLUSH_S = 5.0, 1.0
# Longer than Envoy's drain_timeout: by then each connection that was used has got its last GOAWAY.
_QUIET_S = 0.6
_POLL_S = 0.02
_ADMIN_TIMEOUT_S = 2.0
# gRPC services of a worker, by which a policy decides.
_SERVICES = (
    "inference.GRPCInferenceService",
    "grpc.health.v1.Health",
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
)
_CONNECTIONS = f"http.{_STAT_PREFIX}.downstream_cx_active"
_CALLS = f"http.{_STAT_PREFIX}.downstream_rq_total"
_UNSENT = (
    f"http.{_STAT_PREFIX}.downstream_rq_active",
    f"http.{_STAT_PREFIX}.downstream_cx_tx_bytes_buffered",
    "http2.streams_active",
    "http2.pending_send_bytes",
)


def bootstrap(
    *,
    host: str,
    port: int,
    workers: Sequence[str],
    admin: str,
    heap: int = DEFAULT_HEAP_MB << 20,
    sds: str = "",
    policy_folder: Path | None = None,
    http_port: int | None = None,
) -> dict[str, Any]:
    """Return the configuration of an Envoy that listens at `host`:`port` and calls the workers.

    Args:
        host: an IP address in numbers.
        workers: paths of the sockets of the workers.
        admin: path of the socket of the admin endpoint.
        heap: ceiling of Envoy's heap in bytes.
        sds: file of the certificate; empty: clients speak plaintext.
        policy_folder: folder with the files of a policy; None: every caller may call everything.
        http_port: a second port; None: there is none.
    """
    is_sticky = len(workers) > 1
    ports = [port] if http_port is None else [port, http_port]
    return {
        "node": {"id": "serve", "cluster": "shoal"},
        "admin": {"address": {"pipe": {"path": admin, "mode": 0o600}}},
        "static_resources": {
            "listeners": [
                _listener(name, host, each, is_sticky, sds, policy_folder)
                for name, each in zip(_LISTENERS, ports, strict=False)
            ],
            "clusters": [_cluster(workers)],
        },
        "layered_runtime": runtime(*_LISTENERS),
        **memory(heap),
    }


def _listener(name: str, host: str, port: int, is_sticky: bool, sds: str, policy_folder: Path | None) -> dict[str, Any]:
    listen = joined(host, port)
    filters = [{"name": "http", "typed_config": _connection_manager(listen, is_sticky, policy_folder)}]
    chain: dict[str, Any] = {"filters": [_connection_name(), *filters] if is_sticky else filters}
    if sds:
        chain["transport_socket"] = tls.transport_socket(sds)
        chain["transport_socket_connect_timeout"] = tls.HANDSHAKE_TIMEOUT
    return {
        "name": name,
        "address": {"socket_address": {"address": host, "port_value": port}},
        # With SO_REUSEPORT a second Envoy on the same port would not fail: it would take every other connection.
        "enable_reuse_port": False,
        "per_connection_buffer_limit_bytes": _READ_BYTES,
        "filter_chains": [chain],
    }


def _connection_manager(listen: str, is_sticky: bool, policy_folder: Path | None) -> dict[str, Any]:
    if policy_folder is None:
        hosts = web.virtual_hosts(web.web_of(listen), _virtual_host(is_sticky))
        access: dict[str, Any] = {"route_config": {"virtual_hosts": hosts, "ignore_port_in_host_matching": True}}
    else:
        access = _envoy_access().connection_manager(policy_folder)
    return {
        **access,
        "@type": f"{_TYPES}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": _STAT_PREFIX,
        "early_header_mutation_extensions": [
            *access.get("early_header_mutation_extensions", ()),
            senders.connection_number(),
        ],
        # Browsers without TLS speak HTTP/1.1.
        "codec_type": "AUTO",
        "http2_protocol_options": {
            # A malformed request costs its own call, and not the others of its connection.
            "override_stream_error_on_invalid_http_message": True,
            "max_concurrent_streams": _STREAMS,
            "initial_stream_window_size": _STREAM_WINDOW,
            "initial_connection_window_size": _CONNECTION_WINDOW,
            "max_outbound_frames": 100_000,
            # The default ends the whole connection at the second empty frame in a row. Some clients send such frames.
            "max_consecutive_inbound_frames_with_empty_payload": 64,
            # A client that disappears without closing the connection would keep its idle streams for ever.
            "connection_keepalive": {"interval": "30s", "timeout": "10s"},
        },
        # Calls have deadlines of their own, and a stream may be idle for hours.
        "stream_idle_timeout": "0s",
        "stream_flush_timeout": _FLUSH_TIMEOUT,
        "request_headers_timeout": _HEADERS_TIMEOUT,
        "max_request_headers_kb": _HEADERS_KB,
        "common_http_protocol_options": {"max_headers_count": _HEADERS},
        "drain_timeout": "0.5s",
        "generate_request_id": False,
        "server_header_transformation": "PASS_THROUGH",
        # No caller is internal: Envoy removes the x-envoy headers that would change retries and timeouts.
        "use_remote_address": True,
        # Without a range, Envoy treats private addresses as internal. No caller has this address.
        "internal_address_config": {"cidr_ranges": [{"address_prefix": "0.0.0.0", "prefix_len": 32}]},
        "skip_xff_append": True,
        "local_reply_config": {"mappers": refusals.mappers()},
        "http_filters": [
            *web.filters(),
            *access.get("http_filters", ()),
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": f"{_TYPES}.filters.http.router.v3.Router", "suppress_envoy_headers": True},
            },
        ],
    }


def _envoy_access() -> Any:
    """Return the module of policies. Its import takes a fifth of a second, which servers without a policy save."""
    from shoal.node import envoy_access

    return envoy_access


def _virtual_host(is_sticky: bool) -> dict[str, Any]:
    others = {**_route(is_sticky), "retry_policy": _RETRIES}
    return {
        "request_body_buffer_limit": _RETRY_BYTES,
        # Envoy adds these headers; workers get the caller's headers alone.
        "request_headers_to_remove": ["x-forwarded-proto", "x-envoy-external-address"],
        "routes": [
            {"match": {"prefix": "/", "headers": [web.TEXT_CALL]}, "route": _route(is_sticky)},
            # Streams use other connections to the workers: thousands that begin at once do not delay plain calls.
            {
                "match": {"path": MODEL_STREAM_INFER},
                "route": {**others, "priority": "HIGH", "idle_timeout": _UNTIL_FULL},
            },
            {"match": {"prefix": "/grpc."}, "route": {**others, "idle_timeout": _UNTIL_FULL}},
            {"match": {"prefix": "/"}, "route": others},
        ],
    }


def _route(is_sticky: bool) -> dict[str, Any]:
    # A sequence uses one connection (docs/sequences.md), so a connection must keep to one worker.
    sticky = {"hash_policy": [{"filter_state": {"key": _CONNECTION}}]} if is_sticky else {}
    # No max_stream_duration: the worker ends a call at its deadline, with a status. Envoy would reset a stream that has
    # begun its response.
    return {"cluster": _CLUSTER, "timeout": "0s", "idle_timeout": "0s", **sticky}


_RETRIES: Mapping[str, Any] = {
    # Only calls that no worker has begun are retried.
    "retry_on": "connect-failure,refused-stream",
    "num_retries": 3,
    "retry_back_off": {"base_interval": "0.005s", "max_interval": "0.05s"},
    "retry_host_predicate": [
        {
            "name": "envoy.retry_host_predicates.previous_hosts",
            "typed_config": {"@type": f"{_TYPES}.retry.host.previous_hosts.v3.PreviousHostsPredicate"},
        }
    ],
    # The hash of a connection gives hosts in the same order at each retry: enough of them to find another.
    "host_selection_retry_max_attempts": 20,
}


def _connection_name() -> dict[str, Any]:
    """Return a network filter that sets a connection's remote address as the hash key of its calls."""
    return {
        "name": "connection",
        "typed_config": {
            "@type": f"{_TYPES}.filters.network.set_filter_state.v3.Config",
            "on_new_connection": [
                {
                    "object_key": _CONNECTION,
                    "factory_key": "envoy.hashable_string",
                    "format_string": {"text_format_source": {"inline_string": "%DOWNSTREAM_REMOTE_ADDRESS%"}},
                }
            ],
        },
    }


def _cluster(workers: Sequence[str]) -> dict[str, Any]:
    return {
        "name": _CLUSTER,
        "type": "STATIC",
        "connect_timeout": "1s",
        **({"lb_policy": "MAGLEV", "maglev_lb_config": {"table_size": 1009}} if len(workers) > 1 else {}),
        "per_connection_buffer_limit_bytes": _BUFFER_BYTES,
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": f"{_TYPES}.upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": {
                    "http2_protocol_options": {
                        "initial_stream_window_size": _STREAM_WINDOW,
                        "initial_connection_window_size": _WORKER_WINDOW,
                        "max_outbound_frames": _MAX_FRAMES,
                        "max_outbound_control_frames": _MAX_FRAMES,
                        # Loading a large model may block a worker's event loop for seconds, but never for a minute.
                        "connection_keepalive": {"interval": "10s", "timeout": "60s"},
                    }
                },
            }
        },
        "circuit_breakers": {"thresholds": [_limits("DEFAULT"), _limits("HIGH")]},
        # While no worker is healthy, calls go to any worker: a worker that loads its models reports that itself.
        "common_lb_config": {
            "healthy_panic_threshold": {"value": 1},
            # With the default, a recovered worker gets no calls for a second.
            "update_merge_window": "0s",
        },
        "health_checks": [
            {
                "timeout": "2s",
                "interval": "0.5s",
                "unhealthy_interval": "0.1s",
                "no_traffic_interval": "0.1s",
                "no_traffic_healthy_interval": "0.5s",
                "unhealthy_threshold": 2,
                "healthy_threshold": 1,
                "grpc_health_check": {},
            }
        ],
        "load_assignment": {
            "cluster_name": _CLUSTER,
            "endpoints": [
                {"lb_endpoints": [{"endpoint": {"address": {"pipe": {"path": path}}}} for path in workers]},
            ],
        },
    }


def _limits(priority: str) -> dict[str, Any]:
    """Return limits that are never reached: workers bound their own queues, and reject with RESOURCE_EXHAUSTED."""
    return {
        "priority": priority,
        "max_connections": 10_000,
        "max_pending_requests": 100_000,
        "max_requests": 100_000,
        # The default allows 3 concurrent retries: of 32 calls in flight to a killed worker, 29 would fail.
        "retry_budget": {"budget_percent": {"value": 50}, "min_retry_concurrency": 1_000},
    }


class Edge:
    """Keeps an Envoy running in front of the workers, from `run` to `stop`.

    Args:
        folder: a private folder with a short path, for Envoy's configuration and admin socket.
        threads: Envoy's worker threads.
        report: called when an Envoy has ended, with its name, its status and the seconds until its restart.
        heap: ceiling of Envoy's heap in bytes.
        sds: file of the certificate for clients; empty: plaintext.
        policy: who may call what; None: every caller everything. `apply` replaces it.
        http_port: a second port; None: there is none.

    Raises:
        FailedPrecondition: no Envoy binary is installed.
    """

    def __init__(
        self,
        *,
        host: str,
        port: int,
        workers: Sequence[str],
        folder: Path,
        threads: int,
        report: Callable[[str, int, float], None],
        heap: int = DEFAULT_HEAP_MB << 20,
        sds: str = "",
        policy: Policy | None = None,
        http_port: int | None = None,
    ) -> None:
        self._admin = str(folder / ADMIN_SOCKET)
        self._folder = folder
        config = folder / "envoy.json"
        document = bootstrap(
            host=host,
            port=port,
            workers=workers,
            admin=self._admin,
            heap=heap,
            sds=sds,
            policy_folder=None if policy is None else folder,
            http_port=http_port,
        )
        config.write_text(json.dumps(document))
        self._count = len(workers)
        if policy is not None:
            self.apply(policy)
        self._was_ready = False
        spec = processes.envoy(config, f"unix:{self._admin}", threads, log_level="error")
        # One that never listened would only fail again: its configuration or its binary is wrong.
        self._processes = Workers([spec], report, is_final=lambda status: not self._was_ready)
        self._flush_by = 0.0

    def apply(self, policy: Policy) -> None:
        """Replace the policy that the Edge began with, within a tenth of a second and on living connections."""
        _envoy_access().write(policy, self._folder, _SERVICES, _virtual_host(self._count > 1))

    async def rejected_policies(self) -> int:
        """Return the number of parts of policies that Envoy has refused. It keeps the former ones."""
        access = _envoy_access()
        hosts = f"http.{_STAT_PREFIX}.rds.{access.HOSTS}.update_rejected"
        return sum((await self._stats(*access.REJECTED, hosts)).values())

    @property
    def pid(self) -> int | None:
        """The pid of the Envoy, or None while there is none."""
        return next(iter(self._processes.pids), None)

    async def run(self) -> int:
        """Return the exit status when Envoy has stopped or cannot start."""
        return await self._processes.run()

    async def is_ready(self) -> bool:
        """Return True once Envoy listens at its address."""
        self._was_ready = self._was_ready or await probes.http_ok(f"unix:{self._admin}", "/ready")
        return self._was_ready

    async def all_healthy(self) -> bool:
        """Return True when Envoy's health checks of all workers succeed."""
        return self._count in (await self._stats(f"cluster.{_CLUSTER}.membership_healthy")).values()

    async def drain(self) -> None:
        """Accept no more connections, and send GOAWAY with the next response on each. Wait until most have arrived."""
        self._flush_by = time.monotonic() + _FLUSH_S
        # Before Envoy listens there is nothing to drain.
        if not await self.is_ready():
            return
        await self._call_admin("POST", "/drain_listeners?graceful&skip_exit")
        await self._call_admin("POST", "/drain_listeners")
        await asyncio.sleep(_NOTICE_S)

    async def flush(self) -> None:
        """Return when all responses are sent and no client calls any more, or some seconds after the begin of `drain`.

        A client that has not read its GOAWAY yet may still send a call; the response is UNAVAILABLE, not a reset.
        """
        until = max(self._flush_by, time.monotonic() + _LAST_FLUSH_S)
        quiet_since, calls = time.monotonic(), -1
        while self.pid is not None and time.monotonic() < until and await self.is_ready():
            values = await self._stats(*_UNSENT, _CONNECTIONS, _CALLS)
            # No value: a busy Envoy has not responded in time.
            if values.get(_CONNECTIONS) == 0:
                return
            if any(values.get(name) for name in _UNSENT) or values.get(_CALLS) != calls:
                quiet_since, calls = time.monotonic(), values.get(_CALLS, 0)
            elif time.monotonic() - quiet_since >= _QUIET_S:
                return
            await asyncio.sleep(_POLL_S)

    def stop(self) -> None:
        """Stop Envoy now, with SIGTERM."""
        self._processes.stop()

    async def _stats(self, *names: str) -> dict[str, int]:
        """Return the values of the counters and gauges that Envoy has."""
        pattern = "|".join(f"^{re.escape(name)}$" for name in names)
        text = await self._call_admin("GET", f"/stats?filter={urllib.parse.quote(pattern)}")
        return {name: int(value) for name, _, value in (line.partition(": ") for line in text.splitlines()) if value}

    async def _call_admin(self, method: str, target: str) -> str:
        """Return the body of the admin endpoint's response; "" when there is no response."""
        request = f"{method} {target} HTTP/1.1\r\nhost: admin\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
        try:
            async with asyncio.timeout(_ADMIN_TIMEOUT_S):
                reader, writer = await asyncio.open_unix_connection(self._admin)
                try:
                    writer.write(request.encode())
                    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
                finally:
                    writer.close()
        except (OSError, TimeoutError) as err:
            log.warning(
                "Envoy's admin socket %(socket)s does not respond to %(target)s: %(error)s",
                {"event": "envoy.admin_does_not_respond", "socket": self._admin, "target": target, "error": err},
            )
            return ""
        if b" 200 " not in head.partition(b"\r\n")[0]:
            log.warning(
                "Envoy refused %(target)s: %(status_line)s",
                {
                    "event": "envoy.admin_refused",
                    "target": target,
                    "status_line": head.partition(b"\r\n")[0].decode("latin-1"),
                },
            )
        return body.decode(errors="replace")
