"""`shoal doctor` on a real node: nothing is found on a healthy one, and a cause is found until its command has run."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator

import pytest

import shoal
from shoal.cli.diagnosis import checks, gather
from shoal.cli.diagnosis.facts import Finding
from shoal.discovery import running_nodes
from tests.breakable import until
from tests.node.conftest import Node


@pytest.fixture
def client(running: Node) -> Iterator[shoal.Client]:
    with shoal.Client(running.gateway) as made:
        yield made


def found(client: shoal.Client, running: Node) -> list[Finding]:
    [node] = running_nodes(running.environ)
    facts = gather.of_node(client, node)
    assert facts.unread == {}
    # Stalls, errors and the disk are the test machine's, and the folders' modes are pytest's.
    machine = {"event-loop-stalls", "errors-logged", "disk-full", "memory-low", "shared-memory-low", "file-limit"}
    return [finding for finding in checks.diagnose(facts) if finding.check not in machine]


def test_a_healthy_node_has_no_finding_twenty_times_in_a_row(client: shoal.Client, running: Node) -> None:
    for _ in range(20):
        assert found(client, running) == []


async def test_a_drained_instance_is_found_until_the_command_has_run(client: shoal.Client, running: Node) -> None:
    running.shoal("instances", "drain", "infer-1")
    await until(lambda: [one.check for one in found(client, running)] == ["instance-drained"], "the drain is found")
    [finding] = found(client, running)
    program, *args = shlex.split(finding.command)
    assert program == "shoal"
    running.shoal(*args)
    await until(lambda: found(client, running) == [], "the finding is gone")


async def test_an_open_folder_is_found_until_the_command_has_run(client: shoal.Client, running: Node) -> None:
    running.data_dir.chmod(0o755)
    [finding] = found(client, running)
    assert finding.check == "data-folder-open"
    assert os.system(finding.command) == 0
    assert found(client, running) == []
