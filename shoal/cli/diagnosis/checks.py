"""Checks of a node. Each is a pure function of the facts, and returns its findings; a healthy node has none."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from shlex import quote
from typing import TypeAlias

from shoal.cli.diagnosis.facts import Facts, Finding, LocalFacts, Severity
from shoal.cli.endpoints import Endpoint
from shoal.client import Connector, InstanceState, Job, KeyInfo, Schedule
from shoal.rates import INSTANCE, Page

Check: TypeAlias = Callable[[Facts], Iterator[Finding]]

LOG_WINDOW = timedelta(minutes=15)
"""Age of the log entries that the checks count."""
STARTING = timedelta(minutes=2)
"""Time after which an instance should be ready, with its models loaded and warm."""
BEGINS_S = 30.0
"""Time after which a process should answer, on a slow machine too."""
RESTARTS = 3
"""Starts of one process within LOG_WINDOW that make it a flapping one."""
STALLS = 20
STALL_MS = 1_000
"""A process with more stalls than STALLS within LOG_WINDOW, or 5 of STALL_MS and more, delays its callers."""
LONG_STALLS = 5
ERRORS = 20
"""Errors of one process within LOG_WINDOW that are worth a look."""
DEAD_LETTERS_AGE = timedelta(hours=1)
FAILED_SHARE = 0.05
REQUESTS = 100
"""Requests of an endpoint from which its share of failures is judged."""
DISK_REFUSES_BYTES = 512 << 20
"""Free space below which submits are refused (docs/running.md)."""
DISK_LOW_BYTES = 2 << 30
DISK_LOW_SHARE = 0.05
INODES_LOW_SHARE = 0.05
FILES_USED_SHARE = 0.8
FILE_LIMIT = 4_096
"""Open files that a process should be allowed: each connection is one."""
MEMORY_LOW_SHARE = 0.05
MEMORY_NEAR_SHARE = 0.9
"""Share of the limit of requests or unread responses, as in the alert ShoalMemoryNearLimit."""
SHM_LOW_BYTES = 64 << 20
ANSWER_S = 30.0
"""Time in which an Envoy answers a change of its configuration: it takes milliseconds."""
CLOCK_S = 1.0
QUEUE_AGE_S = 300.0
LAG_MESSAGES = 1_000
"""Messages, beside those in flight, from which a connector is far behind its source."""
LAG_S = 60.0
"""The same as time, for sources that count no messages."""
LAG_WATCH_S = 8.0
"""Time between two readings of a connector that is far behind: it reports every 2 s."""
CATCH_UP_S = 600.0
"""A connector that will have caught up within this time, as fast as it is now, is a healthy one."""
FAILED_RUNS = 2
"""Failed jobs of a schedule, the last one among them, that make the schedule a failing one."""
OPLOG_FULL = 0.9
"""Share of the oplog's size from which MongoDB removes its oldest entries."""
OPLOG_SHORT_S = 300.0
UNLOADED = "unloaded"
"""Reason of a version that is left out on purpose."""
CA_ENDS = timedelta(days=180)
"""Clients are given another CA by hand."""
KEYS_END = timedelta(days=14)
CERTIFICATE_SHARE = 0.25
CERTIFICATE_ENDS = timedelta(days=30)
"""Time or share of a certificate's life, whichever is shorter, that should be left."""

# Time in the reason for which a schedule skipped it.
_SKIPPED_AT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")

_CHECKS: dict[str, Check] = {}
_NEEDS: dict[str, str] = {}


def _check(name: str, needs: str = "") -> Callable[[Check], Check]:
    """Register a check. `needs` names the parts of the facts of which it needs one (`status or page`)."""

    def add(function: Check) -> Check:
        _CHECKS[name] = function
        _NEEDS[name] = needs
        return function

    return add


def diagnose(facts: Facts) -> list[Finding]:
    """Return the findings of all checks, the most severe first."""
    found = [finding for check in _CHECKS.values() for finding in check(facts)]
    addressed = [replace(finding, command=_addressed(finding.command, facts)) for finding in found]
    return sorted(addressed, key=lambda finding: -finding.severity)


def skipped(facts: Facts) -> list[str]:
    """Return the names of the checks that these facts are not enough for."""
    return [
        name
        for name, needs in _NEEDS.items()
        if needs and all(getattr(facts, part) is None for part in needs.split(" or "))
    ]


def _addressed(command: str, facts: Facts) -> str:
    """Return a command for the node that was looked at, where the command would find another one or none."""
    local = facts.local
    if command.startswith(("shoal up", "shoal logs")):
        is_needed = local is not None and (command.startswith("shoal up") or facts.chosen or not local.launcher_alive)
        return f"{command} --data-dir {quote(str(local.data_dir))}" if local is not None and is_needed else command
    takes_gateway = command.startswith("shoal ") and command != "shoal --version"
    return f"{command} --gateway {quote(facts.chosen)}" if takes_gateway and facts.chosen else command


