"""A served instance, started as a user starts it: `shoal serve`, a process of its own, at a port of its own.

SHOAL_TEST_FRONTS=h2 picks fronts, all of them where it is not set; the suite is the same for each.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from shoal.inference.v2 import inference_pb2 as pb
from shoal.inference.v2.inference_pb2_grpc import GRPCInferenceServiceStub
from tests.infer.conformance import served_models, wire
from tests.infer.conformance.instance import FRONTS, Instance

Refused = Callable[..., str]


@pytest.fixture(scope="session", params=os.environ.get("SHOAL_TEST_FRONTS", ",".join(FRONTS)).split(","))
def front(request: pytest.FixtureRequest) -> str:
    """The front under test."""
    name: str = request.param
    if name not in FRONTS:
        pytest.fail(f"SHOAL_TEST_FRONTS={name!r}: expected one or more of {','.join(FRONTS)}")
    return name


@pytest.fixture(scope="session")
def instance(front: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instance]:
    """One for the whole suite: no test changes what it serves."""
    folder = tmp_path_factory.mktemp("conformance")
    with Instance.serving(served_models.write(folder / "models"), folder / "serve.log", front=front) as running:
        yield running


@pytest.fixture(scope="session")
def channel(instance: Instance) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(instance.address, options=wire.OPTIONS) as channel:
        yield channel


@pytest.fixture(scope="session")
def stub(channel: grpc.Channel) -> GRPCInferenceServiceStub:
    return GRPCInferenceServiceStub(channel)


@pytest.fixture(scope="session")
def infer(stub: GRPCInferenceServiceStub) -> Callable[..., pb.ModelInferResponse]:
    """`infer(model, *inputs, ...)` of `wire.request`, sent."""

    def call(model: str, *given: wire.Given, **more: object) -> pb.ModelInferResponse:
        response: pb.ModelInferResponse = stub.ModelInfer(wire.request(model, *given, **more), timeout=wire.PATIENCE_S)
        return response

    return call


@pytest.fixture(scope="session")
def refused(stub: GRPCInferenceServiceStub) -> Refused:
    """`refused(code, request)`: sends it, expects this status, returns the message."""

    def call(code: str, request: pb.ModelInferRequest) -> str:
        with pytest.raises(grpc.RpcError) as caught:
            stub.ModelInfer(request, timeout=wire.PATIENCE_S)
        got, message = wire.status(caught.value)
        assert got == code, message
        return message

    return call


@pytest.fixture
def another(front: str, tmp_path: Path) -> Iterator[Callable[..., Instance]]:
    """`another(root, **environment)`: an instance of the test's own, on a repository that it may change."""
    started: list[Instance] = []

    def start(root: Path, **environment: str) -> Instance:
        running = Instance.started(root, tmp_path / f"serve-{len(started)}.log", environment, front)
        started.append(running)
        return running

    yield start
    for running in started:
        running.stop()
