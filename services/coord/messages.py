"""Conversion of coord's values to the messages of shoal.coord.v1."""

from __future__ import annotations

from collections.abc import Callable

from google.protobuf.timestamp_pb2 import Timestamp

from mesh.cluster.election import Leader
from mesh.cluster.membership import Instance, State
from mesh.xds.ads import EnvoyStatus
from mesh.xds.delta import TypeStatus
from mesh.xds.resource import short_type
from services.coord.cluster import Cluster
from services.coord.sampling import Report
from shoal.coord.v1 import coord_pb2 as pb

_STATES = {
    State.STARTING: pb.INSTANCE_STATE_STARTING,
    State.READY: pb.INSTANCE_STATE_READY,
    State.DRAINING: pb.INSTANCE_STATE_DRAINING,
}


def timestamp(seconds: float) -> Timestamp:
    """Return the Timestamp of unix seconds."""
    nanos = round(seconds * 1e9)
    return Timestamp(seconds=nanos // 1_000_000_000, nanos=nanos % 1_000_000_000)


def instance_message(
    instance: Instance, cluster: Cluster, may_see: Callable[[str], bool] = lambda model: True
) -> pb.Instance:
    """Return the message of an instance, with the models that the caller may see."""
    return pb.Instance(
        service=instance.service,
        name=instance.name,
        node=instance.node,
        address=instance.address,
        pid=instance.pid,
        state=_STATES[cluster.state_of(instance)],
        started_at=timestamp(instance.started_at),
        models=[
            pb.ReadyModel(name=model.name, versions=model.versions, slow_path=model.slow_path)
            for model in instance.models
            if may_see(model.name)
        ],
        version=instance.version,
        drained_by_operator=instance.name in cluster.drained,
    )


def instance_messages(cluster: Cluster, service: str, may_see: Callable[[str], bool]) -> list[pb.Instance]:
    return [instance_message(instance, cluster, may_see) for instance in cluster.of_service(service)]


def leader_message(leader: Leader) -> pb.GetLeaderResponse:
    return pb.GetLeaderResponse(instance=leader.name, fencing_token=leader.token, since=timestamp(leader.since))


def envoy_message(envoy: EnvoyStatus) -> pb.EnvoyStatus:
    return pb.EnvoyStatus(
        node=envoy.node,
        connected_at=timestamp(envoy.connected_at),
        resources=[_resource_message(status) for status in envoy.types],
    )


def _resource_message(status: TypeStatus) -> pb.ResourceStatus:
    return pb.ResourceStatus(
        type=short_type(status.type_url),
        names=status.names,
        acked_version=status.acked_version,
        nack=status.nack,
        at=timestamp(status.at) if status.at else None,
    )


def history_message(coord: str, report: Report) -> pb.GetHistoryResponse:
    """Return the message of the history of `coord`."""
    nodes = [
        pb.HistoryNode(
            name=node.name,
            address=node.address,
            answered_at=timestamp(node.answered_at) if node.answered_at else None,
            missing=node.is_missing,
        )
        for node in report.nodes
    ]
    return pb.GetHistoryResponse(
        coord=coord,
        since=timestamp(report.since),
        until=timestamp(report.until),
        step_seconds=report.points.step_s,
        rows=[pb.HistoryRow(name=name, **fields) for name, fields in report.points.rows.items()],
        nodes=nodes,
        left_out=report.left_out,
    )
