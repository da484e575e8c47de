"""Snapshot: the complete configuration of one node's Envoy, built by a pure function from one view of the cluster.

A snapshot is immutable and replaced as a whole. The builders cache resources by their inputs, so a new snapshot shares
all unchanged resources and costs only the changed ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from mesh.cluster.membership import Instance, State
from mesh.xds.clusters import MODEL_PREFIX, Endpoint, cluster, endpoints, model_cluster
from mesh.xds.extensions import GatewayAccess
from mesh.xds.listeners import GATEWAY, OUTBOUND, listener
from mesh.xds.resource import TYPES, Resource
from mesh.xds.routes import MODEL_NAME, RouteTable, route_configuration
from mesh.xds.tracing import Tracing, collector_cluster
from mesh.xds.web import ANY, Web, web_of
from shoal.errors import InvalidArgument

_MAX_PIPE_PATH = 107


@dataclass(frozen=True)
class EnvoyNode:
    """Id and listen addresses of an Envoy, from its bootstrap file."""

    id: str
    gateway: str
    """`host:port`."""
    outbound: str
    """Path of a unix socket."""
    sds: str = ""
    """File of the gateway's certificate, on Envoy's machine; empty: clients of the gateway speak plaintext."""


def envoy_node(id: str, metadata: Mapping[str, Any]) -> EnvoyNode:
    """Parse node metadata such as `{"shoal": {"gateway": "127.0.0.1:8080", "outbound": "/run/outbound.sock"}}`.

    Raises:
        InvalidArgument: something is missing or malformed.
    """
    shoal = metadata.get("shoal")
    if not id or not isinstance(shoal, Mapping):
        raise InvalidArgument(f"Envoy {id!r}: expected a node id and node.metadata.shoal, got {sorted(metadata)}")
    gateway, outbound = shoal.get("gateway"), shoal.get("outbound")
    if not isinstance(gateway, str) or not gateway.rpartition(":")[2].isdecimal():
        raise InvalidArgument(f"Envoy {id!r}: metadata.shoal.gateway: expected host:port, got {gateway!r}")
    if not isinstance(outbound, str) or not 0 < len(outbound.encode()) <= _MAX_PIPE_PATH:
        raise InvalidArgument(
            f"Envoy {id!r}: metadata.shoal.outbound: expected a path of up to {_MAX_PIPE_PATH} bytes, got {outbound!r}"
        )
    sds = shoal.get("sds", "")
    if not isinstance(sds, str) or (sds and not sds.startswith("/")):
        raise InvalidArgument(f"Envoy {id!r}: metadata.shoal.sds: expected an absolute path, got {sds!r}")
    return EnvoyNode(id, gateway, outbound.removeprefix("unix:"), sds)


@dataclass(frozen=True)
class Snapshot:
    """Resources by type and name."""

    resources: Mapping[str, Mapping[str, Resource]]
    policy_revision: int = 0
    """Revision of the policy that the filters follow; 0: none."""

    def of(self, type_url: str) -> Mapping[str, Resource]:
        return self.resources.get(type_url, {})


def clusters_of(
    instances: Iterable[Instance],
    drained: frozenset[str],
    node: str,
    table: RouteTable,
    lost: Iterable[Instance] = (),
) -> dict[str, set[Endpoint]]:
    """Return the endpoints on `node` by cluster, for each service of the table and each model that an instance has.

    `drained` holds the names of instances that an operator has drained. Starting instances are left out. Instances in
    `lost` have lost their leases: they are endpoints of the clusters in which no other one takes new calls.
    """
    found = _registered(instances, drained, node, table)
    for name, endpoints_lost in _registered(lost, frozenset(), node, table).items():
        if all(endpoint.draining for endpoint in found.get(name, ())):
            found[name] = found.get(name, set()) | endpoints_lost
    return found


def _registered(
    instances: Iterable[Instance], drained: frozenset[str], node: str, table: RouteTable
) -> dict[str, set[Endpoint]]:
    found: dict[str, set[Endpoint]] = {service.cluster: set() for service in table.services}
    for instance in instances:
        if instance.node != node or instance.state is State.STARTING or not _is_address(instance.address):
            continue
        endpoint = Endpoint(instance.address, instance.state is State.DRAINING or instance.name in drained)
        if instance.service in found:
            found[instance.service].add(endpoint)
        for model in instance.models:
            if table.models is not None and MODEL_NAME.fullmatch(model.name):
                found.setdefault(model_cluster(model.name), set()).add(endpoint)
    return found


def _is_address(text: str) -> bool:
    """Return True when Envoy will accept the address: an invalid one would block all endpoints of the cluster."""
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        return path.startswith("/") and "\0" not in path and len(path.encode()) <= _MAX_PIPE_PATH
    return False


def snapshot(
    instances: Iterable[Instance],
    drained: frozenset[str],
    node: EnvoyNode,
    table: RouteTable,
    tracing: Tracing | None = None,
    access: GatewayAccess | None = None,
    lost: Iterable[Instance] = (),
) -> Snapshot:
    """Build the configuration of the Envoy of `node`, with every cluster that a route or listener names.

    `access` is the policy of the gateway; None: every caller may call every method, and no web page. `lost` are
    instances without a lease (see `clusters_of`).

    Raises:
        LookupError: a named cluster is missing, a bug of the builders. Envoy would accept the routes but fail the calls
            to it.
    """
    instances, lost = list(instances), list(lost)
    found = clusters_of(instances, drained, node.id, table, lost)
    sequenced = _sequence_models([*instances, *lost]) & {name.removeprefix(MODEL_PREFIX) for name in found}
    sticky = {model_cluster(model) for model in sequenced}
    routed = _routed_models(found, sequenced, table)
    tried = table.tried_unhealthy
    built = [cluster(name, is_sticky=name in sticky, tries_unhealthy=name in tried) for name in sorted(found)]
    built += [endpoints(name, tuple(sorted(found[name]))) for name in sorted(found)]
    built += [
        listener(GATEWAY, node.gateway, table, tracing, node.sds, has_access=access is not None),
        listener(OUTBOUND, f"unix:{node.outbound}", table, tracing),
        route_configuration(table, routed, sequenced),
        route_configuration(
            table,
            routed,
            sequenced,
            _web(access, node.gateway),
            has_access=access is not None,
            limit_filters=() if access is None else access.limit_filters,
        ),
        *(() if access is None else access.extensions),
    ]
    if tracing is not None:
        built.append(collector_cluster(tracing))
    return replace(checked(built), policy_revision=0 if access is None else access.revision)


def _web(access: GatewayAccess | None, gateway: str) -> Web:
    """Return what a gateway serves. A policy with names keeps those by which the node calls its own gateway."""
    if access is None:
        return web_of(gateway)
    host = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(listen := gateway.rpartition(":")[0], listen)
    named = {name.lower() for name in access.web.hosts}
    own = (name for name in ("localhost", host) if name not in named)
    return access.web if ANY in named else replace(access.web, hosts=(*access.web.hosts, *own))


def _sequence_models(instances: Iterable[Instance]) -> frozenset[str]:
    """Return the names of models whose requests are steps of sequences."""
    return frozenset(model.name for instance in instances for model in instance.models if model.has_sequences)


def _routed_models(found: Mapping[str, set[Endpoint]], sequenced: frozenset[str], table: RouteTable) -> tuple[str, ...]:
    """Return the models that need routes of their own: with sequences, or not loaded by every instance. Mostly none."""
    if table.models is None:
        return ()
    everywhere = [found[service.cluster] for service in table.services if service.prefix == table.models.prefix]
    names = [name for name in found if name.startswith(MODEL_PREFIX) and found[name] not in everywhere]
    return tuple(sorted({name.removeprefix(MODEL_PREFIX) for name in names} | sequenced))


def checked(resources: Iterable[Resource]) -> Snapshot:
    """Return the snapshot of `resources`.

    Raises:
        LookupError: a resource names a cluster that is not among `resources`.
    """
    by_type: dict[str, dict[str, Resource]] = {type_url: {} for type_url in TYPES}
    for resource in resources:
        by_type[resource.type_url][resource.name] = resource
    clusters = by_type[TYPES[0]]
    for resource in (resource for of_type in by_type.values() for resource in of_type.values()):
        if missing := resource.needs - clusters.keys():
            raise LookupError(
                f"{resource.type_url} {resource.name!r} names clusters that the snapshot lacks: {sorted(missing)}"
            )
    return Snapshot(MappingProxyType({type_url: MappingProxyType(of_type) for type_url, of_type in by_type.items()}))
