"""State machine of the delta xDS protocol for one Envoy stream: subscriptions, acknowledged resources, next responses.

Pure: no I/O, no clock. A Session is one stream. Each type has at most one response in flight; later changes go into the
next response.

    Envoy ── subscribe, unsubscribe, initial_resource_versions ──> receive
    Envoy <── subscribed resources that are new or changed, removed names ── due(snapshot)
    Envoy ── ACK: all resources are applied; NACK: any of them may be missing ──> receive

Order (make before break): clusters, endpoints, listeners, routes. A resource that names clusters waits until Envoy has
these clusters and their endpoints. A cluster is removed only after every resource that names it.

After a NACK, Envoy may have applied some resources of the response and rejected others. Therefore each resource of the
response is sent again in a response of its own. A resource that is rejected alone is not sent again until it changes.

Protocol: https://www.envoyproxy.io/docs/envoy/latest/api-docs/xds_protocol#incremental-xds
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from mesh.xds.resource import CLUSTER, ENDPOINTS, LISTENER, ROUTES, TYPES, Resource
from mesh.xds.snapshot import Snapshot

_WILDCARD_TYPES = frozenset({CLUSTER, LISTENER})
_ANY = "*"


@dataclass(frozen=True)
class Request:
    """The fields of a DeltaDiscoveryRequest that Session uses."""

    type_url: str
    subscribe: tuple[str, ...] = ()
    unsubscribe: tuple[str, ...] = ()
    initial_versions: Mapping[str, str] = field(default_factory=dict)
    nonce: str = ""
    error: str | None = None
    """Envoy's error message; set in a NACK only."""


@dataclass(frozen=True)
class Response:
    """The fields of a DeltaDiscoveryResponse that Session sets."""

    type_url: str
    resources: tuple[Resource, ...]
    removed: tuple[str, ...]
    nonce: str
    version: str


@dataclass(frozen=True)
class TypeStatus:
    """Resources of one type that one Envoy has, and its last ACK or NACK."""

    type_url: str
    names: tuple[str, ...]
    acked_version: str
    nack: str
    at: float
    """Arrival time of the last ACK or NACK, unix seconds; 0 before the first one."""
    awaited_since: float = 0.0
    """Time of the response that Envoy has neither acknowledged nor rejected, unix seconds; 0: there is none."""


@dataclass
class _Type:
    """The state of one type on one stream."""

    type_url: str
    is_wildcard: bool = False
    is_requested: bool = False
    """True once Envoy has sent a request for this type."""
    has_response: bool = False
    """True once a response was sent. Envoy waits for a first response to a wildcard, even an empty one."""
    names: set[str] = field(default_factory=set)
    """Names that Envoy subscribes to explicitly."""
    acked: dict[str, Resource | str] = field(default_factory=dict)
    """Acknowledged resources by name; only the version for a resource from before a reconnect."""
    in_flight: Response | None = None
    """The response that Envoy has neither acknowledged nor rejected."""
    sent_at: float = 0.0
    retried_alone: set[str] = field(default_factory=set)
    """Names from a rejected response: each is sent again in a response of its own."""
    rejected: dict[str, str] = field(default_factory=dict)
    """Versions, by name, that Envoy rejected when they were sent alone."""
    ambiguous: dict[str, tuple[Resource | str, ...]] = field(default_factory=dict)
    """For each name whose last response was rejected, the resources that Envoy may have now."""
    reported_missing: set[str] = field(default_factory=set)
    """Subscribed names that the snapshot lacks, and that a response has listed as removed."""
    acked_version: str = ""
    nack: str = ""
    at: float = 0.0

    def wants(self, name: str) -> bool:
        return self.is_wildcard or name in self.names

    def has(self, resource: Resource) -> bool:
        acked = self.acked.get(resource.name)
        return (acked if isinstance(acked, str | None) else acked.version) == resource.version


