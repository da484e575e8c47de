"""Support bundle: what a maintainer would ask for, in one archive, with secrets left out.

The archive is bounded. Its last file, `left_out.txt`, says what is not in it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import re
import tarfile
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from shoal import __version__
from shoal.cli import admin_page
from shoal.cli.diagnosis import checks
from shoal.cli.diagnosis.facts import Facts
from shoal.cli.diagnosis.gather import SECRETS
from shoal.cli.diagnosis.redaction import REDACTED, is_secret_name, redact, without_headers
from shoal.cli.figures import document_of
from shoal.cli.output import plain
from shoal.discovery import RunningNode
from shoal.errors import ShoalError, Unavailable

if TYPE_CHECKING:
    from shoal.client import Client
    from shoal.client.history import By

LOG_BYTES = 4 << 20
"""Bytes of the end of each log."""
PAGE_BYTES = 16 << 20
"""Bytes of each other file: of each page of the admin address, and each answer of the node."""
BUNDLE_BYTES = 128 << 20
"""Bytes of all files together, before they are compressed."""
LEFT_OUT = "left_out.txt"
# Bytes that are dropped at the end of a cut page: a part of a secret may be there. No secret is longer.
_SECRET_BYTES = 64 << 10
_READ_S = 10.0
_PAGES = {
    "metrics.txt": "/metrics",
    "spans.json": "/spans",
    "envoy/clusters.json": "/clusters?format=json",
    "envoy/config_dump.json": "/config_dump?include_eds",
    "envoy/listeners.json": "/listeners?format=json",
    "envoy/server_info.json": "/server_info",
    "envoy/certs.json": "/certs",
    "envoy/stats.txt": "/stats",
}
_VARIABLES = ("SHOAL_", "OTEL_", "XDG_", "TMPDIR", "NUMBA_", "OMP_")

Part = tuple[str, str, int]
"""Name of a file in the archive, its text, and the bytes that were cut off its begin."""


def write(
    path: Path, client: Client | None, node: RunningNode | None, facts: Facts, data_dir: Path | None
) -> list[str]:
    """Write the archive, a .tar.gz that only its user can read; return the names of its files, LEFT_OUT last.

    Raises:
        OSError: the file cannot be written.
    """
    secrets = _secrets(node, data_dir)
    folder = path.name.removesuffix(".gz").removesuffix(".tar")
    names: list[str] = []
    left_out: list[str] = []
    room = BUNDLE_BYTES
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with (
        _removed_unless_whole(path),
        os.fdopen(descriptor, "wb") as file,
        tarfile.open(fileobj=file, mode="w:gz") as archive,
    ):

        def add(name: str, body: bytes) -> None:
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size, info.mtime, info.mode = len(body), int(time.time()), 0o600
            archive.addfile(info, io.BytesIO(body))
            names.append(name)

        for name, text, cut in _parts(client, node, facts, data_dir):
            if cut:
                left_out.append(f"{name}: the first {cut} bytes")
            body, is_cut = _head(text, secrets)
            if len(body) > room:
                left_out.append(f"{name}: all of it, since the bundle has {BUNDLE_BYTES >> 20} MiB at most")
                continue
            if is_cut:
                left_out.append(f"{name}: all after its first {len(body)} bytes")
            room -= len(body)
            add(name, body)
        add(LEFT_OUT, "".join(f"{line}\n" for line in (*_NEVER, *left_out)).encode())
    return names


@contextlib.contextmanager
def _removed_unless_whole(path: Path) -> Iterator[None]:
    """Remove the file when the block fails or is interrupted: a part looks like a whole archive."""
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _head(text: str, secrets: Sequence[str]) -> tuple[bytes, bool]:
    """Return the first bytes of a text, about PAGE_BYTES, without secrets; and True when there are more."""
    whole = text.encode(errors="replace")
    body = redact(whole[:PAGE_BYTES].decode(errors="ignore"), secrets).encode()
    if len(whole) <= PAGE_BYTES:
        return body, False
    # The cut may have left a part of a secret, which nothing recognizes.
    return body[:-_SECRET_BYTES], True


_NEVER = (
    "inputs and outputs of models, requests and results of jobs, files of models: never in a bundle",
    f"secrets: replaced by {REDACTED}, where they are known or have the form of one",
)


# The password of a URL; libraries log it in other forms, too.
_PASSWORD = re.compile(r"://[^\s/@:]{0,256}:([^\s/@]{1,1024})@")


def _secrets(node: RunningNode | None, data_dir: Path | None) -> list[str]:
    """Return the values of the node's own secrets, and those of variables and of options of connectors that hold one.

    Variables are those of this command, and of the node's processes.
    """
    environs = [dict(os.environ), *(_environ(pid) for pid in ((node.pid, *node.pids.values()) if node else ()))]
    found = [value for environ in environs for name, value in environ.items() if is_secret_name(name)]
    for environ in environs:
        for name, value in environ.items():
            found += [password for password in map(unquote, _PASSWORD.findall(value)) if password]
            if name.endswith("_HEADERS"):
                # Values of headers, as they are written and as they are sent.
                values = [pair.partition("=")[2].strip() for pair in value.split(",")]
                found += [*values, *map(unquote, values)]
        if connectors := environ.get("SHOAL_INGEST_CONNECTORS"):
            found += _in_toml(Path(connectors))
    for path in [data_dir / name for name in SECRETS] if data_dir is not None else ():
        with contextlib.suppress(OSError, ValueError):
            found.append(path.read_text())
    return found


def _environ(pid: int) -> dict[str, str]:
    """Return the variables of a process; none when it has ended, or is another user's."""
    try:
        text = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    pairs = (line.partition("=") for line in text.split("\0"))
    return {name: value for name, _, value in pairs}