def names() -> list[str]:
    """Return the names of all checks."""
    return list(_CHECKS)


def _error(check: str, what: str, command: str) -> Finding:
    return Finding(check, Severity.ERROR, what, command)


def _warning(check: str, what: str, command: str) -> Finding:
    return Finding(check, Severity.WARNING, what, command)


# Reachability.


@_check("node-down", "local")
def _node_down(facts: Facts) -> Iterator[Finding]:
    local = facts.local
    if local is not None and not local.launcher_alive:
        yield _error("node-down", f"no node runs on {local.data_dir}", "shoal up")


@_check("leftover-processes", "local")
def _leftover_processes(facts: Facts) -> Iterator[Finding]:
    local = facts.local
    if local is not None and local.leftovers:
        pids = " ".join(one.rpartition(" ")[2] for one in local.leftovers)
        what = f"processes of a node that has ended still run: {', '.join(local.leftovers)}"
        yield _error("leftover-processes", what, f"kill {pids}")


@_check("port-taken", "local")
def _port_taken(facts: Facts) -> Iterator[Finding]:
    for port, holder in (facts.local.holders if facts.local else {}).items():
        what = f"port {port} of the node, which does not run, is in use by {holder}"
        yield _error("port-taken", what, "shoal up --gateway-port 0 --admin-port 0")


@_check("gateway-unreachable")
def _gateway_unreachable(facts: Facts) -> Iterator[Finding]:
    if facts.status is None and "status" in facts.unread:
        yield _error(
            "gateway-unreachable",
            f"no service answers at {facts.gateway}: {facts.unread['status']}",
            "shoal logs envoy coord --level warning",
        )


@_check("part-unreadable", "status")
def _part_unreadable(facts: Facts) -> Iterator[Finding]:
    for problem in facts.status.problems if facts.status else ():
        # These have findings of their own.
        if not (problem.startswith("leader: ") and (_has_no_leader(facts) or _is_stale(facts))):
            yield _error("part-unreadable", problem, "shoal logs --level warning --since 15m")


@_check("admin-unreachable")
def _admin_unreachable(facts: Facts) -> Iterator[Finding]:
    if facts.status is not None and "endpoints" in facts.unread and facts.local is not None:
        pid = facts.local.launcher_pid
        what = f"{facts.unread['endpoints']}: `shoal up` (pid {pid}) stands still, as after Ctrl-Z"
        yield _warning("admin-unreachable", what, f"kill -CONT {pid}")


# Coordination and the mesh.


@_check("etcd-unreachable", "status or page")
def _etcd_unreachable(facts: Facts) -> Iterator[Finding]:
    if _is_stale(facts):
        what = "etcd cannot be reached: no change of instances, policy or leader takes effect"
        yield _error("etcd-unreachable", what, "shoal logs etcd coord --level warning")


def _is_stale(facts: Facts) -> bool:
    """Return True when a coord goes by the last view of etcd that it knows."""
    told = facts.page is not None and facts.page.sum("shoal_coord_view_stale") > 0
    return told or (facts.status is not None and facts.status.stale)


def _has_no_leader(facts: Facts) -> bool:
    """Return True when coord answers, and knows of no leader. With instances lost, too, only its metrics answer."""
    if facts.page is not None and facts.page.has("shoal_coord_leader"):
        return facts.page.sum("shoal_coord_leader") == 0
    problems = () if facts.status is None else facts.status.problems
    return any(problem.startswith("leader: ") and "no leader" in problem for problem in problems)


@_check("no-leader", "status or page")
def _no_leader(facts: Facts) -> Iterator[Finding]:
    if _has_no_leader(facts) and not _is_stale(facts):
        what = "no instance of coord leads: policies, drains and keys of issuers stand still"
        yield _error("no-leader", what, "shoal logs coord etcd --level warning")


@_check("etcd-refuses-writes", "page")
def _etcd_refuses_writes(facts: Facts) -> Iterator[Finding]:
    for (alarm,), raised in facts.page.most("shoal_coord_etcd_alarm", ("alarm",)).items() if facts.page else ():
        if raised:
            what = f"etcd has raised the alarm {alarm}: it refuses writes, and nothing can register or change"
            etcdctl = f"etcdctl --endpoints {facts.local.etcd if facts.local and facts.local.etcd else 'HOST:2379'}"
            yield _error("etcd-refuses-writes", what, f"{etcdctl} defrag && {etcdctl} alarm disarm")


@_check("envoy-disconnected", "page")
def _envoy_disconnected(facts: Facts) -> Iterator[Finding]:
    # Each coord knows the Envoys with a stream to itself, and each Envoy has one stream.
    if facts.page is not None and facts.page.has("shoal_coord_envoys") and not facts.page.sum("shoal_coord_envoys"):
        what = "no Envoy has a configuration stream to coord: its routes and endpoints are old"
        yield _error("envoy-disconnected", what, "shoal logs envoy coord --level warning")


