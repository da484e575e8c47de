"""Support bundle: what a maintainer would ask for, in one archive, with secrets left out."""

from __future__ import annotations

import io
import json
import os
import platform
import tarfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from shoal import __version__
from shoal.cli import admin_page
from shoal.cli.diagnosis import checks
from shoal.cli.diagnosis.facts import Facts
from shoal.cli.diagnosis.gather import SECRETS
from shoal.cli.diagnosis.redaction import redact
from shoal.cli.output import plain
from shoal.discovery import RunningNode
from shoal.errors import ShoalError, Unavailable

if TYPE_CHECKING:
    from shoal.client import Client

LOG_BYTES = 4 << 20
"""Bytes of the end of each log."""
PAGE_BYTES = 16 << 20
"""Bytes of each page of the admin address."""
_READ_S = 10.0
_PAGES = {
    "metrics.txt": "/metrics",
    "envoy/clusters.json": "/clusters?format=json",
    "envoy/config_dump.json": "/config_dump?include_eds",
    "envoy/listeners.json": "/listeners?format=json",
    "envoy/server_info.json": "/server_info",
    "envoy/certs.json": "/certs",
    "envoy/stats.txt": "/stats",
}
_VARIABLES = ("SHOAL_", "OTEL_", "XDG_", "TMPDIR", "NUMBA_", "OMP_")

Part = tuple[str, str]
"""Name of a file in the archive, and its text."""


def write(
    path: Path, client: Client | None, node: RunningNode | None, facts: Facts, data_dir: Path | None
) -> list[str]:
    """Write the archive, a .tar.gz that only its user can read; return the names of its files.

    Raises:
        OSError: the file cannot be written.
    """
    secrets = _secrets(data_dir)
    folder = path.name.removesuffix(".gz").removesuffix(".tar")
    names: list[str] = []
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file, tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, text in _parts(client, node, facts, data_dir):
            body = redact(text, secrets).encode()
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size, info.mtime, info.mode = len(body), int(time.time()), 0o600
            archive.addfile(info, io.BytesIO(body))
            names.append(name)
    return names


def _secrets(data_dir: Path | None) -> list[str]:
    """Return the values of the node's own secrets, of this command's token, and of variables that hold one."""
    found = [value for name, value in os.environ.items() if name == "SHOAL_TOKEN" or name.endswith("_PASSWORD")]
    for name in SECRETS if data_dir is not None else ():
        try:
            found.append((data_dir / name).read_text() if data_dir is not None else "")
        except (OSError, UnicodeDecodeError):
            continue
    return found


def _parts(client: Client | None, node: RunningNode | None, facts: Facts, data_dir: Path | None) -> Iterator[Part]:
    yield "versions.json", _json(_versions())
    yield (
        "environment.txt",
        "".join(f"{name}={value}\n" for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)),
    )
    findings = [{**plain(finding), "severity": finding.severity.name.lower()} for finding in checks.diagnose(facts)]
    yield "doctor.json", _json({"findings": findings, "unread": facts.unread})
    yield "facts.json", _json({"local": plain(facts.local), "endpoints": plain(facts.endpoints)})
    if client is not None:
        yield "status.json", _json(plain(facts.status))
        yield "models.json", _read(lambda: plain(client.models.index(timeout=_READ_S)))
        yield "statistics.json", _read(lambda: plain(client.models.statistics(timeout=_READ_S)))
        yield "tenants.json", _read(lambda: plain(client.tenants.list(timeout=_READ_S)))
        yield "schedules.json", _read(lambda: plain(client.jobs.schedules.list(timeout=_READ_S)))
        yield "dead_letters.json", _read(lambda: plain(client.jobs.dead.list(limit=100, timeout=_READ_S)))
        yield "operations.json", _read(lambda: plain(client.jobs.operations.list(timeout=_READ_S)))
        if facts.has_auth:
            yield "policy.json", _read(lambda: plain(client.access.policy(timeout=_READ_S)))
    if node is not None:
        for name, target in _PAGES.items():
            yield name, _page(node.admin, target)
    if data_dir is not None:
        yield from _files(data_dir)


def _files(data_dir: Path) -> Iterator[Part]:
    for name in ("node.json", "ports.json", "prometheus.json", "envoy.json"):
        if (text := _tail(data_dir / name, PAGE_BYTES)) is not None:
            yield f"data/{name}", text
    for path in sorted((data_dir / "logs").glob("*.log*")):
        if (text := _tail(path, LOG_BYTES)) is not None:
            yield f"logs/{path.name}", text


def _tail(path: Path, most: int) -> str | None:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - most))
            return file.read(most).decode(errors="replace")
    except OSError:
        return None


def _page(admin: str, target: str) -> str:
    try:
        return admin_page.read(admin, target, timeout_s=_READ_S, most=PAGE_BYTES)
    except Unavailable as err:
        return f"not read: {err.message}\n"


def _read(read: Callable[[], object]) -> str:
    try:
        return _json(read())
    except ShoalError as err:
        return _json({"not read": err.message})


def _json(value: object) -> str:
    return json.dumps(value, indent=2, default=str, ensure_ascii=False) + "\n"


def _versions() -> dict[str, object]:
    packages = sorted({(one.name, one.version) for one in metadata.distributions() if one.name})
    return {
        "shoal": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processors": os.cpu_count(),
        "packages": dict(packages),
    }
