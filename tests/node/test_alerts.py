"""Alerts whose causes take minutes or damage a node: each fires once, through Prometheus and Alertmanager to a webhook.

The other alerts are those of `tests/node/doctor/test_causes.py`, which is the short form of this test.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pymongo import MongoClient

import shoal
from shoal.client import JobRequest
from shoal.errors import ShoalError
from tests.alerting import Alerting, can_alert
from tests.breakable import until
from tests.certificates import ca_in, written
from tests.chaos.replica_set import ReplicaSet
from tests.ingest.connectors.brokers import toml
from tests.ingest.connectors.kafkas import Kafka, Tansu
from tests.long_form import IS_LONG
from tests.node.conftest import Node, python_model

pytestmark = [
    pytest.mark.node,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not IS_LONG, reason="the short form is tests/node/doctor/test_causes.py"),
    pytest.mark.skipif(not can_alert(), reason="needs Prometheus and Alertmanager: run tools/prometheus.sh"),
]

ROW = {"x": np.ones((1, 4), np.float32)}
MODEL = """
import time

class Model:
    inputs = {"x": ("FP32", [-1, 4])}
    outputs = {"y": ("FP32", [-1, 4])}

    def predict(self, batch):
        BODY
        return {"y": batch["x"]}
"""
# In the processes of the node: a page waits for a process that stands still for less than a scrape, infer's check of
# deadlines is off by an hour while a file exists, and ingest finds little more than the reserve on MongoDB's disk.
SITE = """
import os, sys
if "up" in sys.orig_argv:
    from shoal.node import admin
    admin.READ_S = 1.0
if any("services.infer" in part for part in sys.orig_argv):
    from services.infer.scheduling.execution import Execution
    count = Execution._count_expired
    def late(self, batch, now):
        count(self, batch, now + 3600 * os.path.exists(FILE))
    Execution._count_expired = late
