"""Causes of findings on a real node: each is found, its command shows or mends it, and when it is mended nothing is."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import numpy as np
import pytest
from aetcd import rpc

from shoal.access.cluster import POLICY
from shoal.cli.diagnosis import checks
from shoal.cli.diagnosis.facts import Severity
from shoal.client import JobRequest
from shoal.node.folder import POLICY_COPY
from tests.node.conftest import python_model
from tests.node.doctor.conftest import Ward, miss

# A look at a node whose Envoy stands still waits for three timeouts.
pytestmark = [pytest.mark.node, pytest.mark.timeout(300), pytest.mark.usefixtures("well")]

SLEEPS = """
import os
import time

class Model:
    inputs = {{"x": ("FP32", [-1, 4])}}
    outputs = {{"y": ("FP32", [-1, 4])}}

    def predict(self, batch):
        while os.path.exists("{folder}/asleep"):
            time.sleep(0.05)
        return {{"y": batch["x"]}}
"""


def etcd_is_full(ward: Ward, is_full: bool) -> None:
    """Raise or disarm the alarm that etcd raises when it has no space left."""
    with grpc.insecure_channel(ward.node.etcd_address()) as channel:
        stub = rpc.MaintenanceStub(channel)
        alarm = {"alarm": rpc.AlarmType.NOSPACE}
        if is_full:
            stub.Alarm(rpc.AlarmRequest(action=rpc.AlarmRequest.ACTIVATE, **alarm))
            return
        for one in stub.Alarm(rpc.AlarmRequest()).alarms:
            stub.Alarm(rpc.AlarmRequest(action=rpc.AlarmRequest.DEACTIVATE, memberID=one.memberID, **alarm))


def test_two_coords_of_which_one_has_the_envoy_are_no_finding(ward: Ward) -> None:
    assert ward.page().most("shoal_coord_envoys", ("instance",)).values() != {1.0}
    for _ in range(20):
        assert ward.look() == []


def test_an_etcd_that_is_full_is_found_and_a_node_that_then_has_no_leader(ward: Ward) -> None:
    etcd_is_full(ward, True)
    try:
        finding = ward.until_found("etcd-refuses-writes")
        assert finding.severity is Severity.ERROR
        assert "no-leader" not in ward.checks()
        ward.until_alerted("ShoalEtcdRefusesWrites")
        # No coord gets a lease any more, so none is elected; and none is registered, so only metrics answer.
        for name in ("coord-0", "coord-1"):
            ward.node.kill(name)
        assert ward.until_found("no-leader").severity is Severity.ERROR
        ward.until_alerted("ShoalNoLeader")
        assert "no space" in ward.run(ward.until_found("no-leader"))
    finally:
        etcd_is_full(ward, False)


def test_an_etcd_that_stands_still_is_found(ward: Ward) -> None:
    ward.node.kill("etcd", signal.SIGSTOP)
    try:
        finding = ward.until_found("etcd-unreachable")
        assert "no-leader" not in ward.checks()
        ward.until_alerted("ShoalEtcdUnreachable")
        assert ward.run(finding)
    finally:
        ward.node.kill("etcd", signal.SIGCONT)


def test_an_envoy_that_stands_still_is_found(ward: Ward, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "ANSWER_S", 1.0)
    ward.node.kill("envoy", signal.SIGSTOP)
    try:
        # A service that stands still loses its lease, and its endpoint is taken away.
        ward.node.kill("store-0", signal.SIGSTOP)
        assert "has not answered a change" in ward.until_found("envoy-stale").what
        ward.until_alerted("ShoalEnvoyStale")
    finally:
        ward.node.kill("store-0", signal.SIGCONT)
        ward.node.kill("envoy", signal.SIGCONT)


def test_a_policy_that_etcd_has_lost_is_found_until_coord_can_read_its_copy(ward: Ward) -> None:
    async def lose() -> None:
        async with ward.etcd() as etcd:
            assert await etcd.delete(POLICY)

    copy = ward.node.data_dir / POLICY_COPY
    kept = copy.read_text()
    copy.write_text("no copy")
    try:
        asyncio.run(lose())
        finding = ward.until_found("policy-not-in-force")
        # The reason why calls have no answer is not seen from the gateway.
        assert "gateway-unreachable" in ward.checks()
        assert ward.run(finding)
    finally:
        copy.write_text(kept)


def test_a_clock_that_is_off_is_found_until_it_is_set_right(ward: Ward) -> None:
    try:
        ward.clock.write_text("90")
        assert "is 90.0 s ahead of MongoDB's, as store-0 sees it" in ward.until_found("clock").what
        ward.until_alerted("ShoalClockOff")
    finally:
        ward.clock.unlink()


def test_a_member_of_mongodb_that_does_not_answer_is_found(ward: Ward) -> None:
    ward.mongo.kill(1)
    try:
        finding = ward.until_found("mongodb-members-missing")
        assert finding.severity is Severity.WARNING
        assert ward.mongo.address(1) in finding.what
        ward.until_alerted("ShoalMongoMembersMissing")
        shown = os.popen(finding.command).read()
        assert re.search(rf'member="{ward.mongo.address(1)}".* 0(\.0)?$', shown, re.MULTILINE), shown
    finally:
        ward.mongo.bring_back(1)


def test_a_removal_that_waits_for_a_confirmation_is_found(ward: Ward) -> None:
    # The state that a jump of the clock by 40 days leaves, ten minutes after it. A new process reads it.
    with ward.database() as client:
        marks = client["shoal"]["removals"]
        before = {mark["_id"]: mark for mark in marks.find()}
        jump = {"at": datetime.now(UTC) - timedelta(days=40), "asked": "the rules of then"}
        try:
            marks.update_one({"_id": "results"}, {"$set": jump}, upsert=True)
            ward.node.wait_until_restarted("store-0", ward.node.kill("store-0"))
            finding = ward.until_found("removal-stopped")
            assert finding.what.startswith("results ")
            ward.until_alerted("ShoalRemovalStopped")
            ward.run(finding)
        finally:
            marks.replace_one({"_id": "results"}, before["results"], upsert=True)
            ward.node.kill("store-0")


def test_a_schedule_whose_last_jobs_failed_is_found_until_one_succeeds(ward: Ward) -> None:
    name, schedules = "hourly", ward.client.jobs.schedules
    wrong = JobRequest("double", {"x": np.ones((1, 3), np.float32)})
    schedules.put(name, "0 * * * *", wrong, misfire="all")
    try:
        # Two runs are due at once, as after a stop of the node.
        miss(ward, name, timedelta(hours=2))
        finding = ward.until_found("schedule-failing")
        assert "the last job of schedule hourly has failed, and " in finding.what
        assert "double" in ward.run(finding)
        right = JobRequest("double", {"x": np.ones((1, 4), np.float32)})
        # Other times: those that have fired keep their jobs, which failed.
        schedules.put(name, "30 * * * *", right, misfire="latest", replace=True)
        miss(ward, name, timedelta(seconds=1))
        ward.until_well()
    finally:
        schedules.remove(name)


def test_an_oplog_that_reaches_back_only_minutes_is_found(ward: Ward) -> None:
    with ward.database() as client:
        noise = client["noise"]["noise"]
        for _ in range(12):
            noise.insert_many([{"bytes": os.urandom(100_000)} for _ in range(10)])
        finding = ward.until_found("oplog-short")
        ward.until_alerted("ShoalOplogShort")
        assert "mongo_oplog_used" in os.popen(finding.command).read()
        # MongoDB's remedy.
        client.admin.command("replSetResizeOplog", 1, size=990.0)
        client.drop_database("noise")


def test_a_queue_whose_oldest_job_waits_is_found_until_it_is_empty(
    ward: Ward, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "QUEUE_AGE_S", 1.0)
    ward.client.models.push(python_model(tmp_path / "sleepy", SLEEPS.format(folder=tmp_path)))
    asleep = tmp_path / "asleep"
    asleep.touch()
    try:
        for _ in range(3):
            ward.client.jobs.submit("sleepy", {"x": np.ones((1, 4), np.float32)})
        finding = ward.until_found("queue-old")
        assert "of tenant local" in finding.what
        ward.run(finding)
        asleep.unlink()
        ward.until_well()
    finally:
        asleep.unlink(missing_ok=True)
        ward.client.models.remove("sleepy")
