"""`shoal logs --set-level` on a running node: for one process, for a logger, for a time."""

from __future__ import annotations

import asyncio
import json
import signal
from typing import Any

import grpc
import pytest

from mesh.rpc.channel import connect
from shoal.inference.v2 import inference_pb2 as pb
from shoal.inference.v2 import inference_pb2_grpc as rpc
from shoal.node import folder
from tests.breakable import until
from tests.node.conftest import Node

pytestmark = [pytest.mark.node, pytest.mark.timeout(240)]

WAIT_S = 60.0


def entries(node: Node, process: str, event: str) -> list[dict[str, Any]]:
    """The lines of an event in the log of a process, the oldest first."""
    lines = (node.data_dir / "logs" / f"{process}.log").read_text().splitlines()
    found = [json.loads(line) for line in lines if line.startswith("{")]
    return [line for line in found if line.get("event") == event]


def wait_for(node: Node, process: str, event: str, count: int) -> dict[str, Any]:
    """The last line of an event once there are `count` of them."""
    reached = lambda: len(entries(node, process, event)) >= count  # noqa: E731
    asyncio.run(until(reached, f"{count} lines {event} of {process}", WAIT_S))
    return entries(node, process, event)[-1]


def refuse(node: Node, process: str) -> None:
    """Have a process refuse a call, which it logs at DEBUG."""

    async def call() -> None:
        async with connect(f"unix:{folder.running_in(node.data_dir)}/{process}.sock") as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await rpc.GRPCInferenceServiceStub(channel).ModelMetadata(pb.ModelMetadataRequest(name="nothing"))
            assert caught.value.code() == grpc.StatusCode.NOT_FOUND

    asyncio.run(call())


def test_a_process_logs_from_another_level_until_it_is_reset(running: Node) -> None:
    before = len(entries(running, "infer-0", "call.refused"))
    restored = len(entries(running, "infer-0", "log_level.restored"))
    refuse(running, "infer-0")
    said = running.shoal("logs", "infer-0", "--set-level", "debug", "--for", "1h").stdout
    assert said.startswith("infer-0: everything is logged from DEBUG until ")
    line = wait_for(running, "infer-0", "log_level.set", 1)
    assert (line["target"], line["threshold"]) == ("everything", "DEBUG")
    refuse(running, "infer-1")
    refuse(running, "infer-0")
    assert wait_for(running, "infer-0", "call.refused", before + 1)["level"] == "DEBUG"
    # A line of gRPC for each call.
    assert "Loaded running loop" not in (running.data_dir / "logs" / "infer-0.log").read_text()
    said = running.shoal("logs", "infer", "--set-level", "default").stdout
    assert said == "infer-0, infer-1: everything is logged as configured again\n"
    assert wait_for(running, "infer-0", "log_level.restored", restored + 1)["threshold"] == "INFO"
    refuse(running, "infer-0")
    assert len(entries(running, "infer-0", "call.refused")) == before + 1
    assert not [line for line in entries(running, "infer-1", "call.refused") if line["level"] == "DEBUG"]


def test_a_level_of_one_logger_ends_by_itself_and_outlives_a_restart(running: Node) -> None:
    began, ended = (len(entries(running, "store-0", event)) for event in ("log_level.set", "log_level.restored"))
    running.shoal("logs", "store", "--set-level", "debug", "--logger", "mesh.rpc", "--for", "10s")
    assert wait_for(running, "store-0", "log_level.set", began + 1)["target"] == "mesh.rpc"
    assert wait_for(running, "store-0", "log_level.restored", ended + 1)["target"] == "mesh.rpc"
    running.shoal("logs", "store", "--set-level", "error", "--logger", "mesh.mongo", "--for", "1h")
    wait_for(running, "store-0", "log_level.set", began + 2)
    old = running.kill("store-0")
    running.wait_until_restarted("store-0", old)
    assert wait_for(running, "store-0", "log_level.set", began + 3)["target"] == "mesh.mongo"
    running.shoal("logs", "--set-level", "default")
    wait_for(running, "store-0", "log_level.restored", ended + 2)


def test_the_command_says_in_which_processes_the_level_is_in_force(running: Node) -> None:
    """A process that stands still is named, and takes the level when it runs again or is started again."""
    began = len(entries(running, "infer-1", "log_level.set"))
    running.kill("infer-1", signal.SIGSTOP)
    try:
        done = running.shoal("logs", "infer", "--set-level", "debug", "--for", "1h", check=False)
    finally:
        old = running.kill("infer-1")
    first, *others = done.stdout.splitlines()
    assert first.startswith("infer-0: everything is logged from DEBUG until "), done
    assert others == [
        "infer-1: not in force: it does not answer; it takes the level when it runs again",
        "        shoal logs infer-1 --level warning",
    ]
    assert done.returncode == 1
    running.wait_until_restarted("infer-1", old)
    wait_for(running, "infer-1", "log_level.set", began + 1)
    services = {name for name in running.pids() if name.partition("-")[0] in ("coord", "store", "infer", "ingest")}
    found = json.loads(running.shoal("logs", "--set-level", "default", "--json").stdout)
    assert (set(found["in_force"]), found["not_in_force"], found["until"]) == (services, [], None)


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (("envoy", "--set-level", "debug"), "only of coord, store, infer, ingest, not of envoy"),
        (("infer", "envoy", "--set-level", "debug"), "not of envoy"),
        (("--logger", "mesh.rpc"), "--logger is for --set-level"),
        (("infer", "--set-level", "debug", "--logger", "mesh.xsd.ads"), "there is no such module"),
        (("--set-level", "loud"), "expected one of debug, info, warning, error, default"),
        (("--set-level", "debug", "--for", "8d"), "at most 7d"),
        (("--set-level", "debug", "--for", "long"), "expected an age"),
    ],
)
def test_a_level_that_cannot_be_set_is_refused(running: Node, asked: tuple[str, ...], why: str) -> None:
    done = running.shoal("logs", *asked, check=False)
    assert done.returncode == 2
    assert why in done.stderr
