"""The aggregated discovery service over gRPC: one delta stream for each Envoy, a Session behind each.

The messages are envoy-data-plane's, which have no descriptors: so the server gets its method by path.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
from envoy_data_plane.envoy.service.discovery.v3 import (
    DeltaDiscoveryRequest,
    DeltaDiscoveryResponse,
)
from envoy_data_plane.envoy.service.discovery.v3 import Resource as Sent

from mesh.rpc.interceptors import Context
from mesh.xds.delta import Request, Response, Session, TypeStatus
from mesh.xds.resource import short_type
from mesh.xds.snapshot import EnvoyNode, Snapshot, envoy_node
from shoal.errors import InvalidArgument

log = logging.getLogger(__name__)

SERVICE = "envoy.service.discovery.v3.AggregatedDiscoveryService"


class Snapshots(Protocol):
    """Where the snapshots of a node come from."""

    def follow(self, node: EnvoyNode) -> AsyncIterator[Snapshot]:
        """The node's snapshot, as soon as there is one, and again after each change. Never ends."""


@dataclass(frozen=True)
class EnvoyStatus:
    """A connected Envoy and what it has."""

    node: str
    connected_at: float
    """Unix seconds."""
    types: tuple[TypeStatus, ...]


@dataclass(frozen=True)
class _Stream:
    node: EnvoyNode
    connected_at: float
    session: Session


class AdsServer:
    """Keeps every Envoy that connects up to date with its snapshot."""

    def __init__(self, snapshots: Snapshots, now: Callable[[], float] = time.time) -> None:
        self._snapshots = snapshots
        self._now = now
        self._streams: set[_Stream] = set()

    def methods(self) -> dict[str, Any]:
        """Return the methods for a server, by path."""
        method = grpc.stream_stream_rpc_method_handler(
            self._delta, request_deserializer=DeltaDiscoveryRequest.parse, response_serializer=bytes
        )
        return {f"/{SERVICE}/DeltaAggregatedResources": method}

    def status(self) -> tuple[EnvoyStatus, ...]:
        """The Envoys that are connected now, by name."""
        found = [EnvoyStatus(s.node.id, s.connected_at, s.session.status()) for s in self._streams]
        return tuple(sorted(found, key=lambda envoy: (envoy.node, envoy.connected_at)))

    async def _delta(
        self, requests: AsyncIterator[DeltaDiscoveryRequest], ctx: Context
    ) -> AsyncIterator[DeltaDiscoveryResponse]:
        first = await anext(requests, None)
        if first is None:
            return
        with self._connected(_node_of(first)) as stream:
            stream.session.receive(_request(first), self._now())
            snapshot: Snapshot | None = None
            async with aclosing(_merged(requests, self._snapshots.follow(stream.node))) as merged:
                async for news in merged:
                    if isinstance(news, Snapshot):
                        snapshot = news
                    else:
                        stream.session.receive(_request(news), self._now())
                        _log_nack(stream.node, news)
                    # Without a snapshot nothing is sent: an Envoy that has one from another coord keeps it.
                    for response in stream.session.due(snapshot) if snapshot is not None else ():
                        yield _response(response)

    @contextlib.contextmanager
    def _connected(self, node: EnvoyNode) -> Iterator[_Stream]:
        stream = _Stream(node, self._now(), Session())
        self._streams.add(stream)
        log.info("Envoy of node %s connected", node.id)
        try:
            yield stream
        finally:
            self._streams.discard(stream)
            log.info("Envoy of node %s disconnected", node.id)


async def _merged(requests: AsyncIterator[Any], snapshots: AsyncIterator[Snapshot]) -> AsyncGenerator[Any, None]:
    """What comes from either, as it comes, until `requests` end."""
    reading = asyncio.ensure_future(anext(requests, None))
    following = asyncio.ensure_future(anext(snapshots, None))
    try:
        while True:
            await asyncio.wait([reading, following], return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                if (request := reading.result()) is None:
                    return
                yield request
                reading = asyncio.ensure_future(anext(requests, None))
            if following.done():
                yield following.result()
                following = asyncio.ensure_future(anext(snapshots, None))
    finally:
        for task in (reading, following):
            task.cancel()
        await asyncio.gather(reading, following, return_exceptions=True)


def _node_of(request: DeltaDiscoveryRequest) -> EnvoyNode:
    node = request.node
    if node is None:
        raise InvalidArgument("the first request of a stream must carry Envoy's node")
    return envoy_node(node.id, node.metadata.to_dict() if node.metadata is not None else {})


def _request(message: DeltaDiscoveryRequest) -> Request:
    error = message.error_detail
    return Request(
        type_url=message.type_url,
        subscribe=tuple(message.resource_names_subscribe),
        unsubscribe=tuple(message.resource_names_unsubscribe),
        initial_versions=dict(message.initial_resource_versions),
        nonce=message.response_nonce,
        error=None if error is None else error.message,
    )


def _log_nack(node: EnvoyNode, message: DeltaDiscoveryRequest) -> None:
    if message.error_detail is not None:
        log.error(
            "Envoy of node %s refused a %s: %s", node.id, short_type(message.type_url), message.error_detail.message
        )


def _response(response: Response) -> DeltaDiscoveryResponse:
    return DeltaDiscoveryResponse(
        type_url=response.type_url,
        resources=[Sent(name=r.name, version=r.version, resource=r.packed) for r in response.resources],
        removed_resources=list(response.removed),
        nonce=response.nonce,
        system_version_info=response.version,
    )