if any("services.ingest" in part for part in sys.orig_argv):
    from services.ingest.intake.disk import Disk
    observe = Disk.observe
    def less(self, free):
        observe(self, self.reserve * 3 // 2 if os.path.exists(FILE) else free)
    Disk.observe = less
"""


@dataclass
class World:
    """The node, its MongoDB and its alerts."""

    node: Node
    folder: Path
    client: shoal.Client
    mongo: ReplicaSet
    alerting: Alerting
    kafka: Kafka

    def until_whole(self) -> None:
        """Wait until each process of the node is ready."""

        def is_whole() -> bool:
            with suppress(ShoalError):
                ready = {
                    each.name.partition("/")[2]: each.pid
                    for each in self.client.status().instances
                    if each.state == "ready"
                }
                return ready == {name: pid for name, pid in self.node.pids().items() if "-" in name}
            return False

        asyncio.run(until(is_whole, "every process of the node is ready", 60, every_s=0.2))

    @contextmanager
    def refusing(self, collection: str) -> Iterator[None]:
        """Let MongoDB refuse new documents of a collection, and changes of its documents."""
        with MongoClient[dict[str, Any]](self.mongo.uri) as client:
            database = client["shoal"]
            [found] = database.list_collections(filter={"name": collection})
            rules = {"validator": found["options"].get("validator", {})}
            rules["validationLevel"] = found["options"].get("validationLevel", "strict")
            database.command("collMod", collection, validator={"no": "such"}, validationLevel="strict")
            try:
                yield
            finally:
                database.command("collMod", collection, **rules)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, onnx_models: Path) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("alerts")
    (folder / "site").mkdir()
    (folder / "site/sitecustomize.py").write_text(SITE.replace("FILE", repr(str(folder / "off"))))
    ca = ca_in(folder)
    cert, key = written(folder / "server", ca, days=(-1, 90), names=("localhost",))
    with ExitStack() as stack:
        mongo = stack.enter_context(ReplicaSet(folder, members=1, voters=1))
        broker = stack.enter_context(Tansu(folder))
        broker.wait_until_ready()
        kafka = asyncio.run(Kafka(broker.address, partitions=1).make())
        settings = {"model": "busy", "format": "record", "inputs": {"x": "FP32"}, "writes": "json"}
        (folder / "streams.toml").write_text(toml("rows", kafka.table, **settings))
        asyncio.run(mongo.until_ready())
        environ = {
            "PYTHONPATH": os.pathsep.join([str(folder / "site"), os.environ.get("PYTHONPATH", "")]),
            # A queue forms behind few jobs.
            "SHOAL_INGEST_MAX_IN_FLIGHT": "4",
            "SHOAL_INFER_BODY_BYTES": str(8 << 20),
        }
        args = ["--auth", "--mongo", mongo.uri, "--connectors", str(folder / "streams.toml")]
        node = Node(folder, *args, "--tls-cert", str(cert), "--tls-key", str(key), env=environ)
        stack.callback(node.close)
        node.wait_until_ready()
        token = Path(node.document()["key_file"]).read_text().strip()
        address = f"https://localhost:{node.gateway.rpartition(':')[2]}"
        client = stack.enter_context(shoal.Client(address, token=token, ca=ca.path))
        client.models.push(onnx_models / "double.onnx")
        for name, body in (
            ("fails", "raise ValueError(batch)"),
            ("busy", "time.sleep(1)"),
            ("late", "time.sleep(0.1)"),
        ):
            model = python_model(folder / name, MODEL.replace("BODY", body))
            if name == "late":
                with (model / "config.pbtxt").open("a") as config:
                    config.write('parameters { key: "slo_ms" value { string_value: "50" } }\n')
            client.models.push(model, check=False)
        alerting = stack.enter_context(Alerting(folder, node.data_dir / "prometheus.json", every_s=2.0))
        yield World(node, folder, client, mongo, alerting, kafka)


@pytest.fixture(autouse=True)
def whole(world: World) -> None:
    """Each test begins on a whole node."""
    world.until_whole()
    world.alerting.notified.clear()


def test_requests_that_fail_fire_the_fast_alert_and_then_the_slow_one(world: World) -> None:
    def fail() -> None:
        with suppress(ShoalError):
            world.client.infer("fails", ROW)

    world.alerting.until_notified("ShoalErrorsFast", doing=fail)
    assert not any(each.name == "ShoalErrorsSlow" for each in world.alerting.notified)
    # Inhibited by the fast alert, until its short window is over.
    world.alerting.until_notified("ShoalErrorsSlow")
    world.alerting.until_notified("ShoalErrorsFast", "resolved")


def test_answers_beyond_the_latency_goal_fire_the_fast_alert_and_then_the_slow_one(world: World) -> None:
    world.alerting.until_notified("ShoalLatencyFast", doing=lambda: world.client.infer("late", ROW))
    world.alerting.until_notified("ShoalLatencySlow")


def test_answers_beyond_a_latency_goal_that_the_policy_states_fire(world: World) -> None:
    before = world.client.access.policy()
    objective = {"name": "double", "models": ["double"], "latency_ms": 0.001, "latency_percent": 95}
    stated = {**yaml.safe_load(before.document), "objectives": [objective]}
    world.client.access.apply(yaml.safe_dump(stated), before.files)
    try:
        doing = lambda: world.client.infer("double", ROW)  # noqa: E731
        world.alerting.until_notified("ShoalLatencyFast", model="double", doing=doing)
    finally:
        world.client.access.apply(before.document, before.files)
    # The goal is gone, and so are late answers.
    world.alerting.until_notified("ShoalLatencyFast", "resolved", model="double", doing=doing)


def test_rows_that_run_after_their_deadline_fire(world: World) -> None:
    off = world.folder / "off"
    off.touch()
    try:
        doing = lambda: world.client.infer("double", ROW, timeout=20)  # noqa: E731
        world.alerting.until_notified("ShoalExpiredRowsRun", doing=doing)
    finally:
        off.unlink()


def test_a_disk_that_is_nearly_full_fires(world: World) -> None:
    off = world.folder / "off"
    off.touch()
    try:
        world.alerting.until_notified("ShoalDiskNearlyFull")
    finally:
        off.unlink()
    world.alerting.until_notified("ShoalDiskNearlyFull", "resolved")


def test_a_node_whose_launcher_stands_still_fires(world: World) -> None:
    world.node.process.send_signal(signal.SIGSTOP)
    try:
        world.alerting.until_notified("ShoalNodeDown")
    finally:
        world.node.process.send_signal(signal.SIGCONT)
    world.alerting.until_notified("ShoalNodeDown", "resolved")


def test_a_process_that_stands_still_fires(world: World) -> None:
    world.node.kill("store-0", signal.SIGSTOP)
    try:
        world.alerting.until_notified("ShoalProcessDown")
    finally:
        world.node.kill("store-0", signal.SIGCONT)
    world.alerting.until_notified("ShoalProcessDown", "resolved")


def test_a_process_that_dies_again_and_again_fires(world: World) -> None:
    killed = [0]

    def kill() -> None:
        if (pid := world.node.pids()["store-0"]) != killed[0]:
            killed[0] = world.node.kill("store-0")
            assert killed[0] == pid

    world.alerting.until_notified("ShoalProcessFlapping", doing=kill)


def test_an_envoy_that_finds_no_coord_fires(world: World) -> None:
    # The node's etcd runs in the folder of its sockets.
    (Path(f"/proc/{world.node.pids()['etcd']}/cwd").readlink() / "coord-0.sock").unlink()
    world.node.kill("envoy")
    try:
        world.alerting.until_notified("ShoalEnvoyDisconnected")
    finally:
        # A new coord binds its socket again.
        world.node.kill("coord-0")


def test_an_envoy_that_refuses_its_listener_since_the_port_is_taken_fires(world: World) -> None:
    host, _, port = world.node.gateway.rpartition(":")
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        world.node.kill("envoy")
        until_s = time.monotonic() + 30
        while True:
            try:
                other.bind((host, int(port)))
                break
            except OSError:
                assert time.monotonic() < until_s, "the port is not free"
        other.listen()
        world.alerting.until_notified("ShoalEnvoyRefuses")
    world.node.kill("envoy")


def test_a_certificate_that_ends_in_five_days_fires(world: World) -> None:
    written(world.folder / "server", ca_in(world.folder), days=(-1, 5), names=("localhost",))
    world.alerting.until_notified("ShoalCertificateEnds")
    written(world.folder / "server", ca_in(world.folder), days=(-1, 90), names=("localhost",))


def test_an_event_loop_that_stalls_fires(world: World) -> None:
    def stall() -> None:
        world.node.kill("ingest-0", signal.SIGSTOP)
        time.sleep(0.5)
        world.node.kill("ingest-0", signal.SIGCONT)

    world.alerting.until_notified("ShoalEventLoopStalls", doing=stall)


def test_requests_that_fill_their_memory_fire(world: World) -> None:
    context = ssl.create_default_context(cafile=ca_in(world.folder).path)
    host, _, port = world.node.gateway.rpartition(":")
    with ExitStack() as stack:
        # One tenant gets no more than two thirds.
        for number, size in enumerate((4_000_000, 2_000_000, 1_000_000, 600_000, 300_000)):
            key = world.client.access.create_key(tenant=f"tenant-{number}", role="user")
            connection = stack.enter_context(socket.create_connection((host, int(port)), timeout=30))
            secure = stack.enter_context(context.wrap_socket(connection, server_hostname="localhost"))
            secure.sendall(
                f"POST /v2/models/double/infer HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {key.key}\r\n"
                f"content-type: application/json\r\ncontent-length: {size + 1}\r\n\r\n".encode()
            )
            secure.sendall(b" " * size)
        world.alerting.until_notified("ShoalMemoryNearLimit")


def test_a_process_that_has_nearly_all_its_files_open_fires(world: World) -> None:
    pid = world.node.pids()["store-0"]
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    open_files = len(os.listdir(f"/proc/{pid}/fd"))
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (int(open_files * 1.15), limits[1]))
    try:
        world.alerting.until_notified("ShoalFilesNearLimit")
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)


def test_a_model_that_does_not_load_fires(world: World, tmp_path: Path) -> None:
    world.client.models.push(python_model(tmp_path / "broken", "raise ValueError"), check=False, wait=False)
    world.alerting.until_notified("ShoalModelNotReady")
    world.client.models.remove("broken")


def test_jobs_that_wait_for_long_fire(world: World) -> None:
    jobs = [world.client.jobs.submit("busy", ROW) for _ in range(40)]
    world.alerting.until_notified("ShoalQueueOld")
    for job in jobs:
        with suppress(ShoalError):
            world.client.jobs.cancel(job.id)


def test_jobs_that_fail_fire(world: World) -> None:
    wrong = JobRequest("double", {"x": np.ones((1, 3), np.float32)})

    def submit() -> None:
        assert all(each.error is None for each in world.client.jobs.submit_many([wrong] * 20))

    world.alerting.until_notified("ShoalJobsFail", doing=submit)


def test_a_schedule_that_cannot_be_fired_fires(world: World) -> None:
    schedules = world.client.jobs.schedules
    schedules.put("hourly", "0 * * * *", JobRequest("double", ROW), misfire="latest")
    try:
        with world.refusing("schedules"):
            with MongoClient[dict[str, Any]](world.mongo.uri) as client:
                due = {"$set": {"next_at": datetime.now(UTC) - timedelta(seconds=1)}, "$inc": {"revision": 1}}
                schedule = client["shoal"]["schedules"].update_one(
                    {"name": "hourly"}, due, bypass_document_validation=True
                )
            assert schedule.modified_count == 1
            world.alerting.until_notified("ShoalScheduleMissed")
    finally:
        schedules.remove("hourly")


def test_an_audit_log_that_cannot_be_written_fires(world: World) -> None:
    def act() -> None:
        with suppress(ShoalError):
            world.client.access.create_key(tenant="nobody", role="user")

    with world.refusing("audit"):
        world.alerting.until_notified("ShoalAuditNotWritten", doing=act)


def test_a_connector_that_is_far_behind_its_source_fires(world: World) -> None:
    row = json.dumps({"x": [1, 0, 0, 0]}).encode()

    async def publish() -> None:
        await world.kafka.publish([row] * 12_000)
        # Tansu knows the end of a topic only by its last batch.
        await world.kafka.publish([row])

    asyncio.run(publish())
    world.alerting.until_notified("ShoalConnectorLags")