class Session:
    """Subscriptions and acknowledged resources of one Envoy, on one stream."""

    def __init__(self) -> None:
        self._types = {type_url: _Type(type_url) for type_url in TYPES}
        self._nonces = 0

    def receive(self, request: Request, now: float) -> None:
        """Record a request of Envoy. Requests for unknown types are ignored and get no response."""
        state = self._types.get(request.type_url)
        if state is None:
            return
        if request.nonce:
            self._record_acknowledgement(state, request, now)
        self._record_subscriptions(state, request)

    def due(self, snapshot: Snapshot, now: float = 0.0) -> list[Response]:
        """Return the responses to send now to bring Envoy closer to `snapshot`, and record them as in flight."""
        for state in self._types.values():
            self._match_versions(state, snapshot)
        responses = []
        for state in self._types.values():
            if state.in_flight is None and (response := self._next(state, snapshot)) is not None:
                state.in_flight, state.sent_at = response, now
                responses.append(response)
        return responses

    def is_settled(self, type_url: str, snapshot: Snapshot) -> bool:
        """Return True when Envoy has, or has rejected, each resource of a type that it subscribes to."""
        state = self._types[type_url]
        return all(
            state.has(resource) or state.rejected.get(name) == resource.version
            for name, resource in snapshot.of(type_url).items()
            if state.wants(name)
        )

    def status(self) -> tuple[TypeStatus, ...]:
        """Return the status of each type that Envoy has requested."""
        return tuple(
            TypeStatus(
                state.type_url,
                tuple(sorted(state.acked)),
                state.acked_version,
                state.nack,
                state.at,
                0.0 if state.in_flight is None else state.sent_at,
            )
            for state in self._types.values()
            if state.is_requested
        )

    def _record_acknowledgement(self, state: _Type, request: Request, now: float) -> None:
        response = state.in_flight
        # An ACK or NACK of an older response is ignored.
        if response is None or response.nonce != request.nonce:
            return
        state.in_flight = None
        state.at = now
        names = {resource.name for resource in response.resources}
        for name in response.removed:
            state.acked.pop(name, None)
            state.ambiguous.pop(name, None)
        if request.error is not None:
            state.nack = request.error or "rejected without a reason"
            for resource in response.resources:
                before = state.acked.pop(resource.name, None)
                candidates = state.ambiguous.get(resource.name, ()) + (() if before is None else (before,))
                # Bounded, however often Envoy rejects: the oldest candidate and the latest few.
                state.ambiguous[resource.name] = (*candidates[:1], *candidates[1:][-7:], resource)
                if len(names) == 1:
                    state.rejected[resource.name] = resource.version
            state.retried_alone |= names
            return
        state.acked_version = response.version
        state.retried_alone -= names
        for resource in response.resources:
            self._record_ack(state, resource)
        if not state.rejected and not state.retried_alone:
            state.nack = ""

    def _record_ack(self, state: _Type, resource: Resource) -> None:
        state.rejected.pop(resource.name, None)
        state.ambiguous.pop(resource.name, None)
        if not state.wants(resource.name):
            return
        if state.type_url == CLUSTER and not state.has(resource):
            # A replaced cluster starts without endpoints, and not every Envoy version requests them again.
            self._types[ENDPOINTS].acked.pop(resource.name, None)
        state.acked[resource.name] = resource

    def _record_subscriptions(self, state: _Type, request: Request) -> None:
        is_first = not state.is_requested
        state.is_requested = True
        subscribed = set(request.subscribe)
        if _ANY in subscribed or (is_first and not subscribed and state.type_url in _WILDCARD_TYPES):
            state.is_wildcard = True
        for name in subscribed - {_ANY}:
            # An Envoy that subscribes again has dropped the resource.
            state.acked.pop(name, None)
            state.reported_missing.discard(name)
            state.names.add(name)
        for name in request.unsubscribe:
            if name == _ANY:
                state.is_wildcard = False
            state.names.discard(name)
            state.reported_missing.discard(name)
        for name in [name for name in (*state.acked, *state.ambiguous) if not state.wants(name)]:
            state.acked.pop(name, None)
            state.ambiguous.pop(name, None)
        if is_first:
            state.acked |= {name: version for name, version in request.initial_versions.items() if state.wants(name)}

    def _next(self, state: _Type, snapshot: Snapshot) -> Response | None:
        current = snapshot.of(state.type_url)
        changed = [
            resource
            for resource in current.values()
            if state.wants(resource.name)
            and not state.has(resource)
            and state.rejected.get(resource.name) != resource.version
            and self._is_ready_for(resource, snapshot)
        ]
        alone = next((resource for resource in changed if resource.name in state.retried_alone), None)
        if alone is not None:
            changed = [alone]
        had = (*state.acked, *state.ambiguous)
        removed = [name for name in had if name not in current and not self._is_in_use(state, name)]
        removed += [name for name in state.names if name not in current and name not in state.reported_missing]
        if not changed and not removed and (state.has_response or not state.is_wildcard):
            return None
        state.has_response = True
        state.reported_missing |= {name for name in removed if name in state.names}
        state.reported_missing -= {resource.name for resource in changed}
        state.retried_alone &= current.keys()
        for name in [name for name in state.rejected if name not in current]:
            del state.rejected[name]
        self._nonces += 1
        return Response(
            state.type_url,
            tuple(changed),
            tuple(sorted(set(removed))),
            f"{self._nonces}",
            _version_of(current.values()),
        )

    def _match_versions(self, state: _Type, snapshot: Snapshot) -> None:
        """Replace versions from before a reconnect by the snapshot's resources, where the versions are equal."""
        current = snapshot.of(state.type_url)
        for name, acked in state.acked.items():
            if isinstance(acked, str) and name in current and current[name].version == acked:
                state.acked[name] = current[name]
                state.acked_version = state.acked_version or _version_of(current.values())

    def _is_ready_for(self, resource: Resource, snapshot: Snapshot) -> bool:
        """Return True when Envoy has, or has rejected, each cluster that `resource` names, and its endpoints."""
        clusters, assignments = self._types[CLUSTER], self._types[ENDPOINTS]
        with_endpoints = snapshot.of(ENDPOINTS)
        for name in resource.needs:
            # Calls to a rejected cluster fail; it must not block the routes of the others.
            if clusters.rejected.get(name) is not None:
                continue
            if name not in clusters.acked:
                return False
            if name in with_endpoints and name not in assignments.acked and name not in assignments.rejected:
                return False
        return True

    def _is_in_use(self, state: _Type, name: str) -> bool:
        """Return True when a listener or route that Envoy has, may have or is being sent names the cluster `name`."""
        if state.type_url != CLUSTER:
            return False
        for other in (self._types[LISTENER], self._types[ROUTES]):
            # Before its first request for the type, Envoy may have resources from before a reconnect.
            if not other.is_requested:
                return True
            in_flight = other.in_flight.resources if other.in_flight is not None else ()
            ambiguous = (one for several in other.ambiguous.values() for one in several)
            for resource in [*other.acked.values(), *ambiguous, *in_flight]:
                # Of a resource from before a reconnect only the version is known, not the clusters that it names.
                if isinstance(resource, str) or name in resource.needs:
                    return True
        return False


def _version_of(resources: Iterable[Resource]) -> str:
    """Return a version of all resources of a type, for people to compare: Envoy only logs and repeats it."""
    digest = hashlib.sha256()
    for resource in sorted(resources, key=lambda resource: resource.name):
        digest.update(f"{resource.name}\0{resource.version}\0".encode())
    return digest.hexdigest()[:16]
