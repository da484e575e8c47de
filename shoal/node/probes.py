"""Readiness probes: each sends one cheap request, waits a second at most, and never raises."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

PROBE_S = 1.0


async def http_ok(address: str, path: str) -> bool:
    """Return True when a GET of `path` at `address` (`unix:/path` or `host:port`) gets a response with status 200."""
    with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
        async with asyncio.timeout(PROBE_S):
            reader, writer = await _connection(address)
            try:
                writer.write(f"GET {path} HTTP/1.1\r\nHost: probe\r\nConnection: close\r\n\r\n".encode())
                return b" 200 " in await reader.readline()
            finally:
                writer.close()
    return False


async def _connection(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if address.startswith("unix:"):
        return await asyncio.open_unix_connection(address.removeprefix("unix:"))
    host, _, port = address.rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def is_listening(address: str) -> bool:
    """Return True when a process listens at `address` (`unix:/path` or `host:port`)."""
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(PROBE_S):
            _, writer = await _connection(address)
            writer.close()
            return True
    return False


async def etcd_responds(addresses: str) -> bool:
    """Return True when one of the addresses, separated by commas, passes etcd's health check: a read by majority."""
    return any(await asyncio.gather(*(http_ok(address, "/health") for address in addresses.split(","))))


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    """Return the metadata of a call with `token`; none without one."""
    return (("authorization", f"Bearer {token}"),) if token else ()


async def health(address: str, service: str = "", *, has_tls: bool = False, token: str = "") -> bool:
    """Return True when grpc.health.v1 at `address` (`unix:/path` or `host:port`) reports SERVING for `service`."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    async with channel_to(address, has_tls=has_tls) as channel:
        try:
            request = health_pb2.HealthCheckRequest(service=service)
            stub: Any = health_pb2_grpc.HealthStub(channel)
            response = await stub.Check(request, timeout=PROBE_S, metadata=bearer(token))
        except grpc.RpcError:
            return False
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


async def mongo_responds(uri: str) -> bool:
    """Return True when MongoDB at `uri` has a writable primary."""
    from pymongo import AsyncMongoClient
    from pymongo.errors import PyMongoError

    try:
        async with AsyncMongoClient[dict[str, object]](uri, serverSelectionTimeoutMS=int(PROBE_S * 1000)) as client:
            return bool((await client.admin.command("hello")).get("isWritablePrimary"))
    except PyMongoError:
        return False


def channel_to(address: str, *, has_tls: bool = False) -> Any:
    """Return a channel to a server of this machine, for `async with`.

    The probes of an own listener tell no secret, and its certificate may be for another name: it is not verified.
    """
    import grpc

    if not has_tls:
        return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
    import ssl

    from mesh.rpc.client.channel import Channel, Tls

    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return Channel(address, tls=Tls(context, "localhost"))


CHANNEL_OPTIONS: tuple[tuple[str, int | str], ...] = (
    # The probed server is on this machine, whatever http_proxy says.
    ("grpc.enable_http_proxy", 0),
    # Channels to one address share a connection and its backoff: a new probe would wait for the backoff of the last.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.default_authority", "localhost"),
)
