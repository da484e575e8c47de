"""Gathering of the facts about a node, from its services, its files, and the machine."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import socket
import ssl
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mesh.metrics.process import start_time
from mesh.process import memory_limit
from shoal import __version__
from shoal.cli import admin_page
from shoal.cli.diagnosis.checks import LAG_WATCH_S, LOG_WINDOW, fails_often, is_far_behind, silent_processes
from shoal.cli.diagnosis.facts import CertificateFacts, DiskFacts, Facts, LocalFacts, LogFacts, ProcessFacts
from shoal.cli.endpoints import Endpoint, fetch
from shoal.discovery import RunningNode
from shoal.errors import InvalidArgument, ShoalError, Unimplemented
from shoal.node import folder
from shoal.node.logs import LogFilter, latest, processes
from shoal.node.options import DEFAULT_ADMIN_PORT, DEFAULT_GATEWAY_PORT
from shoal.node.ports import HOST

if TYPE_CHECKING:
    from shoal.client import Client, Connector, PolicyDocument, Tenant
    from shoal.rates import Page

T = TypeVar("T")

FAILING_S = 1.0
"""Time between two readings of an endpoint that has failed before: an old failure is none of now."""
PAGE_S = 10.0
"""Timeout of the page of metrics, which waits 5 s for a process that stands still."""
READ_S = 5.0
"""Timeout of one read: a part that takes longer is a finding."""
LOG_ENTRIES = 20_000
"""Entries of one process that are read."""
DEAD_LETTERS = 200
SECRETS = ("admin.key", "master.key", "mongo.key", "etcd.key", "ca/ca.key")


@dataclass(slots=True)
class _Parts:
    """Parts that were read, and the reasons of the others."""

    unread: dict[str, str] = field(default_factory=dict)

    def call(self, name: str, read: Callable[[], T]) -> T | None:
        """Read a part through the gateway; not at all when the first one had no answer, since each would wait."""
        return None if "status" in self.unread else self.read(name, read)

    def read(self, name: str, read: Callable[[], T]) -> T | None:
        try:
            return read()
        except ShoalError as err:
            self.unread[name] = err.message
        except (OSError, ValueError) as err:
            self.unread[name] = str(err)
        return None


def of_node(client: Client, node: RunningNode | None, chosen: str = "") -> Facts:
    """Return the facts about a running node; `node` is None for a node of another machine.

    `chosen` is the --gateway of commands that would not find it without. Raises InvalidArgument for a `shoal serve`.
    """
    parts = _Parts()
    now = datetime.now(UTC)
    status = None
    try:
        status = client.status(timeout=READ_S)
    except Unimplemented as err:
        raise InvalidArgument(
            f"{client.address} is a `shoal serve`, and doctor looks at nodes: see `shoal top` for what a server does"
        ) from err
    except ShoalError as err:
        parts.unread["status"] = err.message
    listen = str(folder.ready_document(node.data_dir).get("listen", "")) if node is not None else ""
    endpoints = None if node is None else _tuple(parts.read("endpoints", lambda: fetch(node.admin)))
    earlier: tuple[Endpoint, ...] | None = None
    if node is not None and any(map(fails_often, endpoints or ())):
        # Envoy counts since its start, when calls to a service that was not ready yet have failed.
        time.sleep(FAILING_S)
        earlier, endpoints = endpoints, _tuple(parts.read("endpoints", lambda: fetch(node.admin)))
    earlier_connectors: tuple[Connector, ...] | None = None
    tenants: dict[str, Tenant] = {}
    if status is not None and (behind := [one for one in status.connectors if is_far_behind(one)]):
        # One that catches up is healthy.
        time.sleep(LAG_WATCH_S)
        earlier_connectors = status.connectors
        status = parts.read("status", lambda: client.status(timeout=READ_S))
        for name in {one.tenant for one in behind}:
            if (tenant := parts.call("tenants", partial(client.tenants.get, name, timeout=READ_S))) is not None:
                tenants[name] = tenant
    has_auth = node.key_file is not None if node is not None else bool(status and status.master_key)
    policy = parts.call("policy", lambda: client.access.policy(timeout=READ_S)) if has_auth else None
    return Facts(
        now=now,
        version=__version__,
        gateway=client.address,
        admin="" if node is None else node.admin,
        chosen=chosen,
        exposed_at="" if not listen or _is_loopback(listen) else listen,
        has_auth=has_auth,
        status=status,
        endpoints=endpoints,
        earlier_endpoints=earlier,
        earlier_connectors=earlier_connectors,
        connector_tenants=tenants,
        index=_tuple(parts.call("index", lambda: client.models.index(timeout=READ_S))),
        dead=_tuple(parts.call("dead", lambda: client.jobs.dead.list(limit=DEAD_LETTERS, timeout=READ_S))),
        failed=_tuple(
            parts.call("failed", lambda: client.jobs.dead.list(state="failed", limit=DEAD_LETTERS, timeout=READ_S))
        ),
        schedules=_tuple(parts.call("schedules", lambda: client.jobs.schedules.list(timeout=READ_S))),
        keys=_tuple(parts.call("keys", lambda: client.access.keys(timeout=READ_S))) if has_auth else None,
        unused_issuer_keys=None if policy is None else _unused_issuer_keys(policy),
        issuers_without_keys=_tuple(parts.read("issuers", lambda: _without_keys(policy))) if policy else None,
        certificate=parts.read("certificate", lambda: _certificate(client.address)),
        ca=None if node is None else parts.read("ca", lambda: _own_ca(node)),
        page=None if node is None else parts.read("metrics", lambda: _page(node.admin)),
        local=None if node is None else _local(node.data_dir, node.pids, _log_window(now, node.pid), node.pid),
        unread=parts.unread,
    )


def of_folder(data_dir: Path) -> Facts:
    """Return the facts about a node that does not run, from its data folder."""
    now = datetime.now(UTC)
    local = _local(data_dir, {}, now - LOG_WINDOW, 0)
    return Facts(now=now, version=__version__, local=local)


def _tuple(found: list[T] | None) -> tuple[T, ...] | None:
    return None if found is None else tuple(found)


def _page(admin: str) -> Page:
    page = admin_page.metrics(admin, timeout_s=PAGE_S)
    # One that was busy, or began to serve meanwhile, answers the second time.
    return admin_page.metrics(admin, timeout_s=PAGE_S) if silent_processes(page) else page


def _is_loopback(listen: str) -> bool:
    from mesh.process.sockets import is_local

    return is_local(listen)


def _issuers(policy: PolicyDocument) -> list[Any]:
    return list(json.loads(policy.in_force or "{}").get("issuers", ()))


def _unused_issuer_keys(policy: PolicyDocument) -> tuple[tuple[str, str], ...]:
    issuers = [(issuer["issuer"], issuer.get("jwks") or {}) for issuer in _issuers(policy)]
    return tuple((name, reason) for name, keys in issuers for reason in keys.get("skipped", ()))


def _without_keys(policy: PolicyDocument) -> list[str]:
    from shoal.access.policy import parse

    known = {issuer["issuer"] for issuer in _issuers(policy)}
    named = parse(policy.document, is_new=False).issuers
    return [issuer.issuer for issuer in named if issuer.is_fetched and issuer.issuer not in known]


def _certificate(gateway: str) -> CertificateFacts | None:
    """Return the certificate of a gateway; None when it speaks plaintext."""
    if not gateway.startswith("https://"):
        return None
    host, _, port = gateway.removeprefix("https://").rpartition(":")
    return _read_certificate(ssl.get_server_certificate((host.strip("[]"), int(port)), timeout=READ_S))


def _own_ca(node: RunningNode) -> CertificateFacts | None:
    """Return the CA of `--tls auto`; None when the node has another certificate or none."""
    from shoal.node.tls import own_ca

    if node.ca != node.data_dir / own_ca.FOLDER / own_ca.CERTIFICATE:
        return None
    return _read_certificate(node.ca.read_text())


def _read_certificate(pem: str) -> CertificateFacts:
    from cryptography import x509

    found = x509.load_pem_x509_certificate(pem.encode())
    return CertificateFacts(
        found.subject.rfc4514_string() or found.issuer.rfc4514_string(),
        found.not_valid_before_utc,
        found.not_valid_after_utc,
    )


def _log_window(now: datetime, pid: int) -> datetime:
    """Return the time from which the log of a node is counted: its launcher's start, or LOG_WINDOW ago."""
    begin = now - LOG_WINDOW
    try:
        return max(begin, datetime.fromtimestamp(start_time(pid), UTC))
    except OSError:
        return begin


