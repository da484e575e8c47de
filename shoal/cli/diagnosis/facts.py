"""Facts about a node, and findings of the checks. Immutable values: no check reads anything itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shoal.cli.endpoints import Endpoint
    from shoal.client import Connector, Job, KeyInfo, Schedule, Status, Tenant
    from shoal.client.models.serving import IndexEntry
    from shoal.rates import Page


class Severity(IntEnum):
    """Severity of a finding; the exit status of `shoal doctor` is the highest one."""

    WARNING = 1
    """The node works; something will end that, or makes it slow."""
    ERROR = 2
    """A part of the node does not work, or data is at risk."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong, and the command that mends it or shows more."""

    check: str
    severity: Severity
    what: str
    """Description of the fault, with names and numbers."""
    command: str
    """Command that mends it, or that shows the cause."""


@dataclass(frozen=True, slots=True)
class ProcessFacts:
    """One process of the node."""

    name: str
    pid: int
    is_alive: bool
    rss_bytes: int = 0
    open_files: int = 0
    file_limit: int = 0
    """Maximum of open files (the soft limit); 0: unknown."""
    age_s: float = 0.0
    """Seconds since its start."""
    is_stopped: bool = False
    """True after SIGSTOP or Ctrl-Z."""


@dataclass(frozen=True, slots=True)
class DiskFacts:
    """The file system of the data folder."""

    path: Path
    free_bytes: int
    total_bytes: int
    free_inodes: int
    total_inodes: int
    """0: the file system has no fixed number."""


@dataclass(frozen=True, slots=True)
class CertificateFacts:
    """A certificate: that of the gateway, or of a CA."""

    subject: str
    starts_at: datetime
    ends_at: datetime


@dataclass(frozen=True, slots=True)
class LogFacts:
    """Entries of the last `LOG_WINDOW`, counted."""

    errors: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """Errors by process and message."""
    stalls_ms: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Event loop stalls by process."""
    starts: Mapping[str, int] = field(default_factory=dict)
    """Times that a service has begun to serve, by process."""


@dataclass(frozen=True, slots=True)
class LocalFacts:
    """Facts that only the node's own machine has."""

    data_dir: Path
    data_dir_mode: int
    launcher_alive: bool
    """False: no `shoal up` holds the data folder."""
    launcher_pid: int
    """0: it does not run."""
    processes: tuple[ProcessFacts, ...]
    disk: DiskFacts
    logs: LogFacts
    memory_bytes: int
    """Memory of the machine, or of the launcher's control group that has less left."""
    memory_available_bytes: int
    shm_free_bytes: int
    secrets: Mapping[str, int] = field(default_factory=dict)
    """Modes of files with secrets, by name."""
    etcd: str = ""
    """Endpoint of the node's own etcd, as etcdctl takes it; empty: it has another one, or does not run."""
    leftovers: tuple[str, ...] = ()
    """Processes that run although the launcher of the data folder has ended."""
    holders: Mapping[int, str] = field(default_factory=dict)
    """Of a node that does not run: its ports that other processes hold, each with the process."""


@dataclass(frozen=True, slots=True)
class Facts:
    """All that the checks know. A part that could not be read is None, and `unread` has the reason."""

    now: datetime
    version: str
    """Version of this command."""
    gateway: str = ""
    admin: str = ""
    chosen: str = ""
    """The --gateway of commands that would not find this node without it; empty: they find it."""
    exposed_at: str = ""
    """Address at which other machines reach the gateway; empty: only this one does."""
    has_auth: bool = False
    status: Status | None = None
    endpoints: tuple[Endpoint, ...] | None = None
    earlier_endpoints: tuple[Endpoint, ...] | None = None
    """An earlier reading of the endpoints; None when no endpoint has failed often."""
    earlier_connectors: tuple[Connector, ...] | None = None
    """A reading of the connectors LAG_WATCH_S before `status`; None when none was far behind its source."""
    connector_tenants: Mapping[str, Tenant] = field(default_factory=dict)
    """Tenants of the connectors that are far behind."""
    index: tuple[IndexEntry, ...] | None = None
    dead: tuple[Job, ...] | None = None
    """The newest dead letters: jobs out of attempts."""
    failed: tuple[Job, ...] | None = None
    """The newest jobs that failed, which another attempt would not have helped."""
    schedules: tuple[Schedule, ...] | None = None
    keys: tuple[KeyInfo, ...] | None = None
    unused_issuer_keys: tuple[tuple[str, str], ...] | None = None
    """Keys that issuers of the policy publish and that no gateway can use: the issuer, and the reason."""
    issuers_without_keys: tuple[str, ...] | None = None
    """Issuers of the policy whose keys the node has never fetched."""
    certificate: CertificateFacts | None = None
    ca: CertificateFacts | None = None
    """The node's own CA; None: it has none."""
    page: Page | None = None
    """Metrics of all processes of the node."""
    local: LocalFacts | None = None
    unread: Mapping[str, str] = field(default_factory=dict)
