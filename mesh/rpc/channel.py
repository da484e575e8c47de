"""Channels to other services, through the outbound listener of the service's own Envoy.

A service needs one address for all others, and no load balancing, retries or TLS of its own. Envoy routes by the gRPC
service in the path, so the stubs of all services share one channel.
"""

from __future__ import annotations

from typing import TypeAlias

import grpc

from mesh.rpc.client.channel import Channel
from mesh.rpc.interceptors import client_interceptors
from mesh.rpc.limits import MESSAGE_BYTES

OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # Envoy restarts within about a second; gRPC's default backoff grows to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.default_authority", "localhost"),
)


AnyChannel: TypeAlias = grpc.aio.Channel | Channel
"""Stubs accept either. A call on a `mesh.rpc.client` channel needs a timeout and costs a third of a grpc.aio call."""


def connect(address: str) -> grpc.aio.Channel:
    """Return a channel to `address` (`unix:/path` or `host:port`). The caller closes it; `async with` does."""
    return grpc.aio.insecure_channel(address, options=OPTIONS, interceptors=client_interceptors())
