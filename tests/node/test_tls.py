"""A node whose gateway speaks TLS, with the real commands: `shoal up --listen 0.0.0.0:0 --tls auto --insecure`."""

from __future__ import annotations

import asyncio
import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from shoal.node.probes import channel_to
from shoal.node.tls import own_ca
from shoal.store.v1 import store_pb2
from tests.breakable import until
from tests.node.conftest import OF_THE_MACHINE, Node, NodeFactory

pytestmark = pytest.mark.node

OPEN = ("--listen", "0.0.0.0:0", "--tls", "auto", "--insecure", "--services", "infer,store")


@pytest.fixture(scope="module")
def running(node: NodeFactory, tmp_path_factory: pytest.TempPathFactory) -> Node:
    """A node whose CA ends in 50 days."""
    data_dir = tmp_path_factory.mktemp("tls") / "data"
    with_old_ca(data_dir, timedelta(days=50))
    return node(*OPEN, "--tls-name", "shoal.test", data_dir=data_dir)


def with_old_ca(data_dir: Path, left: timedelta) -> datetime:
    """Put a CA that ends in `left` into the data folder of a node, in place of another one; return its end."""
    (data_dir / own_ca.FOLDER).mkdir(mode=0o700, parents=True, exist_ok=True)
    data_dir.chmod(0o700)
    now = datetime.now(UTC)
    own_ca._make(data_dir / own_ca.FOLDER, now + left - timedelta(days=own_ca._CA_DAYS))
    return now + left


async def until_trusted(running: Node) -> None:
    """Wait until Envoy serves a certificate of the CA that commands of this machine trust."""

    async def is_trusted() -> bool:
        # Not by a context of another test.
        command = ("status", "--gateway", f"https://{running.gateway}")
        return not (await asyncio.to_thread(running.shoal, *command, check=False)).returncode

    await until(is_trusted, "a certificate of the new CA")


def test_commands_and_clients_use_a_node_with_tls(running: Node, onnx_models: Path, tmp_path: Path) -> None:
    document = running.document()
    port = document["listen"].rpartition(":")[2]
    assert (document["gateway"], document["listen"]) == (f"127.0.0.1:{port}", f"0.0.0.0:{port}")
    assert document["tls"]["has_own_ca"]
    # The screen follows the ready file.
    asyncio.run(until(lambda: "ready after" in running.output.read_text(), "the node says that it is ready"))
    for said in (f"https://0.0.0.0:{port}", document["tls"]["fingerprint"], "not authenticated"):
        assert said in running.output.read_text()

    shown = running.shoal("ca", "show")
    ca = tmp_path / "ca.pem"
    ca.write_text(shown.stdout)
    assert document["tls"]["fingerprint"] in shown.stderr
    credentials = grpc.ssl_channel_credentials(ca.read_bytes())
    named = [("grpc.enable_http_proxy", 0), ("grpc.ssl_target_name_override", "shoal.test")]
    with grpc.secure_channel(f"127.0.0.1:{port}", credentials, options=named) as channel:
        request = health_pb2.HealthCheckRequest(service="inference.GRPCInferenceService")
        answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=30)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING

    # Commands find the node of this machine, and its CA, by themselves.
    running.shoal("models", "push", str(onnx_models / "double.onnx"))
    answer = running.shoal("infer", "double", '{"x": [[1, 2, 3, 4]]}', "--json")
    [output] = json.loads(answer.stdout)["outputs"]
    assert output["data"] == [[2, 4, 6, 8]]
    status = json.loads(running.shoal("status", "--json").stdout)
    assert (status["gateway"], status["envoy"]["admin"]) == (f"https://127.0.0.1:{port}", document["admin"])

    # As if from another machine.
    running.shoal("context", "add", "far", f"https://localhost:{port}", "--ca", str(ca))
    assert "local/infer-0" in running.shoal("status", "--gateway", "far").stdout
    untrusted = running.shoal("status", "--gateway", f"https://localhost:{port}", check=False)
    assert (untrusted.returncode, "is not trusted" in untrusted.stderr) == (1, True), untrusted.stderr
    plain = running.shoal("status", "--gateway", f"localhost:{port}", check=False)
    assert (plain.returncode, f"call https://localhost:{port}" in plain.stderr) == (1, True), plain.stderr


def test_a_ca_that_ends_an_open_address_and_a_stopped_node_are_found_until_the_commands_have_run(
    node: NodeFactory, running: Node
) -> None:
    data_dir = running.data_dir

    def doctor(of: Node, *args: str) -> dict[str, str]:
        done = of.shoal("doctor", "--json", *args, check=False)
        findings = json.loads(done.stdout)["findings"]
        return {each["check"]: each["command"] for each in findings if each["check"] not in OF_THE_MACHINE}

    found = doctor(running, "--gateway", f"https://{running.gateway}")
    assert found.keys() == {"ca-ends", "exposed-without-authentication"}
    before = running.document()["tls"]["fingerprint"]
    assert os.system(found["ca-ends"]) == 0
    asyncio.run(until(lambda: running.document()["tls"]["fingerprint"] != before, "the node has made another CA"))
    asyncio.run(until_trusted(running))
    assert doctor(running, "--gateway", f"https://{running.gateway}").keys() == {"exposed-without-authentication"}
    options = found["exposed-without-authentication"].removeprefix("shoal up ")
    running.stop()
    assert doctor(running, "--data-dir", str(data_dir))["node-down"] == f"shoal up --data-dir {data_dir}"
    again = node(*options.removesuffix(f" --data-dir {data_dir}").split(), data_dir=data_dir)
    asyncio.run(until(lambda: doctor(again) == {}, "nothing is found"))


async def test_a_ca_that_has_ended_on_a_running_node_is_named_and_replaced_and_no_stream_ends(
    node: NodeFactory, tmp_path: Path, onnx_models: Path
) -> None:
    running = await asyncio.to_thread(node, *OPEN, data_dir=tmp_path / "data")
    async with channel_to(running.gateway, has_tls=True) as channel:
        watched = channel.unary_stream(
            "/shoal.store.v1.StoreService/WatchModels",
            store_pb2.WatchModelsRequest.SerializeToString,
            store_pb2.WatchModelsResponse.FromString,
        )(store_pb2.WatchModelsRequest(), timeout=600)
        assert not (await anext(watched)).snapshot
        # While the node runs: on a busy machine, its start takes longer than any time for which one would like to wait.
        before = running.document()["tls"]["fingerprint"]
        ends = with_old_ca(tmp_path / "data", timedelta(seconds=30))
        await until(lambda: running.document()["tls"]["fingerprint"] != before, "the node uses the CA that ends")
        await until(lambda: datetime.now(UTC) > ends, "the CA has ended")

        status = await asyncio.to_thread(running.shoal, "status", check=False)
        assert (status.returncode, "has expired" in status.stderr) == (1, True), status
        done = await asyncio.to_thread(running.shoal, "doctor", "--json", check=False)
        found = {each["check"]: each for each in json.loads(done.stdout)["findings"]}
        assert found["ca-ends"]["severity"] == "error", found
        assert os.system(found["ca-ends"]["command"]) == 0
        await until_trusted(running)

        # Commands of this machine trust the new CA, and the stream of before goes on.
        await asyncio.to_thread(running.shoal, "models", "push", str(onnx_models / "double.onnx"))
        assert [model.name for model in (await anext(watched)).snapshot] == ["double"]
        await watched.aclose()
