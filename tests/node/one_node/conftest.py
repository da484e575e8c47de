"""One node for all modules of this folder, since the start of a node takes 6 s of processor time."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

import shoal
from shoal.errors import ShoalError
from tests.breakable import until
from tests.node.conftest import Node

MODELS = {"double": (1,), "slow": (1,)}
READY_S = 60.0


@pytest.fixture(scope="package")
def one_node(tmp_path_factory: pytest.TempPathFactory, onnx_models: Path) -> Iterator[Node]:
    """A node with two infer replicas, and the models double and slow on it."""
    one = Node(tmp_path_factory.mktemp("node"), "--replicas", "infer=2")
    try:
        one.wait_until_ready()
        with shoal.Client(one.gateway) as client:
            for name in MODELS:
                [pushed] = client.models.push(onnx_models / f"{name}.onnx")
                assert pushed.ready
        yield one
    finally:
        one.close()


@pytest.fixture(scope="module")
def running(one_node: Node) -> Node:
    """The same node, with every process alive, and without the models of other modules."""
    with shoal.Client(one_node.gateway) as client:
        asyncio.run(until(lambda: is_whole(one_node, client), "every process of the node is ready", READY_S))
        for name in {version.name for version in client.models.list()} - MODELS.keys():
            client.models.remove(name)
        asyncio.run(until(lambda: serves(client, MODELS), f"both replicas serve only {sorted(MODELS)}", READY_S))
    return one_node


def is_whole(one: Node, client: shoal.Client) -> bool:
    """Return True when each service's process is registered as ready, under the pid that it has now."""
    try:
        status = client.status()
    except ShoalError:
        return False
    ready = {each.name.partition("/")[2]: each.pid for each in status.instances if each.state == "ready"}
    return not status.stale and ready == {name: pid for name, pid in one.pids().items() if "-" in name}


def serves(client: shoal.Client, models: dict[str, tuple[int, ...]]) -> bool:
    """Return True when each infer replica has exactly these versions of models."""
    return all(each.models == models for each in client.status().instances if each.service == "infer")
