"""grpc.health.v1 of the mesh: who is SERVING, by membership."""

from __future__ import annotations

import pytest

from mesh.cluster.membership import Instance, State
from services.coord.cluster import Cluster
from services.coord.health import NOT_SERVING, SERVICE_UNKNOWN, SERVING, status_of

SERVICES = {"shoal.store.v1.StoreService": "store", "inference.GRPCInferenceService": "infer"}


def infer(state: State) -> Instance:
    return Instance("infer", "local", "infer-0", "unix:/x", 10, state, 100.0)


@pytest.mark.parametrize(
    ("name", "instances", "drained", "expected"),
    [
        ("inference.GRPCInferenceService", (infer(State.READY),), frozenset(), SERVING),
        ("inference.GRPCInferenceService", (infer(State.READY),), frozenset({"local/infer-0"}), NOT_SERVING),
        ("inference.GRPCInferenceService", (infer(State.STARTING),), frozenset(), NOT_SERVING),
        ("inference.GRPCInferenceService", (infer(State.DRAINING),), frozenset(), NOT_SERVING),
        ("shoal.store.v1.StoreService", (infer(State.READY),), frozenset(), NOT_SERVING),
        ("shoal.store.v1.Other", (infer(State.READY),), frozenset(), SERVICE_UNKNOWN),
        ("store", (), frozenset(), SERVICE_UNKNOWN),
        ("", (), frozenset(), SERVING),
    ],
)
def test_a_service_serves_while_an_instance_takes_traffic(name, instances, drained, expected):
    assert status_of(name, Cluster(instances, drained=drained), SERVICES, is_up=True) == expected


def test_coord_itself_serves_while_it_is_up():
    assert status_of("", Cluster(), SERVICES, is_up=False) == NOT_SERVING
