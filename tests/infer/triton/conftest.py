"""Real Triton and Shoal side by side, each serving its own copy of one repository."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from shoal.inference.v2.inference_pb2_grpc import GRPCInferenceServiceStub
from tests.infer.conformance import wire
from tests.infer.conformance.instance import EXPLICIT, Instance
from tests.infer.triton import differences, repository, triton_process
from tests.infer.triton.differences import Difference
from tests.infer.triton.triton_process import Triton


# Not for the session: Triton is some thirty processes, which no other file needs.
@pytest.fixture(scope="package")
def triton_served(repository_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Triton]:
    folder = tmp_path_factory.mktemp("triton")
    models = repository.write(folder / "models")
    with triton_process.running(repository_root / ".venv-triton", models, folder) as running:
        yield running


@pytest.fixture(scope="package")
def shoal_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instance]:
    folder = tmp_path_factory.mktemp("shoal")
    models = repository.write(folder / "models")
    with Instance.serving(models, folder / "serve.log", EXPLICIT) as running:
        yield running


@pytest.fixture(scope="module")
def triton(triton_served: Triton) -> Iterator[GRPCInferenceServiceStub]:
    with grpc.insecure_channel(triton_served.grpc, options=wire.OPTIONS) as channel:
        yield GRPCInferenceServiceStub(channel)


@pytest.fixture(scope="module")
def shoal(shoal_process: Instance) -> Iterator[GRPCInferenceServiceStub]:
    with grpc.insecure_channel(shoal_process.address, options=wire.OPTIONS) as channel:
        yield GRPCInferenceServiceStub(channel)


@pytest.fixture(scope="session")
def known(repository_root: Path) -> list[Difference]:
    """Differences that docs/compatibility.md lists."""
    return differences.listed(repository_root / "docs/compatibility.md")
