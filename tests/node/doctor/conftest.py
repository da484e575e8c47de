"""One node for all causes, on a MongoDB of two members: every part of it may be damaged, and is mended by the test."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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
from tests.breakable import Process, until
from tests.chaos.replica_set import ReplicaSet
from tests.free_ports import free_port
from tests.node.conftest import Node
from tests.prometheus_binaries import find_binary

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
    prometheus: str | None
    """URL of a Prometheus that scrapes the node with the rules as shipped, sixty times as fast; None: there is none."""

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
        """Wait until an alert fires, where there is a Prometheus."""
        if self.prometheus is None:
            return
        asyncio.run(until(lambda: alert in firing(self.prometheus), f"{alert} fires", MEND_S, every_s=0.2))

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
        binary = find_binary("prometheus")
        prometheus = stack.enter_context(scraping(folder, node, binary)) if binary is not None else None
        yield Ward(node, mongo, clock, client, prometheus)


@contextmanager
def scraping(folder: Path, node: Node, binary: str) -> Iterator[str]:
    """Run a Prometheus with the rules as shipped, each time and window divided by 60; give its URL."""
    rules = Path("deploy/observability/alerts.yml").read_text()
    faster = re.sub(
        r"(for: |\[)(\d+)([mh])\b", lambda found: found[1] + found[2] + {"m": "s", "h": "m"}[found[3]], rules
    )
    (folder / "alerts.yml").write_text(faster.replace("awaited_seconds) > 30", "awaited_seconds) > 0.5"))
    target = {"files": [str(node.data_dir / "prometheus.json")]}
    # The page of the node waits 5 s for a process that stands still.
    config = {
        "global": {"scrape_interval": "6s", "scrape_timeout": "6s", "evaluation_interval": "1s"},
        "rule_files": ["alerts.yml"],
        "scrape_configs": [{"job_name": "shoal", "honor_labels": True, "file_sd_configs": [target]}],
    }
    # JSON is YAML.
    (folder / "prometheus.yml").write_text(json.dumps(config))
    address = f"127.0.0.1:{free_port()}"
    argv = [binary, f"--config.file={folder}/prometheus.yml"]
    argv += [f"--storage.tsdb.path={folder}/prometheus", f"--web.listen-address={address}"]
    with Process(argv, folder / "prometheus.log"):
        yield f"http://{address}"


def firing(prometheus: str | None) -> set[str]:
    """Return the names of the alerts that fire."""
    try:
        with urllib.request.urlopen(f"{prometheus}/api/v1/alerts", timeout=10) as response:
            alerts = json.load(response)["data"]["alerts"]
    except OSError:
        return set()
    return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}