def _local(data_dir: Path, pids: Mapping[str, int], logs_since: datetime, launcher: int) -> LocalFacts:
    is_running = launcher > 0 or _is_locked(data_dir)
    disk = shutil.disk_usage(data_dir)
    inodes = os.statvfs(data_dir)
    memory, available = memory_limit.available(launcher or "self")
    shm = os.statvfs("/dev/shm") if os.path.isdir("/dev/shm") else None
    return LocalFacts(
        data_dir=data_dir,
        data_dir_mode=data_dir.stat().st_mode & 0o7777,
        launcher_alive=is_running,
        launcher_pid=launcher,
        processes=tuple(_process(name, pid) for name, pid in pids.items()),
        disk=DiskFacts(data_dir, disk.free, disk.total, inodes.f_favail, inodes.f_files),
        logs=_logs(data_dir / "logs", logs_since),
        memory_bytes=memory,
        memory_available_bytes=available,
        shm_free_bytes=shm.f_bavail * shm.f_frsize if shm is not None else 1 << 40,
        secrets={name: mode for name in SECRETS if (mode := _mode(data_dir / name)) is not None},
        etcd=_etcd(pids),
        leftovers=() if is_running else tuple(_leftovers(data_dir)),
        holders={} if is_running else dict(_holders((DEFAULT_GATEWAY_PORT, DEFAULT_ADMIN_PORT))),
    )


