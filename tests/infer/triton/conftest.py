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


# Not for the session: Triton is some thirty processes, which no other file needs.
@pytest.fixture(scope="module")
def triton(repository_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GRPCInferenceServiceStub]:
    folder = tmp_path_factory.mktemp("triton")
    models = repository.write(folder / "models")
    with triton_process.running(repository_root / ".venv-triton", models, folder) as address:
        with grpc.insecure_channel(address, options=wire.OPTIONS) as channel:
            yield GRPCInferenceServiceStub(channel)


@pytest.fixture(scope="module")
def shoal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GRPCInferenceServiceStub]:
    folder = tmp_path_factory.mktemp("shoal")
    models = repository.write(folder / "models")
    with Instance.serving(models, folder / "serve.log", EXPLICIT) as running:
        with grpc.insecure_channel(running.address, options=wire.OPTIONS) as channel:
            yield GRPCInferenceServiceStub(channel)


@pytest.fixture(scope="session")
def known(repository_root: Path) -> list[Difference]:
    """What docs/compatibility.md lists."""
    return differences.listed(repository_root / "docs/compatibility.md")
