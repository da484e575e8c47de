"""A node from `shoal up` to a clean stop, with the real commands and the real parts."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import stat
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from shoal.cli.endpoints import fetch
from shoal.client import Client
from shoal.errors import NotFound
from tests.breakable import until

pytestmark = pytest.mark.node

ALL = {"etcd", "mongod", "envoy", "coord-0", "store-0", "infer-0", "ingest-0"}


def is_alive(pid: int) -> bool:
    """It runs: it is there, and more than a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until_gone(pids: Iterable[int], within_s: float = 60.0) -> None:
    deadline = time.monotonic() + within_s
    while left := [pid for pid in pids if is_alive(pid)]:
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.05)


def family_of(pid: int) -> set[int]:
    """Every process below `pid`, as the kernel has it."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found: set[int] = set()
    while fresh := {child for child, parent in parents.items() if parent in {pid, *found}} - found:
        found |= fresh
    return found


def is_serving(gateway: str) -> bool:
    with grpc.insecure_channel(gateway, options=[("grpc.enable_http_proxy", 0)]) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=30)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def listens(address: str) -> bool:
    port = f"{int(address.rpartition(':')[2]):04X}"
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return any(line.split()[1].endswith(f":{port}") and line.split()[3] == "0A" for line in lines)


@pytest.fixture(scope="module")
def running(node: Any) -> Any:
    """The node that the first of these tests look at."""
    return node("--replicas", "infer=2,coord=2")


@pytest.fixture(scope="module")
def plain() -> list[Any]:
    """A node that one test leaves to the next, if it is still running: each start takes 8 s of processor time."""
    return []


def test_the_ready_file_says_where_everything_is(running: Any) -> None:
    document = running.document()
    assert set(document) == {"gateway", "listen", "tls", "key_file", "admin", "data_dir", "pids", "versions"}
    assert set(document["versions"]) == {"etcd", "mongod", "envoy"}
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", text) for text in document["versions"].values())
    assert (document["listen"], document["tls"]) == (document["gateway"], None)
    assert set(document["pids"]) == ALL | {"infer-1", "coord-1"}
    assert Path(document["data_dir"]) == running.data_dir
    assert all(re.fullmatch(r"127\.0\.0\.1:\d+", document[key]) for key in ("gateway", "admin"))
    assert json.loads((running.data_dir / "node.json").read_text()) == document


def test_the_pids_are_those_of_the_processes(running: Any) -> None:
    pids = running.pids()
    assert set(pids.values()) == family_of(running.process.pid)
    for name, pid in pids.items():
        command = Path(f"/proc/{pid}/cmdline").read_text()
        service = name.partition("-")[0]
        assert service in command, f"{name} is {command!r}"


def test_the_gateway_answers(running: Any) -> None:
    assert is_serving(running.gateway)
    assert listens(running.admin)


def test_it_says_so_on_the_screen(running: Any) -> None:
    # The screen follows the ready file.
    asyncio.run(until(lambda: "ready after" in running.output.read_text(), "the node says that it is ready"))
    screen = running.output.read_text()
    for word in (running.gateway, running.admin, str(running.data_dir), *running.pids()):
        assert word in screen
    assert re.search(r"ready after \d+\.\d s", screen)


def test_other_commands_find_it_by_themselves(running: Any) -> None:
    shown = running.shoal("status").stdout
    assert "local/infer-1" in shown
    versions = running.document()["versions"]
    assert "   ".join(f"{name} {version}" for name, version in versions.items()) in shown
    assert ("warning: etcd" in shown) is (versions["etcd"] == "3.5.1")
    assert ("may lose acknowledged writes" in running.output.read_text()) is (versions["etcd"] == "3.5.1")


def test_everything_has_a_log_and_nothing_is_readable_for_others(running: Any) -> None:
    assert {path.stem for path in (running.data_dir / "logs").glob("*.log")} == set(running.pids())
    assert stat.S_IMODE(running.data_dir.stat().st_mode) == 0o700


def test_a_healthy_start_logs_no_warning(running: Any) -> None:
    services = list((running.data_dir / "logs").glob("*-*.log"))
    assert services
    entries = [json.loads(line) for path in services for line in path.read_text().splitlines()]
    warnings = [
        (entry["instance"], entry["message"])
        for entry in entries
        # A busy machine delays event loops and responses of etcd.
        if entry["level"] not in ("DEBUG", "INFO")
        and not entry["logger"].startswith(("mesh.process.stall", "mesh.cluster"))
    ]
    assert warnings == []


def test_a_second_node_on_the_same_folder_is_refused_by_name(node: Any, running: Any) -> None:
    second = node(wait=False, data_dir=running.data_dir)
    assert second.process.wait(60) == 1
    said = second.output.read_text()
    assert f"{running.data_dir} is in use by another node (pid {running.process.pid})" in said
    assert "--data-dir" in said
    assert is_serving(running.gateway)


@pytest.mark.parametrize("name", ["infer-0", "store-0", "ingest-0", "coord-0", "envoy", "mongod", "etcd"])
def test_a_process_that_is_killed_is_back_and_the_ready_file_knows_it(running: Any, name: str) -> None:
    old = running.kill(name)
    new = running.wait_until_restarted(name, old)
    assert is_alive(new)
    deadline = time.monotonic() + 120
    while True:
        try:
            if is_serving(running.gateway):
                break
        except grpc.RpcError:
            assert time.monotonic() < deadline, f"the gateway did not come back:\n{running.story()}"
            time.sleep(0.1)
    assert json.loads((running.data_dir / "node.json").read_text())["pids"][name] == running.pids()[name]
    assert f"{name} was killed by SIGKILL" in running.output.read_text()


def test_parts_given_by_url_are_used_and_not_started_and_the_node_stops_without_a_trace(
    node: Any, running: Any, etcd_address: str, mongo_uri: str
) -> None:
    other = node("--node", "given", "--etcd", f"http://{etcd_address}", "--mongo", mongo_uri, "--json")
    assert set(other.pids()) == ALL - {"etcd", "mongod"}
    assert is_serving(other.gateway)
    printed = re.search(r"^\{\n.*?^\}$", other.output.read_text(), re.MULTILINE | re.DOTALL)
    assert printed
    assert json.loads(printed[0]) == other.document()
    assert not set(other.pids().values()) & set(running.pids().values())
    namesake = node("--node", "given", "--etcd", etcd_address, "--mongo", mongo_uri, wait=False)
    assert namesake.process.wait(60) == 1
    assert "a node called 'given' already runs with the etcd" in namesake.output.read_text()
    stops_without_a_trace(other)
    assert is_serving(running.gateway)


def stops_without_a_trace(one: Any) -> None:
    """Stop a node, and check that nothing of it is left."""
    pids, gateway = [*one.pids().values(), one.process.pid], one.gateway
    run_dir = Path(json.loads((one.data_dir / "node.lock").read_text())["run_dir"])
    assert run_dir.is_dir()
    assert one.stop() == 0
    wait_until_gone(pids)
    assert not listens(gateway)
    assert not run_dir.exists()
    assert not one.ready_file.exists()
    assert not (one.data_dir / "node.json").exists()


def test_whole_nodes_run_beside_each_other_and_data_survives_a_restart(
    node: Any, running: Any, plain: list[Any], onnx_models: Path
) -> None:
    first = node()
    assert not set(first.pids().values()) & set(running.pids().values())
    assert is_serving(first.gateway)
    assert is_serving(running.gateway)
    first.shoal("models", "push", str(onnx_models / "double.onnx"))
    pids = first.pids()
    assert first.stop(signal.SIGINT) == 0
    wait_until_gone(pids.values())
    second = node("--model-control", "explicit", "--allow-code", data_dir=first.data_dir)
    assert "double" in second.shoal("models", "list").stdout
    plain.append(second)


def test_a_node_in_explicit_mode_serves_what_is_pushed_and_loads_and_unloads_on_request(
    node: Any, plain: list[Any], onnx_models: Path
) -> None:
    if not plain:
        plain.append(node("--model-control", "explicit"))
    x = np.ones((1, 4), np.float32)
    with Client(plain[0].gateway) as client:
        [pushed] = client.models.push(onnx_models / "double.onnx")
        assert pushed.ready
        client.models.unload("double")
        with pytest.raises(NotFound):
            client.infer("double", {"x": x}, timeout=30)
        client.models.load("double")
        assert (client.infer("double", {"x": x}, timeout=30).outputs["y"] == 2).all()


def test_the_shared_node_stops_in_order(running: Any) -> None:
    """Last of its tests: a node that is left alone uses a fifth of a core."""
    stops_without_a_trace(running)


def test_kill_9_of_the_launcher_leaves_no_process_and_the_next_start_works(node: Any, plain: list[Any]) -> None:
    first = plain.pop() if plain else node()
    pids = first.pids()
    run_dir = Path(json.loads((first.data_dir / "node.lock").read_text())["run_dir"])
    first.process.kill()
    first.process.wait()
    wait_until_gone(pids.values())
    second = node(data_dir=first.data_dir)
    assert is_serving(second.gateway)
    assert not run_dir.exists()  # What the killed one left was swept.
    plain.append(second)


def test_a_second_signal_stops_at_once(node: Any, plain: list[Any]) -> None:
    one = plain.pop() if plain else node()
    pids = one.pids()
    os.kill(pids["store-0"], signal.SIGSTOP)  # It cannot stop in order: the first signal would wait for its grace.
    one.process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + 30
    while "stopping" not in one.output.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    one.process.send_signal(signal.SIGINT)
    assert one.process.wait(30) == 128 + signal.SIGINT
    wait_until_gone(pids.values())
    assert not one.ready_file.exists()


def test_a_signal_while_it_starts_stops_it_in_order(node: Any) -> None:
    one = node(wait=False)
    deadline = time.monotonic() + 60
    while "starting" not in one.output.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    children = family_of(one.process.pid)
    assert children
    assert one.stop() == 0
    wait_until_gone(children)
    assert not one.ready_file.exists()


def test_only_the_services_that_are_named_are_started_and_what_they_need(node: Any) -> None:
    one = node("--services", "infer")
    assert set(one.pids()) == {"etcd", "envoy", "coord-0", "infer-0"}
    assert one.stop() == 0


def test_a_service_that_cannot_run_is_reported_and_the_rest_goes_on(node: Any, tmp_path: Path) -> None:
    # On a busy machine it takes 10 s until ingest has read its configuration, and such ends are no early ones.
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "if 'up' in sys.orig_argv:\n"
        "    from shoal.node.restarts import Restarts\n"
        "    first_s, last_s, _, *others = Restarts.__init__.__defaults__\n"
        "    Restarts.__init__.__defaults__ = (first_s, last_s, 600.0, *others)\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    one = node(wait=False, env={"SHOAL_INGEST_LEASE_MS": "a while", "PYTHONPATH": path})
    deadline = time.monotonic() + 180
    while "ingest-0 keeps ending" not in (said := one.output.read_text()):
        assert time.monotonic() < deadline, one.story()
        time.sleep(0.1)
    while "SHOAL_INGEST_LEASE_MS='a while'" not in (said := one.output.read_text()):
        assert time.monotonic() < deadline, said
        time.sleep(0.1)
    assert f"{one.data_dir}/logs/ingest-0.log" in said
    assert one.stop() == 0


def test_a_node_whose_output_nobody_reads_any_more_goes_on(node: Any, plain: list[Any]) -> None:
    one = node(wait=False, piped=True)
    assert one.process.stdout
    one.process.stdout.readline()
    one.process.stdout.close()
    one.wait_until_ready()
    one.wait_until_restarted("store-0", one.kill("store-0"))
    assert is_serving(one.gateway)
    # The next test needs the store, which Envoy does not call until it has found it healthy again.
    deadline = time.monotonic() + 120
    while one.shoal("models", "list", check=False).returncode:
        assert time.monotonic() < deadline, one.story()
    plain.append(one)


def test_work_under_way_at_the_stop_is_finished(node: Any, plain: list[Any], onnx_models: Path) -> None:
    one = plain.pop() if plain else node()
    one.shoal("models", "push", str(onnx_models / "slow.onnx"))
    rows = np.ones((64, 4), np.float32)  # More than a second of work.
    with Client(one.gateway) as client, ThreadPoolExecutor(1) as pool:
        client.infer("slow", {"x": rows[:1]}, timeout=60)
        call = pool.submit(client.infer, "slow", {"x": rows}, timeout=60)
        deadline = time.monotonic() + 30
        while not any(endpoint.active_requests for endpoint in fetch(one.admin) if endpoint.cluster == "infer"):
            assert not call.done()
            assert time.monotonic() < deadline
        assert one.stop() == 0
        assert (call.result(timeout=30).outputs["y"] == 2).all()
