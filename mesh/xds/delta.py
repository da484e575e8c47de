"""The delta protocol, seen from one Envoy: what it wants, what it has, what it is sent next. Pure: no I/O, no clock.

One Session is one stream. Each type has at most one response on its way; what changes meanwhile is sent with the next.

    Envoy ── subscribe, unsubscribe, "I have these versions" ──> receive
    Envoy <── resources that it wants and has not, names that are gone ── due(snapshot)
    Envoy ── ACK: it has them; NACK: it has none of them for sure ──> receive

Order (make before break): clusters, then endpoints, then listeners, then routes; a resource that names clusters waits
until Envoy has them and their endpoints, and a cluster goes only after what named it.

After a NACK Envoy may have taken some of the response and refused the rest. So each of its resources is sent again, one
by one; what is refused alone is not sent again until it changes.

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
    """A DeltaDiscoveryRequest, as far as it matters."""

    type_url: str
    subscribe: tuple[str, ...] = ()
    unsubscribe: tuple[str, ...] = ()
    initial_versions: Mapping[str, str] = field(default_factory=dict)
    nonce: str = ""
    error: str | None = None
    """Set in a NACK: Envoy's own words."""


@dataclass(frozen=True)
class Response:
    """A DeltaDiscoveryResponse, as far as it matters."""

    type_url: str
    resources: tuple[Resource, ...]
    removed: tuple[str, ...]
    nonce: str
    version: str


@dataclass(frozen=True)
class TypeStatus:
    """What one Envoy has of one type."""

    type_url: str
    names: tuple[str, ...]
    acked_version: str
    nack: str
    at: float
    """When the last ACK or NACK came, unix seconds; 0: none did yet."""


@dataclass
class _Type:
    """The state of one type on one stream."""

    type_url: str
    is_wildcard: bool = False
    is_known: bool = False
    """Envoy has asked for this type."""
    is_greeted: bool = False
    """It has had a response: to a wildcard there is one even when there is nothing to send, for Envoy waits for it."""
    names: set[str] = field(default_factory=set)
    """Subscribed by name."""
    held: dict[str, Resource | str] = field(default_factory=dict)
    """What Envoy acknowledged, by name: the resource, or (from before a reconnect) only its version."""
    sent: Response | None = None
    """On its way: neither acknowledged nor refused."""
    suspects: set[str] = field(default_factory=set)
    """Were in a refused response: each is sent alone."""
    refused: dict[str, str] = field(default_factory=dict)
    """Versions that Envoy refused when they were sent alone."""
    doubtful: dict[str, tuple[Resource | str, ...]] = field(default_factory=dict)
    """What Envoy may have of names whose last response it refused: what it had before, or what it was sent."""
    unknown: set[str] = field(default_factory=set)
    """Subscribed, not there, and Envoy has been told so."""
    acked_version: str = ""
    nack: str = ""
    at: float = 0.0

    def wants(self, name: str) -> bool:
        return self.is_wildcard or name in self.names

    def has(self, resource: Resource) -> bool:
        held = self.held.get(resource.name)
        return (held if isinstance(held, str | None) else held.version) == resource.version