def _etcd(pids: Mapping[str, int]) -> str:
    """Return the endpoint of the node's own etcd: a socket in the folder in which it runs."""
    try:
        folder = os.readlink(f"/proc/{pids['etcd']}/cwd")
    except (KeyError, OSError):
        return ""
    return f"unix://{folder}/etcd:0"


def _mode(path: Path) -> int | None:
    try:
        return path.stat().st_mode & 0o7777
    except OSError:
        return None


def _is_locked(data_dir: Path) -> bool:
    """Return True when a process holds the lock of the data folder."""
    try:
        with (data_dir / "node.lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _process(name: str, pid: int) -> ProcessFacts:
    folder = Path(f"/proc/{pid}")
    try:
        rss = int((folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        open_files = sum(1 for _ in os.scandir(folder / "fd"))
        limits = (folder / "limits").read_text().splitlines()
        # Proc(5): the state follows the name, which may have parentheses.
        state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        age_s = time.time() - start_time(pid)
    except (OSError, ValueError, IndexError):
        return ProcessFacts(name, pid, is_alive=folder.exists())
    soft = next((line.split()[3] for line in limits if line.startswith("Max open files")), "0")
    file_limit = int(soft) if soft.isdigit() else 0
    return ProcessFacts(name, pid, True, rss, open_files, file_limit, age_s, is_stopped=state in ("T", "t"))


def _logs(folder: Path, since: datetime) -> LogFacts:
    errors: Counter[tuple[str, str]] = Counter()
    starts: Counter[str] = Counter()
    stalls: dict[str, list[int]] = {}
    chosen = LogFilter(since=since)
    for name in processes(folder):
        for entry in latest(folder, [name], LOG_ENTRIES, chosen):
            if entry.level == "ERROR":
                errors[name, entry.message.partition("\n")[0][:200]] += 1
            if (stall := entry.fields.get("stall_ms")) is not None:
                stalls.setdefault(name, []).append(int(stall))
            if entry.logger.startswith("services.") and entry.message.startswith("serving at "):
                starts[name] += 1
    return LogFacts(errors, {name: tuple(found) for name, found in stalls.items()}, starts)


def _leftovers(data_dir: Path) -> Iterator[str]:
    """Return the processes whose command line names the data folder, as `name pid`."""
    wanted = re.compile(rf"(?:^|[=:,]){re.escape(str(data_dir))}(?:/|$)")
    for pid in _pids():
        try:
            argv = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if (
            pid != os.getpid()
            and any(wanted.search(part) for part in argv[1:])
            and Path(argv[0]).name in ("mongod", "etcd", "envoy")
        ):
            yield f"{Path(argv[0]).name} {pid}"


def _pids() -> Iterator[int]:
    yield from (int(entry.name) for entry in os.scandir("/proc") if entry.name.isdigit())


def _holders(ports: tuple[int, ...]) -> Iterator[tuple[int, str]]:
    """Return those of the ports that another process holds, each with the process, as far as this user may know it."""
    for port in ports:
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind((HOST, port))
            except OSError as err:
                if err.errno == errno.EADDRINUSE:
                    yield port, _holder(port)


def _holder(port: int) -> str:
    """Return the process that listens at a port (proc(5), /proc/net/tcp)."""
    inodes = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        # 0A is LISTEN.
        if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
            inodes.add(f"socket:[{fields[9]}]")
    for pid in _pids():
        try:
            if any(os.readlink(one.path) in inodes for one in os.scandir(f"/proc/{pid}/fd")):
                return f"{Path(f'/proc/{pid}/comm').read_text().strip()} (pid {pid})"
        except OSError:
            continue
    return "another process"
