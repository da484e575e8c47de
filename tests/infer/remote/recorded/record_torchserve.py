"""Records exchanges with a real TorchServe into torchserve/: run once by hand, in its own environment, with Java 17.

    pip install torchserve==0.12.0 torch-model-archiver==0.12.0 torch grpcio-tools \
        googleapis-common-protos pyyaml packaging psutil setuptools
    python tests/infer/remote/recorded/record_torchserve.py

The requests are written, and the responses taken, by stubs that are generated from the .proto file inside TorchServe's
own jar. So the bytes are those of any client and of the real server.
"""

from __future__ import annotations

import importlib
import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from importlib import resources
from pathlib import Path

import grpc
from grpc_tools import protoc

HERE = Path(__file__).resolve().parent
BIN = Path(sys.executable).parent
SERVICE = "/org.pytorch.serve.grpc.inference.InferenceAPIsService/"

HANDLER = """
class Handler:
    def initialize(self, context):
        pass

    def handle(self, data, context):
        return [self.one(row) for row in data]

    def one(self, row):
        given = {name: bytes(value) for name, value in row.items()}
        if given.get("data") == b"bad":
            raise ValueError("bad data")
        return b"|".join(name.encode() + b"=" + given[name][::-1] for name in sorted(given))
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        pb = stubs(work)
        (work / "handler.py").write_text(HANDLER)
        (work / "store").mkdir()
        archive = ["--model-name", "reverse", "--handler", str(work / "handler.py"), "-v", "1.0"]
        subprocess.run([BIN / "torch-model-archiver", *archive, "--export-path", work / "store"], check=True)
        port = serve_on(work)
        command = ["--start", "--foreground", "--ncs", "--model-store", "store", "--models", "reverse=reverse.mar"]
        more = ["--ts-config", "config.properties", "--disable-token-auth"]
        server = subprocess.Popen([BIN / "torchserve", *command, *more], cwd=work, start_new_session=True)
        try:
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                record(channel, pb)
        finally:
            server.send_signal(signal.SIGTERM)
            subprocess.run([BIN / "torchserve", "--stop"], cwd=work, check=False)
            server.wait(60)


def stubs(work: Path) -> object:
    jar = next(resources.files("ts").joinpath("frontend").iterdir())
    with zipfile.ZipFile(str(jar)) as opened:
        (work / "torchserve_inference.proto").write_bytes(opened.read("inference.proto"))
    well_known = str(resources.files("grpc_tools") / "_proto")
    google = str(resources.files("google.rpc").joinpath("../.."))
    if protoc.main(
        ["protoc", f"-I{work}", f"-I{well_known}", f"-I{google}", f"--python_out={work}", "torchserve_inference.proto"]
    ):
        sys.exit("protoc refused TorchServe's own .proto file")
    sys.path.insert(0, str(work))
    return importlib.import_module("torchserve_inference_pb2")


def serve_on(work: Path) -> int:
    ports = []
    for _ in range(5):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    http = "\n".join(
        f"{name}_address=http://127.0.0.1:{port}"
        for name, port in zip(("inference", "management", "metrics"), ports, strict=False)
    )
    (work / "config.properties").write_text(
        f"{http}\ngrpc_inference_port={ports[3]}\ngrpc_management_port={ports[4]}\n"
        "grpc_inference_address=127.0.0.1\ngrpc_management_address=127.0.0.1\n"
        "default_workers_per_model=1\ndisable_token_authorization=true\n"
    )
    return ports[3]


def record(channel: grpc.Channel, pb: object) -> None:
    asked = {
        "ping": ("Ping", b""),
        "one": ("Predictions", pb.PredictionsRequest(model_name="reverse", input={"data": b"hello \x00\xff"})),
        "pinned": ("Predictions", request(pb, "reverse", "1.0", {"body": b"abc", "data": b"xyz"})),
        "empty": ("Predictions", pb.PredictionsRequest(model_name="reverse", input={"data": b""})),
        "large": ("Predictions", pb.PredictionsRequest(model_name="reverse", input={"data": bytes(range(256)) * 8})),
        "raises": ("Predictions", pb.PredictionsRequest(model_name="reverse", input={"data": b"bad"})),
        "unknown": ("Predictions", pb.PredictionsRequest(model_name="nobody", input={"data": b"hello"})),
    }
    out = HERE / "torchserve"
    out.mkdir(exist_ok=True)
    wait(channel, asked["one"][1].SerializeToString())
    listed = []
    for name, (method, message) in asked.items():
        data = message if isinstance(message, bytes) else message.SerializeToString(deterministic=True)
        listed.append({"name": name, "method": SERVICE + method, **exchange(channel, out, name, method, data)})
    (out / "exchanges.json").write_text(json.dumps(listed, indent=2) + "\n")


def request(pb: object, name: str, version: str, given: dict[str, bytes]) -> object:
    return pb.PredictionsRequest(model_name=name, model_version=version, input=given)


def exchange(channel: grpc.Channel, out: Path, name: str, method: str, data: bytes) -> dict[str, str]:
    (out / f"{name}.request").write_bytes(data)
    try:
        (out / f"{name}.response").write_bytes(channel.unary_unary(SERVICE + method)(data, timeout=30))
        return {"code": "OK", "message": ""}
    except grpc.RpcError as err:
        return {"code": err.code().name, "message": err.details()}


def wait(channel: grpc.Channel, data: bytes) -> None:
    deadline = time.monotonic() + 90
    while True:
        try:
            channel.unary_unary(SERVICE + "Predictions")(data, timeout=5, wait_for_ready=True)
            return
        except grpc.RpcError as err:
            if time.monotonic() > deadline:
                sys.exit(f"TorchServe does not respond: {err}")


if __name__ == "__main__":
    main()