class Session:
    """What one Envoy wants and has, on one stream."""

    def __init__(self) -> None:
        self._types = {type_url: _Type(type_url) for type_url in TYPES}
        self._nonces = 0

    def receive(self, request: Request, now: float) -> None:
        """Takes note of a request. Types that are not served are ignored: Envoy waits for them in vain, as it may."""
        state = self._types.get(request.type_url)
        if state is None:
            return
        if request.nonce:
            self._answered(state, request, now)
        self._subscribed(state, request)

    def due(self, snapshot: Snapshot) -> list[Response]:
        """What is to be sent now so that Envoy comes to have `snapshot`; it counts as sent."""
        for state in self._types.values():
            self._recognise(state, snapshot)
        responses = []
        for state in self._types.values():
            if state.sent is None and (response := self._next(state, snapshot)) is not None:
                state.sent = response
                responses.append(response)
        return responses

    def status(self) -> tuple[TypeStatus, ...]:
        """What Envoy has, type by type, of those that it asked for."""
        return tuple(
            TypeStatus(state.type_url, tuple(sorted(state.held)), state.acked_version, state.nack, state.at)
            for state in self._types.values()
            if state.is_known
        )

    def _answered(self, state: _Type, request: Request, now: float) -> None:
        sent = state.sent
        if sent is None or sent.nonce != request.nonce:
            return  # An answer to something older: the newer one decides.
        state.sent = None
        state.at = now
        names = {resource.name for resource in sent.resources}
        for name in sent.removed:
            state.held.pop(name, None)
            state.doubtful.pop(name, None)
        if request.error is not None:
            state.nack = request.error or "refused without a reason"
            for resource in sent.resources:
                before = state.held.pop(resource.name, None)
                maybe = state.doubtful.get(resource.name, ()) + (() if before is None else (before,))
                # What it had at first, and the last few that it was sent: bounded, however often it refuses.
                state.doubtful[resource.name] = (*maybe[:1], *maybe[1:][-7:], resource)
                if len(names) == 1:
                    state.refused[resource.name] = resource.version
            state.suspects |= names
            return
        state.acked_version = sent.version
        state.suspects -= names
        for resource in sent.resources:
            self._acknowledged(state, resource)
        if not state.refused and not state.suspects:
            state.nack = ""

    def _acknowledged(self, state: _Type, resource: Resource) -> None:
        state.refused.pop(resource.name, None)
        state.doubtful.pop(resource.name, None)
        if not state.wants(resource.name):
            return
        if state.type_url == CLUSTER and not state.has(resource):
            # A cluster that is replaced starts without endpoints, and not every Envoy asks for them again.
            self._types[ENDPOINTS].held.pop(resource.name, None)
        state.held[resource.name] = resource

    def _subscribed(self, state: _Type, request: Request) -> None:
        is_first = not state.is_known
        state.is_known = True
        wanted = set(request.subscribe)
        if _ANY in wanted or (is_first and not wanted and state.type_url in _WILDCARD_TYPES):
            state.is_wildcard = True
        for name in wanted - {_ANY}:
            # Whoever subscribes again has forgotten what it had.
            state.held.pop(name, None)
            state.unknown.discard(name)
            state.names.add(name)
        for name in request.unsubscribe:
            if name == _ANY:
                state.is_wildcard = False
            state.names.discard(name)
            state.unknown.discard(name)
        for name in [name for name in (*state.held, *state.doubtful) if not state.wants(name)]:
            state.held.pop(name, None)
            state.doubtful.pop(name, None)
        if is_first:
            state.held |= {name: version for name, version in request.initial_versions.items() if state.wants(name)}

    def _next(self, state: _Type, snapshot: Snapshot) -> Response | None:
        there = snapshot.of(state.type_url)
        changed = [
            resource
            for resource in there.values()
            if state.wants(resource.name)
            and not state.has(resource)
            and state.refused.get(resource.name) != resource.version
            and self._is_ready_for(resource, snapshot)
        ]
        alone = next((resource for resource in changed if resource.name in state.suspects), None)
        if alone is not None:
            changed = [alone]
        had = (*state.held, *state.doubtful)
        removed = [name for name in had if name not in there and not self._is_in_use(state, name)]
        removed += [name for name in state.names if name not in there and name not in state.unknown]
        if not changed and not removed and (state.is_greeted or not state.is_wildcard):
            return None
        state.is_greeted = True
        state.unknown |= {name for name in removed if name in state.names}
        state.unknown -= {resource.name for resource in changed}
        state.suspects &= there.keys()
        for name in [name for name in state.refused if name not in there]:
            del state.refused[name]
        self._nonces += 1
        return Response(
            state.type_url,
            tuple(changed),
            tuple(sorted(set(removed))),
            f"{self._nonces}",
            _version_of(there.values()),
        )

    def _recognise(self, state: _Type, snapshot: Snapshot) -> None:
        """What Envoy has from before a reconnect is known again if it is what the snapshot has."""
        there = snapshot.of(state.type_url)
        for name, held in state.held.items():
            if isinstance(held, str) and name in there and there[name].version == held:
                state.held[name] = there[name]
                state.acked_version = state.acked_version or _version_of(there.values())

    def _is_ready_for(self, resource: Resource, snapshot: Snapshot) -> bool:
        """Whether Envoy has each cluster that `resource` names, with its endpoints, or will never have it."""
        clusters, assignments = self._types[CLUSTER], self._types[ENDPOINTS]
        with_endpoints = snapshot.of(ENDPOINTS)
        for name in resource.needs:
            if clusters.refused.get(name) is not None:
                continue  # Its calls will fail. All others go on.
            if name not in clusters.held:
                return False
            if name in with_endpoints and name not in assignments.held and name not in assignments.refused:
                return False
        return True

    def _is_in_use(self, state: _Type, name: str) -> bool:
        """Whether something that Envoy has, or is just being sent, names the cluster `name`."""
        if state.type_url != CLUSTER:
            return False
        for other in (self._types[LISTENER], self._types[ROUTES]):
            if not other.is_known:
                return True  # It may have some from before a reconnect, and will say so.
            sent = other.sent.resources if other.sent is not None else ()
            doubtful = (one for several in other.doubtful.values() for one in several)
            for held in [*other.held.values(), *doubtful, *sent]:
                # Of an older version that it has from before a reconnect, nobody knows what it names.
                if isinstance(held, str) or name in held.needs:
                    return True
        return False


def _version_of(resources: Iterable[Resource]) -> str:
    """Of all resources of a type: for people, Envoy only repeats it."""
    digest = hashlib.sha256()
    for resource in sorted(resources, key=lambda resource: resource.name):
        digest.update(f"{resource.name}\0{resource.version}\0".encode())
    return digest.hexdigest()[:16]
