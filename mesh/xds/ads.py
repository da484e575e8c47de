"""Aggregated discovery service over gRPC: one delta stream and one Session for each Envoy.

The messages are those of envoy-data-plane, which have no descriptors, so the server registers the method by path.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

import grpc

from mesh.process.watched import Watched
from mesh.rpc.interceptors import Context
from mesh.xds.delta import Request, Response, Session, TypeStatus
from mesh.xds.messages import DeltaDiscoveryRequest, DeltaDiscoveryResponse, Sent
from mesh.xds.resource import EXTENSION, short_type
from mesh.xds.snapshot import EnvoyNode, Snapshot, envoy_node
from shoal.errors import InvalidArgument

log = logging.getLogger(__name__)

SERVICE = "envoy.service.discovery.v3.AggregatedDiscoveryService"


class Snapshots(Protocol):
    """Source of the snapshots of a node."""

    def follow(self, node: EnvoyNode) -> AsyncIterator[Snapshot]:
        """Yield the node's snapshot as soon as it exists, and again after each change, for ever."""


@dataclass(frozen=True)
class EnvoyStatus:
    """Connected Envoy with the state of its resources."""

    node: str
    connected_at: float
    """Unix seconds."""
    types: tuple[TypeStatus, ...]


@dataclass(eq=False)
class _Stream:
    node: EnvoyNode
    connected_at: float
    session: Session
    policy_revision: int = 0
    """Revision of the last policy whose filters Envoy has acknowledged."""


class AdsServer:
    """Keeps the snapshot of every connected Envoy up to date."""

    def __init__(self, snapshots: Snapshots, now: Callable[[], float] = time.time) -> None:
        self._snapshots = snapshots
        self._now = now
        self._streams: set[_Stream] = set()
        self._oldest: Watched[float] = Watched(math.inf)
        """Lowest policy revision of a connected Envoy."""

    def methods(self) -> dict[str, Any]:
        """Return the methods for a server, by path."""
        method = grpc.stream_stream_rpc_method_handler(
            self._delta, request_deserializer=DeltaDiscoveryRequest.parse, response_serializer=bytes
        )
        return {f"/{SERVICE}/DeltaAggregatedResources": method}

    def status(self) -> tuple[EnvoyStatus, ...]:
        """Return the connected Envoys, sorted by name."""
        found = [EnvoyStatus(s.node.id, s.connected_at, s.session.status()) for s in self._streams]
        return tuple(sorted(found, key=lambda envoy: (envoy.node, envoy.connected_at)))

    async def until_enforced(self, revision: int) -> None:
        """Wait until each connected Envoy enforces the policy of `revision`, or has rejected it."""
        oldest = self._oldest.value
        while oldest < revision:
            oldest = await self._oldest.after(oldest)

    def _compare(self) -> None:
        self._oldest.set(min((stream.policy_revision for stream in self._streams), default=math.inf))

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
                async for event in merged:
                    if isinstance(event, Snapshot):
                        snapshot = event
                    else:
                        stream.session.receive(_request(event), self._now())
                        _log_nack(stream.node, event)
                    # Nothing is sent without a snapshot: an Envoy keeps the one that it has from another coord.
                    for response in stream.session.due(snapshot, self._now()) if snapshot is not None else ():
                        yield _response(response)
                    if snapshot is not None:
                        self._record_policy(stream, snapshot)

    def _record_policy(self, stream: _Stream, snapshot: Snapshot) -> None:
        revision = snapshot.policy_revision
        if stream.policy_revision != revision and stream.session.is_settled(EXTENSION, snapshot):
            stream.policy_revision = revision
            self._compare()

    @contextlib.contextmanager
    def _connected(self, node: EnvoyNode) -> Iterator[_Stream]:
        stream = _Stream(node, self._now(), Session())
        self._streams.add(stream)
        self._compare()
        log.info("Envoy of node %(node)s connected", {"event": "envoy.connected", "node": node.id})
        try:
            yield stream
        finally:
            self._streams.discard(stream)
            self._compare()
            log.info("Envoy of node %(node)s disconnected", {"event": "envoy.disconnected", "node": node.id})


async def _merged(requests: AsyncIterator[Any], snapshots: AsyncIterator[Snapshot]) -> AsyncGenerator[Any, None]:
    """Yield requests and snapshots in the order of their arrival, until `requests` end."""
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
            "Envoy of node %(node)s rejected a %(type)s: %(error)s",
            {
                "event": "envoy.refused",
                "node": node.id,
                "type": short_type(message.type_url),
                "error": message.error_detail.message,
            },
        )


def _response(response: Response) -> DeltaDiscoveryResponse:
    return DeltaDiscoveryResponse(
        type_url=response.type_url,
        resources=[Sent(name=r.name, version=r.version, resource=r.packed) for r in response.resources],
        removed_resources=list(response.removed),
        nonce=response.nonce,
        system_version_info=response.version,
    )