@_check("envoy-stale", "page")
def _envoy_stale(facts: Facts) -> Iterator[Finding]:
    for (node,), waited in facts.page.most("shoal_coord_xds_awaited_seconds", ("node",)).items() if facts.page else ():
        if waited > ANSWER_S:
            what = f"the Envoy of node {node} has not answered a change of its configuration for {waited:.0f} s"
            yield _error("envoy-stale", what, "shoal logs envoy coord --level warning")


@_check("configuration-refused", "status or page")
def _configuration_refused(facts: Facts) -> Iterator[Finding]:
    # The coord that answered knows Envoy's error; the metrics have the Envoys of the others.
    told = {
        (envoy.node, resource.type): f": {resource.nack}"
        for envoy in (facts.status.envoys if facts.status else ())
        for resource in envoy.refused
    }
    found = facts.page.most("shoal_coord_xds_refused", ("node", "type")) if facts.page else {}
    for node, type in sorted({*told, *((node, type) for (node, type), refused in found.items() if refused)}):
        what = f"the Envoy of node {node} has refused its {type}, and keeps the former one{told.get((node, type), '')}"
        yield _error("configuration-refused", what, "shoal logs coord --contains rejected")


@_check("endpoint-unhealthy", "endpoints")
def _endpoint_unhealthy(facts: Facts) -> Iterator[Finding]:
    for endpoint in facts.endpoints or ():
        # A drained instance has a finding of its own, and one that stops is none.
        if not endpoint.healthy and "draining" not in endpoint.health:
            what = f"Envoy sends nothing to {endpoint.address} of {endpoint.cluster}: {endpoint.health}"
            yield _error("endpoint-unhealthy", what, f"shoal logs {_process_of(endpoint.address)}".rstrip())


def fails_often(endpoint: Endpoint) -> bool:
    """Return True when a large share of an endpoint's requests since Envoy's start has failed."""
    return endpoint.total_requests >= REQUESTS and endpoint.failed_requests / endpoint.total_requests > FAILED_SHARE


@_check("endpoint-failing", "endpoints")
def _endpoint_failing(facts: Facts) -> Iterator[Finding]:
    earlier = {(one.cluster, one.address): one.failed_requests for one in facts.earlier_endpoints or ()}
    for endpoint in facts.endpoints or ():
        total, failed = endpoint.total_requests, endpoint.failed_requests
        key = (endpoint.cluster, endpoint.address)
        if fails_often(endpoint) and key in earlier and failed > earlier[key]:
            counts, now = f"{failed} of {total} requests", failed - earlier[key]
            what = f"{counts} to {endpoint.address} of {endpoint.cluster} have failed, {now} of them now"
            command = f"shoal logs {_process_of(endpoint.address)} --level warning"
            yield _warning("endpoint-failing", what, command)


def _process_of(address: str) -> str:
    return address.rpartition("/")[2].removesuffix(".sock") if address.startswith("unix:") else ""


# Instances.


@_check("service-missing", "local")
def _service_missing(facts: Facts) -> Iterator[Finding]:
    if facts.status is None or not facts.status.instances:
        return
    present = {instance.service for instance in facts.status.instances if instance.state is not InstanceState.DRAINING}
    for process in facts.local.processes if facts.local else ():
        service = process.name.rpartition("-")[0]
        if service and service not in present:
            present.add(service)
            # One that stands still has logged no warning.
            what = f"{service} has no instance that takes calls"
            yield _error("service-missing", what, f"shoal logs {service}")


@_check("instance-starting", "status")
def _instance_starting(facts: Facts) -> Iterator[Finding]:
    for instance in facts.status.instances if facts.status else ():
        if instance.state is InstanceState.STARTING and instance.started_at is not None:
            waited = facts.now - instance.started_at
            if waited > STARTING:
                what = f"{instance.name} has been starting for {waited.total_seconds():.0f} s"
                yield _error("instance-starting", what, f"shoal logs {instance.name.rpartition('/')[2]}")


@_check("instance-drained", "status")
def _instance_drained(facts: Facts) -> Iterator[Finding]:
    for instance in facts.status.instances if facts.status else ():
        if instance.drained_by_operator:
            what = f"an operator has taken {instance.name} out of traffic"
            yield _warning("instance-drained", what, f"shoal instances undrain {instance.name}")


@_check("process-ended", "local")
def _process_ended(facts: Facts) -> Iterator[Finding]:
    local = facts.local
    for process in local.processes if local is not None and local.launcher_alive else ():
        if not process.is_alive:
            what = f"{process.name} (pid {process.pid}) does not run"
            yield _error("process-ended", what, f"shoal logs {process.name}")


def silent_processes(page: Page) -> list[str]:
    """Return the services' processes that have not answered the reader of the page."""
    up = page.by("shoal_process_up", INSTANCE)
    # Envoy, etcd and mongod have checks of their own.
    return sorted(name for (name,), is_up in up.items() if not is_up and "-" in name)


