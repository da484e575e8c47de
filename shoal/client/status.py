"""Status of a node: instances, leader, models, connectors, and the state of each Envoy's configuration."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import TypeVar

from shoal.client.jobs.connectors import Connector, of_connector
from shoal.client.models.registry import ModelVersion, of_model, of_time
from shoal.client.transport import methods
from shoal.client.transport.calls import Caller
from shoal.client.transport.deadline import Timeout
from shoal.coord.v1 import coord_pb2 as coord
from shoal.errors import PermissionDenied, ShoalError
from shoal.ingest.v1 import ingest_pb2 as ingest
from shoal.store.v1 import store_pb2 as store

T = TypeVar("T")


class InstanceState(StrEnum):
    """State of an instance, which decides whether it takes new calls."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Instance:
    """One running process of a service."""

    service: str
    name: str
    """`<node>/<service>-<n>`."""
    node: str
    address: str
    pid: int
    state: InstanceState
    started_at: datetime | None
    models: dict[str, tuple[int, ...]]
    """Versions ready at an infer instance, by model; empty for other services."""
    version: str
    drained_by_operator: bool
    slow_paths: dict[str, str] = field(default_factory=dict)
    """Models whose ordinary requests take infer's slow path, each with the reason."""


@dataclass(frozen=True)
class Leader:
    """The coord instance that is the elected leader."""

    instance: str
    fencing_token: int
    since: datetime | None


@dataclass(frozen=True)
class EnvoyResources:
    """Configuration of one resource type at an Envoy."""

    type: str
    names: tuple[str, ...]
    acked_version: str
    nack: str
    """Envoy's error message when it rejected the last response; else empty."""
    at: datetime | None


@dataclass(frozen=True)
class EnvoyStatus:
    """One Envoy with a connection to the coord instance that responded."""

    node: str
    connected_at: datetime | None
    resources: tuple[EnvoyResources, ...]

    @property
    def refused(self) -> tuple[EnvoyResources, ...]:
        """Resource types whose last configuration the Envoy rejected."""
        return tuple(resource for resource in self.resources if resource.nack)


@dataclass(frozen=True)
class Status:
    """Overview of a node. A part that could not be read is empty, and `problems` has the reason."""

    gateway: str
    instances: tuple[Instance, ...]
    stale: bool
    """True when etcd is unreachable: `instances` is the last known state."""
    leader: Leader | None
    models: tuple[ModelVersion, ...]
    envoys: tuple[EnvoyStatus, ...]
    problems: tuple[str, ...]
    connectors: tuple[Connector, ...] = ()
    policy_version: int = 0
    """Version of the policy in force; 0: callers are not authenticated."""
    master_key: str = ""
    """Source of the keyring's master key: a file, a variable or a systemd credential."""

    @property
    def healthy(self) -> bool:
        """True when no problem is visible to the client."""
        return not (self.stale or self.problems or any(envoy.refused for envoy in self.envoys))


async def fetch_status(caller: Caller, timeout_s: Timeout) -> Status:
    """Read the parts of the status concurrently.

    Raises:
        ShoalError: every call failed.
    """
    timeout_s = caller.deadline(timeout_s)
    problems: list[ShoalError] = []

    async def part(call: Awaitable[T], default: T, what: str) -> T:
        try:
            return await call
        except ShoalError as err:
            problems.append(type(err)(err.message if err.message.startswith("no node") else f"{what}: {err.message}"))
            return default

    listed, leader, models, mesh = await asyncio.gather(
        part(
            caller.call(methods.LIST_INSTANCES, coord.ListInstancesRequest(), timeout_s=timeout_s),
            coord.ListInstancesResponse(),
            "instances",
        ),
        part(
            caller.call(methods.GET_LEADER, coord.GetLeaderRequest(), timeout_s=timeout_s),
            coord.GetLeaderResponse(),
            "leader",
        ),
        part(
            caller.call(methods.LIST_MODELS, store.ListModelsRequest(), timeout_s=timeout_s),
            store.ListModelsResponse(),
            "models",
        ),
        part(
            caller.call(methods.GET_MESH_STATUS, coord.GetMeshStatusRequest(), timeout_s=timeout_s),
            coord.GetMeshStatusResponse(),
            "mesh",
        ),
    )
    if len(problems) == 4:
        raise problems[0]
    connectors = ingest.ListConnectorsResponse()
    if any(instance.service == "ingest" for instance in listed.instances):
        connectors = await part(_connectors(caller, timeout_s), connectors, "connectors")
    return Status(
        gateway=caller.url,
        instances=tuple(of_instance(instance) for instance in listed.instances),
        stale=listed.stale,
        leader=_of_leader(leader) if leader.instance else None,
        models=tuple(of_model(model) for model in models.models),
        envoys=tuple(_of_envoy(envoy) for envoy in mesh.envoys),
        problems=tuple(problem.message for problem in problems),
        connectors=tuple(of_connector(connector) for connector in connectors.connectors),
        policy_version=mesh.policy_version,
        master_key=mesh.master_key,
    )


def of_instance(message: coord.Instance) -> Instance:
    """Return the Instance of a message."""
    states = {
        coord.INSTANCE_STATE_STARTING: InstanceState.STARTING,
        coord.INSTANCE_STATE_READY: InstanceState.READY,
        coord.INSTANCE_STATE_DRAINING: InstanceState.DRAINING,
    }
    return Instance(
        service=message.service,
        name=message.name,
        node=message.node,
        address=message.address,
        pid=message.pid,
        state=states.get(message.state, InstanceState.UNKNOWN),
        started_at=of_time(message, "started_at"),
        models={model.name: tuple(model.versions) for model in message.models},
        slow_paths={model.name: model.slow_path for model in message.models if model.slow_path},
        version=message.version,
        drained_by_operator=message.drained_by_operator,
    )


def _of_leader(message: coord.GetLeaderResponse) -> Leader:
    return Leader(message.instance, message.fencing_token, of_time(message, "since"))


def _of_envoy(message: coord.EnvoyStatus) -> EnvoyStatus:
    return EnvoyStatus(
        node=message.node,
        connected_at=of_time(message, "connected_at"),
        resources=tuple(
            EnvoyResources(each.type, tuple(each.names), each.acked_version, each.nack, of_time(each, "at"))
            for each in message.resources
        ),
    )


async def _connectors(caller: Caller, timeout_s: Timeout) -> ingest.ListConnectorsResponse:
    """Return the connectors; none for a caller that may not see them, which is no fault of the node."""
    try:
        return await caller.call(methods.LIST_CONNECTORS, ingest.ListConnectorsRequest(), timeout_s=timeout_s)
    except PermissionDenied:
        return ingest.ListConnectorsResponse()
