"""A C++ program with Debian's gRPC, and stubs made from our .proto files: compiled here, and run."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.clients.conftest import Run
from tests.infer.conformance.instance import Instance

STUBS = Path("shoal/inference/v2")


@pytest.fixture(scope="session")
def client(repository_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled client."""
    folder = tmp_path_factory.mktemp("cpp")
    try:
        plugin = _output("sh", "-c", "command -v grpc_cpp_plugin")
        flags = _output("pkg-config", "--cflags", "--libs", "grpc++", "protobuf").split()
    except (subprocess.CalledProcessError, FileNotFoundError):
        pytest.fail("the C++ client needs Debian's gRPC: run tools/clients.sh")
    protoc = ["protoc", f"-I{repository_root / 'proto'}", f"--plugin=protoc-gen-grpc={plugin}"]
    # Only inference.proto has a service.
    subprocess.run([*protoc, f"--cpp_out={folder}", f"--grpc_out={folder}", STUBS / "inference.proto"], check=True)
    subprocess.run([*protoc, f"--cpp_out={folder}", STUBS / "model_config.proto"], check=True)
    # One translation unit for all that includes gRPC: its headers are most of the compiler's work.
    program = folder / "program.cc"
    parts = [repository_root / "tests/clients/cpp/client.cc", STUBS / "inference.pb.cc", STUBS / "inference.grpc.pb.cc"]
    program.write_text("".join(f'#include "{part}"\n' for part in parts))
    sources = [program, folder / STUBS / "model_config.pb.cc"]
    objects = [folder / f"{source.name}.o" for source in sources]

    def compile(source: Path, to: Path) -> None:
        subprocess.run(["g++", "-std=c++17", "-O0", f"-I{folder}", "-c", "-o", to, source], check=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile, sources, objects))
    subprocess.run(["g++", "-o", folder / "client", *objects, *flags], check=True)
    return folder / "client"


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.timeout(600)  # The compiler's time, on a busy machine.
def test_every_kind_of_call(client: Path, served: Instance, run: Run) -> None:
    lines = run([client, served.address]).splitlines()
    assert lines == [
        "metadata 0 ",
        "input x FP32",
        "status 0 ",
        "infer r2 2 4 6 8 10 12 14 16",
        "large 0 ",
        "last 4e+06",
        "unknown 5 Request for unknown model: 'nope' is not found",
        lines[7],
        "streamed r1 2 4 6 8",
        "refused Request for unknown model: 'nope' is not found",
        "streamed r1 2 4 6 8",
        "stream 0 ",
        "async 200 of 200",
    ]
    assert lines[7].startswith("deadline 4 ")