@_check("process-silent", "page")
def _process_silent(facts: Facts) -> Iterator[Finding]:
    silent = silent_processes(facts.page) if facts.page is not None else []
    for process in facts.local.processes if facts.local is not None and silent else ():
        if process.name in silent and process.is_alive and process.age_s > BEGINS_S:
            how = "is stopped, as by SIGSTOP" if process.is_stopped else "runs, and is started again when it is killed"
            what = f"{process.name} (pid {process.pid}) does not answer: it {how}"
            yield _error("process-silent", what, f"kill -{'CONT' if process.is_stopped else 'KILL'} {process.pid}")


@_check("process-flapping", "local")
def _process_flapping(facts: Facts) -> Iterator[Finding]:
    for process, starts in (facts.local.logs.starts if facts.local else {}).items():
        if starts >= RESTARTS:
            what = f"{process} has started {starts} times in {_minutes()}"
            yield _error("process-flapping", what, f"shoal logs {process} --level error")


@_check("mixed-versions", "status")
def _mixed_versions(facts: Facts) -> Iterator[Finding]:
    versions = Counter(instance.version for instance in facts.status.instances) if facts.status else Counter()
    if len(versions) > 1:
        counted = ", ".join(f"{count} of {version}" for version, count in sorted(versions.items()))
        yield _warning("mixed-versions", f"instances of several versions run: {counted}", "shoal status --json")


@_check("other-version", "status")
def _other_version(facts: Facts) -> Iterator[Finding]:
    versions = {instance.version for instance in facts.status.instances} if facts.status else set()
    if len(versions) == 1 and facts.version not in versions:
        what = f"this command is of version {facts.version}, and the node of {versions.pop()}"
        yield _warning("other-version", what, "shoal --version")


# Models.


@_check("model-unavailable", "index")
def _model_unavailable(facts: Facts) -> Iterator[Finding]:
    for entry in facts.index or ():
        if entry.state == "UNAVAILABLE" and entry.reason not in ("", UNLOADED):
            what = f"model {entry.name} version {entry.version} cannot be served: {entry.reason}"
            yield _error("model-unavailable", what, f"shoal logs infer --contains {quote(entry.name)}")


@_check("model-not-everywhere", "status")
def _model_not_everywhere(facts: Facts) -> Iterator[Finding]:
    status = facts.status
    ready = [
        instance
        for instance in (status.instances if status else ())
        if instance.service == "infer" and instance.state is InstanceState.READY
    ]
    every = {
        (name, version) for instance in ready for name, versions in instance.models.items() for version in versions
    }
    for name, version in sorted(every):
        without = [instance.name for instance in ready if version not in instance.models.get(name, ())]
        if without:
            what = f"model {name} version {version} is not ready at {', '.join(without)}"
            yield _warning("model-not-everywhere", what, f"shoal logs infer --contains {quote(name)}")


# Jobs.


@_check("dead-letters", "dead")
def _dead_letters(facts: Facts) -> Iterator[Finding]:
    recent = [
        job for job in facts.dead or () if job.updated_at is not None and facts.now - job.updated_at < DEAD_LETTERS_AGE
    ]
    if recent:
        model, count = Counter(job.model_name for job in recent).most_common(1)[0]
        what = (
            f"{len(recent)} jobs have died within the last hour, {count} of them of model {model}: "
            f"{recent[0].last_message}"
        )
        yield _warning("dead-letters", what, f"shoal jobs dead list --model {quote(model)}")


@_check("schedule-failing", "schedules")
def _schedule_failing(facts: Facts) -> Iterator[Finding]:
    for schedule in facts.schedules or ():
        runs = [job for job in (*(facts.dead or ()), *(facts.failed or ())) if _is_run_of(job, schedule)]
        last = next((job for job in runs if job.id == schedule.last_job_id), None)
        if last is not None and len(runs) >= FAILED_RUNS:
            what = (
                f"the last job of schedule {schedule.name} has failed, and {len(runs) - 1} before: {last.last_message}"
            )
            yield _warning("schedule-failing", what, f"shoal jobs dead show {schedule.last_job_id}")


def _is_run_of(job: Job, schedule: Schedule) -> bool:
    return job.labels.get("schedule") == schedule.name and job.tenant == schedule.tenant


@_check("queue-old", "page")
def _queue_old(facts: Facts) -> Iterator[Finding]:
    if facts.page is None:
        return
    oldest = facts.page.most("shoal_ingest_queue_oldest_seconds", ()).get((), 0.0)
    if oldest > QUEUE_AGE_S:
        tenants = facts.page.most("shoal_ingest_queue_age_seconds", ("tenant",))
        (tenant,) = max(tenants, key=lambda key: tenants[key], default=("",))
        what = f"the oldest job that is due waits for {oldest:.0f} s, of tenant {tenant or '(none)'}"
        yield _warning("queue-old", what, "shoal tenants list")


