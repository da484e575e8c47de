"""Causes in the processes, models and jobs of a real node, each mended; its command mends it or shows the cause."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from mesh.cluster.membership import Instance, State, encode
from shoal.cli import endpoints
from shoal.cli.diagnosis import checks, gather
from shoal.client import JobRequest, JobRetry
from shoal.errors import ResourceExhausted, ShoalError
from tests.breakable import until
from tests.node.conftest import python_model
from tests.node.doctor.conftest import Ward, miss

pytestmark = [pytest.mark.node, pytest.mark.timeout(300), pytest.mark.usefixtures("well")]

X = {"x": np.ones((1, 4), np.float32)}
LOADS = """
import logging
import os
import time

class Model:
    inputs = {{"x": ("FP32", [-1, 4])}}
    outputs = {{"y": ("FP32", [-1, 4])}}

    def __init__(self):
        while os.path.exists("{folder}/slow"):
            time.sleep(0.05)
        if os.path.exists("{folder}/broken"):
            raise RuntimeError("the weights of the policy are gone")

    def predict(self, batch):
        if os.path.exists("{folder}/failing"):
            logging.error("a row that cannot be computed")
            raise RuntimeError
        return {{"y": batch["x"]}}
"""


def test_instances_that_envoy_refuses_or_cannot_reach_are_found(ward: Ward) -> None:
    unreached = Instance("infer", "local", "infer-8", "unix:/nowhere/infer-0.sock", 1, State.READY, time.time())
    # A path of a socket is at most 107 bytes long.
    refused = Instance("store", "local", "store-8", f"unix:/refused{'x' * 200}", 1, State.READY, time.time())

    async def register(*instances: Instance) -> None:
        async with ward.etcd() as etcd:
            for each in instances:
                await etcd.put(each.key, encode(each))

    async def remove(*instances: Instance) -> None:
        async with ward.etcd() as etcd:
            for each in instances:
                await etcd.delete(each.key)

    asyncio.run(register(unreached, refused))
    try:
        assert ward.run(ward.until_found("endpoint-unhealthy"))
        finding = ward.until_found("configuration-refused")
        assert "ClusterLoadAssignment" in finding.what
        assert "rejected a ClusterLoadAssignment" in ward.run(finding)
    finally:
        asyncio.run(remove(unreached, refused))


def test_a_service_that_stands_still_is_found(ward: Ward, monkeypatch: pytest.MonkeyPatch) -> None:
    # Each look waits for its answers.
    monkeypatch.setattr(gather, "READ_S", 1.0)
    page_s = gather.PAGE_S
    monkeypatch.setattr(gather, "PAGE_S", 1.0)
    pid = ward.node.kill("store-0", signal.SIGSTOP)
    try:
        assert ward.run(ward.until_found("service-missing"))
        assert ward.run(ward.until_found("part-unreadable", "models"))
        monkeypatch.setattr(gather, "PAGE_S", page_s)
        monkeypatch.setattr(checks, "BEGINS_S", 0.0)
        finding = ward.until_found("process-silent")
        assert (finding.what.split()[0], finding.command) == ("store-0", f"kill -CONT {pid}")
        assert os.system(finding.command) == 0
    finally:
        ward.node.kill("store-0", signal.SIGCONT)
    ward.until_well()
    monkeypatch.setattr(checks, "LONG_STALLS", 1)
    assert "stalled for" in ward.run(ward.until_found("event-loop-stalls"))


def test_an_envoy_that_cannot_start_is_found(ward: Ward, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "READ_S", 1.0)
    file = ward.node.data_dir / "envoy.json"
    kept = file.read_text()
    file.write_text("{")
    try:
        ward.node.kill("envoy")
        assert ward.run(ward.until_found("process-ended"))
        assert "Unable to parse" in ward.run(ward.until_found("gateway-unreachable"))
        assert ward.run(ward.until_found("envoy-disconnected"))
    finally:
        file.write_text(kept)


def test_a_launcher_that_stands_still_is_found_until_the_command_has_run(
    ward: Ward, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gather, "PAGE_S", 2.0)
    monkeypatch.setattr(endpoints, "TIMEOUT_S", 2.0)
    ward.node.process.send_signal(signal.SIGSTOP)
    try:
        assert os.system(ward.until_found("admin-unreachable").command) == 0
        ward.until_well()
    finally:
        ward.node.process.send_signal(signal.SIGCONT)


def test_a_service_of_another_version_and_one_that_starts_again_and_again_are_found(
    ward: Ward, monkeypatch: pytest.MonkeyPatch
) -> None:
    def restart() -> None:
        ward.node.wait_until_restarted("store-0", ward.node.kill("store-0"))

    ward.version.touch()
    try:
        restart()
        finding = ward.until_found("mixed-versions")
        assert "1 of 0.0.9" in finding.what
        assert '"0.0.9"' in ward.run(finding)
    finally:
        ward.version.unlink()
        restart()
    finding = ward.until_found("process-flapping")
    assert finding.what.startswith("store-0 has started ")
    ward.run(finding)
    ward.until_well()
    monkeypatch.setattr(gather, "__version__", "0.0.8")
    assert "this command is of version 0.0.8" in ward.until_found("other-version").what
    monkeypatch.undo()


def test_a_process_that_may_open_few_files_is_found(ward: Ward) -> None:
    pid = ward.node.pids()["store-0"]
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (1_024, before[1]))
    try:
        assert "store-0 may open 1024 files" in ward.until_found("file-limit").what
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
    assert "file-limit" not in {finding.check for finding in ward.look_at_all()}


# The test must not run across one of its own times, as it did with those of each hour.
YEARLY = "30 4 1 1 *"


def test_a_schedule_whose_times_pass_is_found_until_one_gets_a_job(ward: Ward) -> None:
    schedules, tenants = ward.client.jobs.schedules, ward.client.tenants
    try:
        schedules.put("skipping", YEARLY, JobRequest("double", X))
        miss(ward, "skipping", timedelta(minutes=2))
        assert "no leader ran at 20" in ward.run(ward.until_found("schedule-skipped", "has made no job"))
        miss(ward, "skipping", timedelta(seconds=1))
        ward.until_well()
        # The tenant's queue takes no job.
        tenants.set("local", max_pending=1)
        waiting = []
        with contextlib.suppress(ResourceExhausted):
            while True:
                waiting.append(ward.client.jobs.submit("double", X, delay=600).id)
        schedules.put("waiting", YEARLY, JobRequest("double", X), misfire="latest")
        miss(ward, "waiting", timedelta(minutes=2))
        finding = ward.until_found("schedule-skipped", "has missed its time")
        # The first failure is logged.
        asyncio.run(until(lambda: "cannot fire schedule" in ward.run(finding), "the cause is logged", every_s=1.0))
        for id in waiting:
            ward.client.jobs.cancel(id)
        ward.until_well()
    finally:
        tenants.set("local", inherit=["max_pending"])
        for each in schedules.list():
            schedules.remove(each.name)


def test_a_model_that_fails_and_then_does_not_load_is_found_until_it_is_removed(
    ward: Ward, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "STARTING", timedelta(seconds=1))
    ward.client.models.push(python_model(tmp_path / "fails", LOADS.format(folder=tmp_path)), check=False)
    try:
        (tmp_path / "failing").touch()
        ward.client.jobs.submit("fails", X, retry=JobRetry(max_attempts=1))
        assert "fails" in ward.run(ward.until_found("dead-letters"))
        ward.client.jobs.dead.purge(all=True)
        ward.until_well()

        is_over = threading.Event()

        def call() -> None:
            while not is_over.is_set():
                with contextlib.suppress(ShoalError):
                    ward.client.infer("fails", X)

        with ThreadPoolExecutor() as threads:
            calls = threads.submit(call)
            try:
                finding = ward.until_found("endpoint-failing")
                assert "infer-0.sock" in finding.what
                assert "cannot be computed" in ward.run(finding)
                assert "cannot be computed" in ward.run(ward.until_found("errors-logged"))
            finally:
                is_over.set()
            calls.result()

        (tmp_path / "slow").touch()
        (tmp_path / "broken").touch()
        ward.node.wait_until_restarted("infer-0", ward.node.kill("infer-0"))
        assert ward.run(ward.until_found("instance-starting"))
        (tmp_path / "slow").unlink()
        assert "the weights of the policy are gone" in ward.run(ward.until_found("model-unavailable"))
    finally:
        ward.client.models.remove("fails")
