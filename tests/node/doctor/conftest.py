"""One node for all causes, on a MongoDB of two members: every part of it may be damaged, and is mended by the test."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from pymongo import MongoClient

import shoal
from mesh.cluster.etcd import Etcd
from mesh.process.files import write_atomically
from shoal.cli import admin_page
from shoal.cli.diagnosis import checks, gather
from shoal.cli.diagnosis.facts import Finding
from shoal.discovery import running_nodes
from shoal.node.tls import own_ca
from shoal.rates import Page
from tests.alerting import Alerting, can_alert
from tests.breakable import until
from tests.chaos.replica_set import ReplicaSet
from tests.node.conftest import OF_THE_MACHINE, Node

# Of the causes that are mended, starts stay in the logs for 15 minutes, and failures in Envoy's counts.
OF_FORMER_CAUSES = {"process-flapping", "endpoint-failing"}
MEND_S = 90.0
# Between two looks, each of which calls the gateway and reads all metrics.
EVERY_S = 0.5
# The clock and the version of the store's process are set by files: the real clock cannot be set in a container. The
# launcher looks at its certificate and its key all the time. The coords let addresses below /refused pass, of which
# Envoy would refuse the long ones.
SITE = """\
import sys
if "services.store" in sys.orig_argv:
    import os, time
    real, path = time.time_ns, {clock!r}
    def time_ns():
        try:
            with open(path) as file:
                return real() + int(float(file.read()) * 1e9)
        except (OSError, ValueError):
            return real()
    time.time_ns = time_ns
    if os.path.exists({version!r}):
        import shoal
        shoal.__version__ = "0.0.9"
if "services.coord" in sys.orig_argv:
    from mesh.xds import snapshot
    is_address = snapshot._is_address
    snapshot._is_address = lambda text: text.startswith("unix:/refused") or is_address(text)
if sys.orig_argv[2:4] == ["shoal.cli.main", "up"]:
    from shoal.node import admin_key
    from shoal.node.tls import served
    admin_key.CHECK_S = served.CHECK_S = 0.2
"""


@dataclass
class Ward:
    """The node, its MongoDB, and what `shoal doctor` finds."""

    node: Node
    mongo: ReplicaSet
    clock: Path
    """File with the seconds by which the store's clock is ahead; without it, the clock is right."""
    version: Path
    """File that makes the next process of store one of another version."""
    tls: Path
    """Folder with the gateway's certificate, and its issuer."""
    client: shoal.Client
    alerting: Alerting | None
    """Prometheus and Alertmanager as shipped, sixty times as fast; None: they are not installed."""

    def look_at_all(self) -> list[Finding]:
        """Return the findings now."""
        [node] = running_nodes(self.node.environ)
        return checks.diagnose(gather.of_node(self.client, node))

    def look(self) -> list[Finding]:
        """Return the findings now, without those of the machine and of former causes."""
        return [each for each in self.look_at_all() if each.check not in OF_THE_MACHINE | OF_FORMER_CAUSES]

    def checks(self) -> set[str]:
        return {finding.check for finding in self.look()}

    def page(self) -> Page:
        [node] = running_nodes(self.node.environ)
        return admin_page.metrics(node.admin, timeout_s=gather.PAGE_S)

    def until_found(self, check: str, text: str = "") -> Finding:
        """Wait until a check finds something whose description has a text, and return the finding."""
        found: list[Finding] = []

        def is_found() -> bool:
            found[:] = [one for one in self.look_at_all() if one.check == check and text in one.what]
            return bool(found)

        asyncio.run(until(is_found, f"{check} is found", MEND_S, EVERY_S))
        return found[0]

    def until_alerted(self, alert: str) -> None:
        """Wait until the webhook of Alertmanager gets an alert, where there is one."""
        if self.alerting is not None:
            self.alerting.until_notified(alert)

    def until_well(self) -> None:
        """Wait until nothing is found."""
        asyncio.run(until(lambda: not self.look(), "nothing is found", MEND_S, EVERY_S))

    def run(self, finding: Finding) -> str:
        """Run the command of a finding as a user does, and return what it prints."""
        return self.node.typed(finding.command)

    def etcd(self) -> Etcd:
        """A client of the node's etcd, to be entered."""
        return Etcd(self.node.etcd_address())

    def database(self) -> MongoClient[dict[str, object]]:
        return MongoClient(self.mongo.uri, tz_aware=True)


def write_certificate(folder: Path, days: int) -> None:
    """Write a certificate of 90 days for the gateway that ends in `days`, and its key."""
    now = datetime.now(UTC)
    issued = own_ca.open_ca(folder, now).issue(["127.0.0.1"], now - timedelta(days=own_ca.LEAF_DAYS - days))
    write_atomically(folder / "key.pem", issued.key, is_private=True)
    write_atomically(folder / "cert.pem", issued.chain)


@pytest.fixture
def well(ward: Ward) -> Iterator[None]:
    """The test begins and ends on a node without a finding."""
    ward.until_well()
    if ward.alerting is not None:
        ward.alerting.notified.clear()
    yield
    ward.until_well()


@pytest.fixture(scope="package")
def ward(tmp_path_factory: pytest.TempPathFactory, onnx_models: Path) -> Iterator[Ward]:
    """A node with authentication, a certificate and two coords."""
    folder = tmp_path_factory.mktemp("ward")
    (folder / "site").mkdir()
    clock, version = folder / "clock", folder / "version"
    (folder / "site/sitecustomize.py").write_text(SITE.format(clock=str(clock), version=str(version)))
    (folder / own_ca.FOLDER).mkdir(mode=0o700)
    own_ca._make(folder / own_ca.FOLDER, datetime.now(UTC) - timedelta(days=own_ca.LEAF_DAYS))
    write_certificate(folder, own_ca.LEAF_DAYS)
    with ExitStack() as stack:
        mongo = stack.enter_context(ReplicaSet(folder, members=2, voters=1, oplog_mib=8))
        asyncio.run(mongo.until_ready())
        environ = {
            "PYTHONPATH": os.pathsep.join([str(folder / "site"), os.environ.get("PYTHONPATH", "")]),
            # A queue forms behind few jobs.
            "SHOAL_INGEST_MAX_IN_FLIGHT": "1",
            "SHOAL_COORD_ISSUER_REFRESH_MS": "1000",
        }
        tls = ("--tls-cert", f"{folder}/cert.pem", "--tls-key", f"{folder}/key.pem")
        node = Node(folder, "--auth", *tls, "--mongo", mongo.uri, "--replicas", "coord=2", env=environ)
        stack.callback(node.close)
        node.wait_until_ready()
        key = Path(node.document()["key_file"]).read_text().strip()
        client = stack.enter_context(shoal.Client(f"https://{node.gateway}", ca=f"{folder}/ca/ca.pem", token=key))
        [pushed] = client.models.push(onnx_models / "double.onnx")
        assert pushed.ready
        alerting = None
        if can_alert():
            alerting = stack.enter_context(Alerting(folder, node.data_dir / "prometheus.json"))
        yield Ward(node, mongo, clock, version, folder, client, alerting)


def miss(ward: Ward, schedule: str, by: timedelta) -> None:
    """Set the next time of a schedule back, as if the node had not run since then."""
    with ward.database() as client:
        changed = client["shoal"]["schedules"].update_one(
            {"name": schedule}, {"$set": {"next_at": datetime.now(UTC) - by}, "$inc": {"revision": 1}}
        )
        assert changed.modified_count == 1