@_check("schedule-skipped", "schedules")
def _schedule_skipped(facts: Facts) -> Iterator[Finding]:
    for schedule in facts.schedules or ():
        due = schedule.upcoming[0] if schedule.upcoming else None
        if due is not None and facts.now - due > timedelta(minutes=1):
            what = f"schedule {schedule.name} has missed its time {due:%Y-%m-%d %H:%M}"
            yield _error("schedule-skipped", what, "shoal logs ingest --level warning")
        elif _has_skipped_last(schedule):
            what = f"schedule {schedule.name} has made no job for its last time: {schedule.last_skip}"
            tenant = f" --tenant {quote(schedule.tenant)}" if schedule.tenant else ""
            yield _warning("schedule-skipped", what, f"shoal jobs schedule show {schedule.name}{tenant}")


def _has_skipped_last(schedule: Schedule) -> bool:
    """Return True when the last time of a schedule got no job. One whose job before still ran is skipped on purpose."""
    time = _SKIPPED_AT.search(schedule.last_skip)
    if time is None or schedule.paused or schedule.last_skip.startswith("job "):
        return False
    return schedule.last_at is None or datetime.fromisoformat(time[0]) > schedule.last_at


@_check("connector-failing", "status")
def _connector_failing(facts: Facts) -> Iterator[Finding]:
    for connector in facts.status.connectors if facts.status else ():
        if connector.stale:
            what = f"connector {connector.name} at {connector.instance} has not reported for 10 s"
            yield _error("connector-failing", what, "shoal logs ingest --level warning")
        elif connector.last_error_at is not None and facts.now - connector.last_error_at < LOG_WINDOW:
            what = f"connector {connector.name} at {connector.instance} fails: {connector.last_error}"
            # The errors of a broker do not name the connector.
            yield _error("connector-failing", what, "shoal logs ingest --level warning")


def is_far_behind(connector: Connector) -> bool:
    """Return True when a connector that reports has much to read before the end of its source."""
    lag, lag_ms = connector.lag, connector.lag_ms
    return not connector.stale and (
        (lag is not None and lag - connector.in_flight > LAG_MESSAGES) or (lag_ms is not None and lag_ms > LAG_S * 1000)
    )


@_check("connector-lags", "status")
def _connector_lags(facts: Facts) -> Iterator[Finding]:
    earlier = {(one.name, one.instance): one for one in facts.earlier_connectors or ()}
    for connector in facts.status.connectors if facts.status else ():
        before = earlier.get((connector.name, connector.instance))
        if before is None or not is_far_behind(connector) or _catches_up(before, connector):
            continue
        behind = f"{connector.lag} messages" if connector.lag is not None else f"{(connector.lag_ms or 0) / 1000:.0f} s"
        what = f"connector {connector.name} at {connector.instance} is {behind} behind its source"
        yield _warning("connector-lags", *_reason_of_lag(what, connector, facts))


def _catches_up(before: Connector, now: Connector) -> bool:
    is_counted = now.lag is not None
    first, last = (one.lag if is_counted else one.lag_ms for one in (before, now))
    return first is None or last is None or (first - last) * CATCH_UP_S / LAG_WATCH_S >= last


def _reason_of_lag(what: str, connector: Connector, facts: Facts) -> tuple[str, str]:
    """Return the description of a lag with its reason, and the command for it."""
    tenant = facts.connector_tenants.get(connector.tenant)
    name = connector.tenant or "(none)"
    if tenant is not None and (rate := tenant.in_force.rate):
        limit = f"its tenant {name} may submit {rate:g} jobs a second"
        return f"{what}: {limit}", f"shoal tenants set {quote(connector.tenant)} --rate 0"
    if tenant is not None and (most := tenant.in_force.max_pending) and tenant.pending >= most:
        limit = f"its tenant {name} has {tenant.pending} waiting jobs, of {most} allowed"
        return f"{what}: {limit}", f"shoal tenants set {quote(connector.tenant)} --max-pending 0"
    if not connector.in_flight:
        return f"{what}, and reads nothing", f"shoal logs ingest --contains {quote(connector.name)}"
    return (
        f"{what}: {connector.in_flight} of its messages wait for model {connector.model_name}",
        "shoal top --once --by execution",
    )


# The machine.


@_check("disk-full", "local or page")
def _disk_full(facts: Facts) -> Iterator[Finding]:
    # With a MongoDB of one's own, that is another disk.
    found = [*_data_disk_full(facts)] or [*_mongodb_disk_full(facts)]
    yield from found


def _data_disk_full(facts: Facts) -> Iterator[Finding]:
    if facts.local is None:
        return
    disk = facts.local.disk
    free = f"{disk.free_bytes / (1 << 20):.0f} MiB of {disk.total_bytes / (1 << 20):.0f} MiB are free at {disk.path}"
    if disk.free_bytes < DISK_REFUSES_BYTES:
        yield _error("disk-full", f"{free}: submits are refused", _largest(disk.path))
    elif disk.free_bytes < min(DISK_LOW_BYTES, DISK_LOW_SHARE * disk.total_bytes):
        yield _warning("disk-full", free, _largest(disk.path))


