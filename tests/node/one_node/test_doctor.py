"""`shoal doctor` on a real node: nothing is found on a healthy one, and a cause is found until its command has run."""

from __future__ import annotations

import asyncio
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import shoal
from shoal.cli.diagnosis import checks, gather
from shoal.cli.diagnosis.facts import Finding
from shoal.discovery import running_nodes
from tests.breakable import PATIENCE_S, until
from tests.node.conftest import OF_THE_MACHINE, Node, python_model


@pytest.fixture
def client(running: Node, monkeypatch: pytest.MonkeyPatch) -> Iterator[shoal.Client]:
    """A client of the node, on which nothing is found: other modules kill."""
    # On a busy machine, an answer takes longer than doctor waits for it.
    monkeypatch.setattr(gather, "READ_S", PATIENCE_S)
    monkeypatch.setattr(gather, "PAGE_S", PATIENCE_S)
    with shoal.Client(running.gateway) as made:
        asyncio.run(until(lambda: found(made, running) == [], "nothing is found"))
        yield made


def found(client: shoal.Client, running: Node) -> list[Finding]:
    [node] = running_nodes(running.environ)
    facts = gather.of_node(client, node)
    assert facts.unread == {}
    # Other modules kill.
    others = {*OF_THE_MACHINE, "process-flapping"}
    return [finding for finding in checks.diagnose(facts) if finding.check not in others]


@pytest.fixture
def load(running: Node) -> Iterator[None]:
    """Requests and jobs, one after the other, of two callers."""
    is_over = threading.Event()

    def call(once: Callable[[shoal.Client], object]) -> None:
        with shoal.Client(running.gateway) as client:
            while not is_over.is_set():
                once(client)

    x = {"x": np.ones((8, 4), np.float32)}
    with ThreadPoolExecutor() as threads:
        calls = [
            threads.submit(call, lambda client: client.infer("double", x)),
            threads.submit(call, lambda client: client.jobs.result(client.jobs.submit("double", x).id)),
        ]
        yield
        is_over.set()
        for each in calls:
            each.result()


@pytest.mark.usefixtures("load")
def test_a_healthy_node_under_load_has_no_finding_twenty_times_in_a_row(client: shoal.Client, running: Node) -> None:
    for _ in range(20):
        assert found(client, running) == []


def test_from_another_machine_it_says_what_it_does_not_see(running: Node, tmp_path: Path) -> None:
    done = running.shoal("doctor", elsewhere=tmp_path)
    [counts, left_out, where] = done.stdout.splitlines()
    assert re.fullmatch(rf"{running.gateway}: \d+ of {len(checks.names())} checks, no findings", counts)
    assert left_out.startswith("not checked: ")
    assert {"envoy-disconnected", "process-ended", "disk-full", "endpoint-unhealthy"} <= {*re.split("[ ,:]+", left_out)}
    assert "on its own machine" in where
    done = running.shoal("doctor", "--json", elsewhere=tmp_path)
    assert "envoy-disconnected" in json.loads(done.stdout)["not_checked"]


async def test_a_drained_instance_is_found_until_the_command_has_run(client: shoal.Client, running: Node) -> None:
    running.shoal("instances", "drain", "infer-1")
    await until(lambda: [one.check for one in found(client, running)] == ["instance-drained"], "the drain is found")
    [finding] = found(client, running)
    running.typed(finding.command)
    await until(lambda: found(client, running) == [], "the finding is gone")


NOT_AT_1 = """
import os

class Model:
    inputs = outputs = {"x": ("FP32", [-1, 4])}

    def __init__(self):
        if os.environ["SHOAL_INFER_INSTANCE"] == "infer-1":
            raise RuntimeError("no device here")

    def predict(self, batch):
        return batch
"""


async def test_a_model_that_one_replica_lacks_is_found_until_it_is_removed(
    client: shoal.Client, running: Node, tmp_path: Path
) -> None:
    client.models.push(python_model(tmp_path / "picky", NOT_AT_1), check=False, wait=False)
    try:
        missing: list[Finding] = []

        def is_found() -> bool:
            missing[:] = [one for one in found(client, running) if one.check == "model-not-everywhere"]
            return bool(missing)

        await until(is_found, "the model is missing at one replica")
        assert missing[0].what == "model picky version 1 is not ready at local/infer-1"
        assert "no device here" in running.typed(missing[0].command)
    finally:
        client.models.remove("picky")
    await until(lambda: found(client, running) == [], "the finding is gone")


async def test_an_open_folder_is_found_until_the_command_has_run(client: shoal.Client, running: Node) -> None:
    running.data_dir.chmod(0o755)
    [finding] = found(client, running)
    assert finding.check == "data-folder-open"
    assert os.system(finding.command) == 0
    assert found(client, running) == []
