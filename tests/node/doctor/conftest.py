"""One node for all causes, on a MongoDB of two members: every part of it may be damaged, and is mended by the test."""

from __future__ import annotations

import asyncio
import os
import shlex
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from pymongo import MongoClient

import shoal
from mesh.cluster.etcd import Etcd
from shoal.cli import admin_page
from shoal.cli.diagnosis import checks, gather
from shoal.cli.diagnosis.facts import Finding
from shoal.cli.diagnosis.rates import Page
from shoal.discovery import running_nodes
from tests.alerting import Alerting, can_alert
from tests.breakable import until
from tests.chaos.replica_set import ReplicaSet
from tests.node.conftest import Node

# Stalls, errors and the disk are the test machine's, and the folders' modes are pytest's. The errors of causes stay in
# the logs for 15 minutes.
OF_THE_MACHINE = {
    *("event-loop-stalls", "errors-logged", "disk-full", "memory-low", "shared-memory-low", "file-limit"),
    *("process-flapping", "endpoint-failing"),
}
MEND_S = 90.0
# The clock of the store's process is set by a file: the real one cannot be set in a container.
CLOCK = """\
import sys
if any("services.store" in part for part in sys.orig_argv):
    import time
    real, path = time.time_ns, {path!r}
    def time_ns():
        try:
            with open(path) as file:
                return real() + int(float(file.read()) * 1e9)
        except (OSError, ValueError):
            return real()
    time.time_ns = time_ns
"""


@dataclass
class Ward:
    """The node, its MongoDB, and what `shoal doctor` finds."""

    node: Node
    mongo: ReplicaSet
    clock: Path
    """File with the seconds by which the store's clock is ahead; without it, the clock is right."""
    client: shoal.Client
    alerting: Alerting | None
    """Prometheus and Alertmanager as shipped, sixty times as fast; None: they are not installed."""

    def look(self, chosen: str = "") -> list[Finding]:
        """Return the findings now, without those of the machine."""
        [node] = running_nodes(self.node.environ)
        facts = gather.of_node(self.client, node, chosen)
        return [finding for finding in checks.diagnose(facts) if finding.check not in OF_THE_MACHINE]

    def checks(self) -> set[str]:
        return {finding.check for finding in self.look()}

    def page(self) -> Page:
        [node] = running_nodes(self.node.environ)
        return admin_page.metrics(node.admin, timeout_s=gather.PAGE_S)

    def until_found(self, check: str) -> Finding:
        """Wait until a check finds something, and return the finding."""
        found: list[Finding] = []

        def is_found() -> bool:
            found[:] = [finding for finding in self.look() if finding.check == check]
            return bool(found)

        asyncio.run(until(is_found, f"{check} is found", MEND_S, every_s=0.2))
        return found[0]

    def until_alerted(self, alert: str) -> None:
        """Wait until the webhook of Alertmanager gets an alert, where there is one."""
        if self.alerting is not None:
            self.alerting.until_notified(alert)

    def until_well(self) -> None:
        """Wait until nothing is found."""
        asyncio.run(until(lambda: not self.look(), "nothing is found", MEND_S, every_s=0.2))

    def run(self, finding: Finding) -> str:
        """Run the command of a finding as a user does, and return what it prints."""
        program, *args = shlex.split(finding.command)
        assert program == "shoal", finding.command
        return self.node.shoal(*args).stdout

    def etcd_address(self) -> str:
        """The address of the node's etcd: a socket in the folder in which it runs."""
        folder = Path(f"/proc/{self.node.pids()['etcd']}/cwd").readlink()
        return f"unix:{folder}/etcd:0"

    def etcd(self) -> Etcd:
        """A client of the node's etcd, to be entered."""
        return Etcd(self.etcd_address())

    def database(self) -> MongoClient[dict[str, object]]:
        return MongoClient(self.mongo.uri, tz_aware=True)


@pytest.fixture(scope="package")
def ward(tmp_path_factory: pytest.TempPathFactory, onnx_models: Path) -> Iterator[Ward]:
    """A node with authentication and two coords."""
    folder = tmp_path_factory.mktemp("ward")
    (folder / "site").mkdir()
    clock = folder / "clock"
    (folder / "site/sitecustomize.py").write_text(CLOCK.format(path=str(clock)))
    with ExitStack() as stack:
        mongo = stack.enter_context(ReplicaSet(folder, members=2, voters=1, oplog_mib=8))
        asyncio.run(mongo.until_ready())
        environ = {
            "PYTHONPATH": os.pathsep.join([str(folder / "site"), os.environ.get("PYTHONPATH", "")]),
            # A queue forms behind few jobs.
            "SHOAL_INGEST_MAX_IN_FLIGHT": "1",
        }
        node = Node(folder, "--auth", "--mongo", mongo.uri, "--replicas", "coord=2", env=environ)
        stack.callback(node.close)
        node.wait_until_ready()
        key = Path(node.document()["key_file"]).read_text().strip()
        client = stack.enter_context(shoal.Client(node.gateway, token=key))
        [pushed] = client.models.push(onnx_models / "double.onnx")
        assert pushed.ready
        alerting = None
        if can_alert():
            alerting = stack.enter_context(Alerting(folder, node.data_dir / "prometheus.json"))
        yield Ward(node, mongo, clock, client, alerting)