def _mongodb_disk_full(facts: Facts) -> Iterator[Finding]:
    if facts.page is None:
        return
    reserve = facts.page.most("shoal_ingest_mongo_disk_reserve_bytes", ()).get((), 0.0)
    # -1: unknown.
    known = [free for free in facts.page.most("shoal_ingest_mongo_disk_free_bytes", INSTANCE).values() if free >= 0]
    if known and min(known) < 2 * reserve:
        left, below = f"{min(known) / (1 << 20):.0f} MiB", f"{reserve / (1 << 20):.0f} MiB"
        what = f"MongoDB's disk has {left} left, and submits are refused below {below}"
        command = f"curl -s http://{facts.admin}/metrics | grep mongo_disk"
        yield (_error if min(known) < reserve else _warning)("disk-full", what, command)


def _largest(path: Path) -> str:
    return f"du -xhd 1 {quote(str(path))} | sort -h"


@_check("inodes-full", "local")
def _inodes_full(facts: Facts) -> Iterator[Finding]:
    if facts.local is None:
        return
    disk = facts.local.disk
    if disk.total_inodes and disk.free_inodes < INODES_LOW_SHARE * disk.total_inodes:
        what = f"{disk.free_inodes} of {disk.total_inodes} files can still be made at {disk.path}"
        yield _warning("inodes-full", what, f"df -i {quote(str(disk.path))}")


@_check("memory-low", "local")
def _memory_low(facts: Facts) -> Iterator[Finding]:
    local = facts.local
    if local is None or local.memory_available_bytes >= MEMORY_LOW_SHARE * local.memory_bytes:
        return
    largest = max(local.processes, key=lambda process: process.rss_bytes, default=None)
    of_whom = f"; {largest.name} has {largest.rss_bytes / (1 << 20):.0f} MiB" if largest else ""
    available, size = local.memory_available_bytes / (1 << 20), local.memory_bytes / (1 << 20)
    what = f"{available:.0f} MiB of {size:.0f} MiB of memory are available{of_whom}"
    yield _error("memory-low", what, "ps --sort=-rss -eo pid,rss,args | head")


@_check("memory-near-limit", "page")
def _memory_near_limit(facts: Facts) -> Iterator[Finding]:
    if facts.page is None:
        return
    limits = facts.page.by("shoal_connection_memory_limit_bytes", ("instance", "kind"))
    for (instance, kind), held in sorted(facts.page.by("shoal_connection_memory_bytes", ("instance", "kind")).items()):
        limit = limits.get((instance, kind), 0.0)
        if limit <= 0 or held <= MEMORY_NEAR_SHARE * limit:
            continue
        what = (
            f"{kind} hold {held / (1 << 20):.0f} of {limit / (1 << 20):.0f} MiB at {instance}: beyond it calls are "
            f"refused{_largest_holder(facts.page, instance) if kind == 'requests' else ''}"
        )
        yield _warning("memory-near-limit", what, "shoal top --by tenant --sort memory")


def _largest_holder(page: Page, instance: str) -> str:
    """Return a text that names the tenant whose requests hold the most memory of an instance; empty without one."""
    held = page.by("shoal_connection_memory_tenant_bytes", ("instance", "tenant"))
    by_tenant = {tenant: size for (at, tenant), size in held.items() if at == instance and size}
    if not by_tenant:
        return ""
    tenant = max(by_tenant, key=lambda name: by_tenant[name])
    return f"; tenant {tenant or '(none)'} holds {by_tenant[tenant] / (1 << 20):.0f} MiB"


@_check("shared-memory-low", "local")
def _shared_memory_low(facts: Facts) -> Iterator[Finding]:
    local = facts.local
    if local is not None and local.shm_free_bytes < SHM_LOW_BYTES:
        what = f"{local.shm_free_bytes / (1 << 20):.0f} MiB are free in /dev/shm, which model processes need"
        yield _warning("shared-memory-low", what, "ls -lS /dev/shm")


@_check("file-limit", "local")
def _file_limit(facts: Facts) -> Iterator[Finding]:
    for process in facts.local.processes if facts.local else ():
        if not process.file_limit:
            continue
        if process.open_files > FILES_USED_SHARE * process.file_limit:
            what = f"{process.name} has {process.open_files} of {process.file_limit} files open"
            yield _error("file-limit", what, "ulimit -n 65536 && shoal up")
        elif process.file_limit < FILE_LIMIT:
            what = f"{process.name} may open {process.file_limit} files: each connection takes one"
            yield _warning("file-limit", what, "ulimit -n 65536 && shoal up")


@_check("clock", "page")
def _clock(facts: Facts) -> Iterator[Finding]:
    if facts.page is None:
        return
    ahead: dict[tuple[str, ...], float] = {}
    for service in ("ingest", "store"):
        ahead |= facts.page.by(f"shoal_{service}_mongo_clock_ahead_seconds", ("instance",))
    worst = max(ahead, key=lambda key: abs(ahead[key]), default=None)
    if worst is not None and abs(ahead[worst]) >= CLOCK_S:
        way = "ahead of" if ahead[worst] > 0 else "behind"
        what = f"this machine's clock is {abs(ahead[worst]):.1f} s {way} MongoDB's, as {worst[0]} sees it"
        yield _warning("clock", what, "timedatectl")