def _in_toml(path: Path) -> list[str]:
    """Return the values of a file's fields that hold secrets, such as `sasl.password`."""

    def values(name: str, value: object) -> Iterator[str]:
        if isinstance(value, dict):
            for key, each in value.items():
                yield from values(key, each)
        elif isinstance(value, list):
            for each in value:
                yield from values(name, each)
        elif isinstance(value, str) and value.startswith("file:"):
            with contextlib.suppress(OSError, ValueError):
                yield Path(value.removeprefix("file:")).read_text()
        elif isinstance(value, str) and is_secret_name(name):
            yield value

    try:
        return list(values("", tomllib.loads(path.read_text())))
    except (OSError, ValueError):
        return []


def _parts(client: Client | None, node: RunningNode | None, facts: Facts, data_dir: Path | None) -> Iterator[Part]:
    for name, text in _answers(client, facts):
        yield name, text, 0
    if node is not None:
        for name, target in _PAGES.items():
            yield name, _page(node.admin, target), 0
    if data_dir is not None:
        yield from _files(data_dir)


def _answers(client: Client | None, facts: Facts) -> Iterator[tuple[str, str]]:
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
        yield "history.json", _read(lambda: _history(client))
        if facts.has_auth:
            yield "policy.json", _read(lambda: plain(client.access.policy(timeout=_READ_S)))


def _history(client: Client) -> object:
    kinds: tuple[By, ...] = ("model", "tenant", "instance")
    return {by: document_of(client.history(by, timeout=_READ_S)) for by in kinds}


def _files(data_dir: Path) -> Iterator[Part]:
    for name in ("node.json", "ports.json", "prometheus.json", "envoy.json"):
        if (found := _tail(data_dir / name, PAGE_BYTES)) is not None:
            text, cut = found
            yield f"data/{name}", _of_envoy(text) if name == "envoy.json" else text, cut
    # The newest first: what does not fit is the oldest.
    for path in sorted((data_dir / "logs").glob("*.log*"), key=lambda path: (path.suffix != ".log", path.name)):
        if (found := _tail(path, LOG_BYTES)) is not None:
            yield f"logs/{path.name}", *found


def _tail(path: Path, most: int) -> tuple[str, int] | None:
    """Return whole lines at the end of a file, and the bytes before them; None for a file that cannot be read."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            start = max(0, size - most)
            file.seek(start)
            body = file.read(most)
    except OSError:
        return None
    if start:
        # A part of a line may be a part of a secret, which nothing recognizes.
        _, _, whole = body.partition(b"\n")
        start, body = start + len(body) - len(whole), whole
    return body.decode(errors="replace"), start


def _of_envoy(text: str) -> str:
    """Return Envoy's configuration without the headers that it sends; what is no JSON is left out."""
    try:
        return _json(without_headers(json.loads(text)))
    except ValueError as err:
        return f"not a document of JSON: {err}\n"


def _page(admin: str, target: str) -> str:
    try:
        text = admin_page.read(admin, target, timeout_s=_READ_S)
        return _of_envoy(text) if target.startswith("/config_dump") else text
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
