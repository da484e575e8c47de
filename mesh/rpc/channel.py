"""Channels to other services: always through the own Envoy's outbound listener, which knows where they are.

So a service needs one address for all of them, and no load balancing, retries or TLS of its own. Envoy routes by the
gRPC service in the path, so any stub works on the one channel.
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
    # Envoy comes back within a second or so of a restart; grpc's own backoff would wait up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.default_authority", "shoal"),
)


AnyChannel: TypeAlias = grpc.aio.Channel | Channel
"""Stubs work on either. `mesh.rpc.client` is for who calls often, and gives each call a timeout; it costs a third."""


def connect(address: str) -> grpc.aio.Channel:
    """A channel to `address` (`unix:/path` or `host:port`); the caller closes it, best with `async with`."""
    return grpc.aio.insecure_channel(address, options=OPTIONS, interceptors=client_interceptors())