@_check("mongodb-members-missing", "page")
def _mongodb_members_missing(facts: Facts) -> Iterator[Finding]:
    members = facts.page.most("shoal_store_mongo_member_up", ("member",)) if facts.page else {}
    missing = sorted(member for (member,), is_up in members.items() if not is_up)
    if missing:
        what = f"{len(missing)} of {len(members)} members of MongoDB's set do not answer: {', '.join(missing)}"
        command = f"curl -s http://{facts.admin}/metrics | grep mongo_member_up"
        if 2 * len(missing) > len(members):
            yield _error("mongodb-members-missing", f"{what}; without a majority nothing is written", command)
        else:
            yield _warning("mongodb-members-missing", what, command)


@_check("oplog-short", "page")
def _oplog_short(facts: Facts) -> Iterator[Finding]:
    if facts.page is None or not facts.page.has("shoal_store_mongo_oplog_used"):
        return
    used = facts.page.most("shoal_store_mongo_oplog_used", ())[()]
    window = facts.page.most("shoal_store_mongo_oplog_window_seconds", ()).get((), -1.0)
    # A young log reaches back as far as its set is old.
    if used >= OPLOG_FULL and 0 <= window < OPLOG_SHORT_S:
        what = f"MongoDB's oplog is full and reaches back {window:.0f} s: whoever reads changes may not stop for longer"
        yield _warning("oplog-short", what, f"curl -s http://{facts.admin}/metrics | grep mongo_oplog")


@_check("removal-stopped", "page")
def _removal_stopped(facts: Facts) -> Iterator[Finding]:
    for service, of, command in (
        ("store", "results", "shoal store retention list"),
        ("ingest", "jobs", "shoal jobs retention list"),
    ):
        if facts.page is not None and facts.page.sum(f"shoal_{service}_retention_stopped"):
            what = (
                f"{of} past their retention are not removed, since the clock has jumped: if it is right, set a rule "
                f"again (`{command.removesuffix('list')}set`)"
            )
            yield _warning("removal-stopped", what, command)


@_check("event-loop-stalls", "local")
def _event_loop_stalls(facts: Facts) -> Iterator[Finding]:
    for process, stalls in (facts.local.logs.stalls_ms if facts.local else {}).items():
        if len(stalls) >= STALLS or sum(stall >= STALL_MS for stall in stalls) >= LONG_STALLS:
            what = (
                f"the event loop of {process} has stalled {len(stalls)} times in {_minutes()}, {max(stalls)} ms at most"
            )
            yield _warning("event-loop-stalls", what, f"shoal logs {process} --contains stalled")


@_check("errors-logged", "local")
def _errors_logged(facts: Facts) -> Iterator[Finding]:
    by_process: dict[str, Counter[str]] = {}
    for (process, message), count in (facts.local.logs.errors if facts.local else {}).items():
        by_process.setdefault(process, Counter())[message] += count
    for process, messages in sorted(by_process.items()):
        if messages.total() >= ERRORS:
            message, count = messages.most_common(1)[0]
            what = f"{process} has logged {messages.total()} errors in {_minutes()}, {count} times: {message}"
            yield _warning("errors-logged", what, f"shoal logs {process} --level error")


def _minutes() -> str:
    return f"{LOG_WINDOW.total_seconds() / 60:.0f} minutes"


# Security.


@_check("data-folder-open", "local")
def _data_folder_open(facts: Facts) -> Iterator[Finding]:
    local = facts.local
    if local is not None and local.data_dir_mode & 0o077:
        what = f"other users of this machine can look into {local.data_dir} (mode {local.data_dir_mode:04o})"
        yield _warning("data-folder-open", what, f"chmod 700 {quote(str(local.data_dir))}")


@_check("secret-open", "local")
def _secret_open(facts: Facts) -> Iterator[Finding]:
    local: LocalFacts | None = facts.local
    for name, mode in (local.secrets if local else {}).items():
        if mode & 0o077 and local is not None:
            path = local.data_dir / name
            yield _error(
                "secret-open", f"other users can read {path} (mode {mode:04o})", f"chmod 600 {quote(str(path))}"
            )


@_check("exposed-without-authentication", "local")
def _exposed(facts: Facts) -> Iterator[Finding]:
    if facts.exposed_at and not facts.has_auth:
        what = f"everyone who can reach {facts.exposed_at} may call every method: start the node again with --auth"
        yield _warning(
            "exposed-without-authentication", what, f"shoal up --listen {facts.exposed_at} --tls auto --auth"
        )


@_check("policy-not-in-force", "page")
def _policy_not_in_force(facts: Facts) -> Iterator[Finding]:
    versions = facts.page.by("shoal_coord_policy_version", ("instance",)) if facts.page and facts.has_auth else {}
    for (name,), version in sorted(versions.items()):
        if not version:
            what = (
                f"{name} finds no policy in etcd, and the gateway refuses every call: coord's log says why it has none"
            )
            yield _error("policy-not-in-force", what, "shoal logs coord")


@_check("issuer-key-unused")
def _issuer_key_unused(facts: Facts) -> Iterator[Finding]:
    for issuer, reason in facts.unused_issuer_keys or ():
        what = f"a key of issuer {issuer} cannot be used, and tokens that it signs are refused: {reason}"
        yield _warning("issuer-key-unused", what, "shoal logs coord")


@_check("issuer-without-keys")
def _issuer_without_keys(facts: Facts) -> Iterator[Finding]:
    for issuer in facts.issuers_without_keys or ():
        what = f"no keys of issuer {issuer} could be fetched yet, and its tokens are refused: coord's log says why"
        yield _error("issuer-without-keys", what, "shoal logs coord")


@_check("no-admin")
def _no_admin(facts: Facts) -> Iterator[Finding]:
    # Without any such key, the admins have tokens of another issuer.
    admins = [key for key in facts.keys or () if key.role == "admin" and not key.revoked]
    if admins and all(_ends_soon(key, facts) for key in admins):
        what = f"every key of an admin ends within {KEYS_END.days} days"
        yield _warning("no-admin", what, _another(max(admins, key=_end)))


@_check("key-ends")
def _key_ends(facts: Facts) -> Iterator[Finding]:
    valid = [key for key in facts.keys or () if not key.revoked]
    ending = [
        key
        for key in valid
        if _ends_soon(key, facts)
        # A key that was made for a short time ends on purpose.
        and (key.created_at is None or _end(key) - key.created_at > 2 * KEYS_END)
        # Its holder has another one.
        and not any(_rights(other) == _rights(key) and _end(other) > _end(key) for other in valid)
    ]
    if ending:
        first = min(ending, key=_end)
        what = (
            f"{len(ending)} keys end within {KEYS_END.days} days, the first on {first.expires_at:%Y-%m-%d}: "
            f"{first.id} of {first.subject or first.tenant}"
        )
        yield _warning("key-ends", what, _another(first))


def _end(key: KeyInfo) -> datetime:
    return key.expires_at or datetime.max.replace(tzinfo=UTC)


def _ends_soon(key: KeyInfo, facts: Facts) -> bool:
    return facts.now < _end(key) < facts.now + KEYS_END


def _rights(key: KeyInfo) -> tuple[object, ...]:
    """Return the holder of a key, and the calls that it is for."""
    return key.tenant, key.role, key.subject, key.models, key.grants


def _another(key: KeyInfo) -> str:
    """Return the command that makes another key of the same holder."""
    options = [("tenant", key.tenant), ("role", key.role), ("subject", key.subject)]
    options += [("models", model) for model in key.models if key.models != ("*",)]
    options += [("grant", grant) for grant in key.grants]
    return "shoal keys create" + "".join(f" --{name} {quote(value)}" for name, value in options if value)


@_check("certificate-ends")
def _certificate_ends(facts: Facts) -> Iterator[Finding]:
    found, ca = facts.certificate, facts.ca
    # A certificate of the node's own CA that ends with the CA is the finding `ca-ends`.
    if found is None or (ca is not None and found.ends_at >= ca.ends_at):
        return
    remedy = "renew the files of --tls-cert and --tls-key, which the node then serves"
    command = f"openssl s_client -connect {facts.gateway.rpartition('/')[2]} </dev/null | openssl x509 -noout -dates"
    if ca is not None:
        remedy, command = "the node renews it by itself, and has not: start it again", "shoal up --tls auto"
    left, life = found.ends_at - facts.now, found.ends_at - found.starts_at
    if left < timedelta():
        what = f"the gateway's certificate ({found.subject}) has ended on {found.ends_at:%Y-%m-%d}: {remedy}"
        yield _error("certificate-ends", what, command)
    elif left < min(CERTIFICATE_ENDS, CERTIFICATE_SHARE * life):
        when = f"ends in {left.days} days, on {found.ends_at:%Y-%m-%d}"
        yield _warning("certificate-ends", f"the gateway's certificate ({found.subject}) {when}: {remedy}", command)


@_check("ca-ends")
def _ca_ends(facts: Facts) -> Iterator[Finding]:
    found, local = facts.ca, facts.local
    if found is None or local is None or found.ends_at - facts.now >= CA_ENDS:
        return
    folder = quote(str(local.data_dir / "ca"))
    what = (
        f"the node's own CA ({found.subject}) ends on {found.ends_at:%Y-%m-%d}: move it away, and give clients the "
        "new one (`shoal ca show`), which the node makes within seconds"
    )
    yield Finding(
        "ca-ends", Severity.ERROR if found.ends_at < facts.now else Severity.WARNING, what, f"mv {folder} {folder}.old"
    )
