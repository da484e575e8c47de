"""Discovery of a command's node: the address that the user set, else the node that runs on this machine.

    --gateway  ->  $SHOAL_GATEWAY  ->  the ready file of the node that this user runs on this machine

`https://HOST:PORT` is called with TLS; `HOST:PORT` and `http://HOST:PORT` in plaintext.

A running node keeps a copy of its ready file, the pointer, in a folder of its user. The file is named after the node's
process (`<pid>-<start>.json`), so a file left by a killed node is recognized as stale even when its pid is reused.
Linux only, as the node is. A `shoal serve` with metrics has such a file, too (`serve-<pid>-<start>.json`), by which
`shoal top` and `shoal trace` find it; other commands do not.
"""

from __future__ import annotations

import json
import os
import re
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from shoal.errors import FailedPrecondition, InvalidArgument, NotFound

GATEWAY_VARIABLE = "SHOAL_GATEWAY"
CA_VARIABLE = "SHOAL_CA"
"""File of the authorities that clients trust."""
TOKEN_VARIABLE = "SHOAL_TOKEN"
"""Token that clients send."""

_ADDRESS = re.compile(r"^(unix:.+|[^/:\s@]+:[0-9]{1,5}|\[[0-9a-fA-F:]+\]:[0-9]{1,5})$")
_POINTER = re.compile(r"^(serve-)?(\d+)-(\d+)\.json$")
_SERVER = "serve-"


@dataclass(frozen=True)
class Gateway:
    """A gateway, and the data with which its certificate is checked."""

    address: str
    """`host:port` or `unix:/path`."""
    has_tls: bool = False
    is_here: bool = False
    """True for a node of this machine that the discovery found."""
    ca: Path | None = None
    """PEM file of the trusted authorities; None: those of the machine."""
    name: str = ""
    """Name that the certificate must have; empty: the one in the address."""
    key_file: Path | None = None
    """File of the key of the node's user; None: callers need none, or the node was not found here."""

    @property
    def url(self) -> str:
        """The address as the user writes it: with `https://`, where the gateway has TLS."""
        return f"https://{self.address}" if self.has_tls else self.address


@dataclass(frozen=True)
class RunningNode:
    """A node of this user that runs on this machine, as its ready file describes it."""

    gateway: str
    """Envoy's gateway, `host:port`."""
    admin: str
    """Envoy's admin endpoint, `host:port`."""
    data_dir: Path
    pid: int
    """The process that runs the node: `shoal up`."""
    pids: Mapping[str, int] = field(default_factory=dict)
    """Each process of the node by name: `infer-0`, `envoy` ..."""
    ca: Path | None = None
    """File that clients trust; None: the gateway speaks plaintext."""
    name: str = ""
    """A name that the gateway's certificate is valid for."""
    key_file: Path | None = None
    """File of the user's key; None: callers are not authenticated."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of the node's own etcd, mongod and Envoy."""

    @property
    def url(self) -> str:
        return self.gateway if self.ca is None else f"https://{self.gateway}"


@dataclass(frozen=True)
class RunningServer:
    """A `shoal serve --metrics-port` of this user that runs on this machine."""

    gateway: str
    """Its address for clients, as `Gateway.url`."""
    admin: str
    """Its address for metrics and spans, `host:port`."""


def find_gateway(flag: str | None, environ: Mapping[str, str]) -> Gateway:
    """Return the gateway that the user set, else the one of the node that runs on this machine.

    Where the user's choice is a node of this user on this machine, it has the node's CA.

    Raises:
        InvalidArgument: the flag or the variable is not an address.
        NotFound: neither is set, and no node of this user runs on this machine.
        FailedPrecondition: neither is set, and several nodes run on this machine.
    """
    text = flag or environ.get(GATEWAY_VARIABLE)
    if text:
        named = parse_gateway(text, "--gateway" if flag else GATEWAY_VARIABLE)
        here = node_of(named.url, environ)
        return named if here is None else replace(named, ca=here.ca, name=here.name)
    node = find_node(environ)
    return Gateway(node.gateway, node.ca is not None, True, node.ca, node.name, node.key_file)


def find_node(environ: Mapping[str, str]) -> RunningNode:
    """Return the one node that this user runs on this machine.

    Raises:
        NotFound: no node runs.
        FailedPrecondition: several nodes run.
    """
    nodes = running_nodes(environ)
    if not nodes:
        raise NotFound(
            "no node is running on this machine: start one with `shoal up`, "
            f"or set the address with --gateway HOST:PORT or {GATEWAY_VARIABLE}"
        )
    if len(nodes) > 1:
        choices = "; ".join(f"{node.url} (data in {node.data_dir}, pid {node.pid})" for node in nodes)
        raise FailedPrecondition(
            f"{len(nodes)} nodes are running on this machine: choose one with --gateway HOST:PORT or "
            f"{GATEWAY_VARIABLE}: {choices}"
        )
    return nodes[0]


def node_of(gateway: str, environ: Mapping[str, str]) -> RunningNode | None:
    """Return the local node with this gateway; None when the node runs elsewhere."""
    return next((node for node in running_nodes(environ) if node.url == gateway), None)


def admin_of(gateway: str, environ: Mapping[str, str]) -> str | None:
    """Return Envoy's admin endpoint of the local node with this gateway; None when the node runs elsewhere."""
    node = node_of(gateway, environ)
    return None if node is None else node.admin


def key_of(gateway: Gateway, environ: Mapping[str, str]) -> str:
    """Return the key that the local node of this user has made for it; empty when the gateway is another one's.

    Raises:
        InvalidArgument: other users can read the file of the key.
    """
    file = _key_file(gateway, environ)
    try:
        if file is None or not file.exists():
            return ""
        if (mode := stat.S_IMODE(file.stat().st_mode)) & 0o077:
            raise InvalidArgument(f"other users can read the key {file} (mode {mode:04o}): chmod 600 {file}")
        return file.read_text().strip()
    except OSError as err:
        raise InvalidArgument(f"the key {file} cannot be read: {err.strerror}") from None


def replace_key(gateway: Gateway, key: str, environ: Mapping[str, str]) -> Path | None:
    """Replace the key that the local node of this user has made for it; return its file. None: it has made none."""
    file = _key_file(gateway, environ)
    if file is None or not file.exists():
        return None
    new = file.with_name(f".{file.name}.{os.getpid()}")
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as written:
        written.write(key + "\n")
    new.replace(file)
    return file


def _key_file(gateway: Gateway, environ: Mapping[str, str]) -> Path | None:
    return gateway.key_file or next(
        (node.key_file for node in running_nodes(environ) if node.url == gateway.url and node.key_file), None
    )


def running_nodes(environ: Mapping[str, str]) -> list[RunningNode]:
    """Return this user's running nodes on this machine, ordered by pid. Stale, foreign and invalid files are skipped.

    Only the first folder with a node counts, so a test with its own XDG_RUNTIME_DIR sees only its own nodes.
    """
    for folder in _folders(environ):
        nodes = sorted(_nodes_in(folder), key=lambda node: node.pid)
        if nodes:
            return nodes
    return []


def running_servers(environ: Mapping[str, str]) -> list[RunningServer]:
    """Return this user's running servers with metrics on this machine. Stale and foreign files are skipped."""
    for folder in _folders(environ):
        found = [
            RunningServer(str(document["gateway"]), str(document["admin"]))
            for path, document in _documents(folder)
            if path.name.startswith(_SERVER)
        ]
        if found:
            return found
    return []


@contextmanager
def announced(environ: Mapping[str, str], server: RunningServer) -> Iterator[None]:
    """Let commands find a server of this process until the block ends. A folder that cannot be used is no error."""
    path = None
    with suppress(OSError):
        path = pointer_path(environ, os.getpid(), _SERVER)
        path.write_text(json.dumps({"gateway": server.gateway, "admin": server.admin}))
    try:
        yield
    finally:
        if path is not None:
            with suppress(OSError):
                path.unlink(missing_ok=True)


def pointer_path(environ: Mapping[str, str], pid: int, kind: str = "") -> Path:
    """Return the pointer's path for process `pid`. Create the folder and remove stale files from it.

    Raises:
        OSError: the folder cannot be created, or is unsafe: it belongs to another user, or others can write to it.
    """
    folder = _folders(environ)[0]
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _is_ours(folder):
        raise PermissionError(f"{folder} belongs to another user or is open to others")
    for path in _pointers(folder):
        if not _is_alive(path):
            path.unlink(missing_ok=True)
    return folder / f"{kind}{pid}-{_started(pid)}.json"


def parse_gateway(text: str, source: str) -> Gateway:
    """Return the gateway of an address. Raises InvalidArgument, with `source` as the subject."""
    scheme, _, rest = text.strip().rpartition("://")
    address = rest.rstrip("/") if scheme in ("", "http", "https", "grpc") else text
    port = address.rpartition(":")[2]
    if not _ADDRESS.match(address) or (not address.startswith("unix:") and not 0 < int(port) < 65536):
        raise InvalidArgument(
            f"{source}={text!r} is no address: expected HOST:PORT, such as 127.0.0.1:8080, or https://HOST:PORT"
        )
    return Gateway(address, scheme == "https")


def _folders(environ: Mapping[str, str]) -> list[Path]:
    """Return the folders for pointers, the one to write to first."""
    configured = environ.get("XDG_RUNTIME_DIR")
    default = Path(f"/run/user/{os.getuid()}")
    runtime = [Path(configured), default] if configured else [default]
    shared = Path(environ.get("TMPDIR") or tempfile.gettempdir()) / f"shoal-{os.getuid()}"
    return [*(folder / "shoal" for folder in runtime if folder.is_dir() and os.access(folder, os.W_OK)), shared]


def _is_ours(folder: Path) -> bool:
    """Return True when only this user can have put files into the folder."""
    try:
        status = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022


def _pointers(folder: Path) -> Iterator[Path]:
    yield from (path for path in folder.iterdir() if _POINTER.match(path.name))


def _documents(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the pointers of running processes in a folder, each with its document."""
    for path in _pointers(folder) if _is_ours(folder) else ():
        # The file may be removed meanwhile, or be no pointer.
        with suppress(OSError, ValueError):
            document = json.loads(path.read_text())
            if _is_alive(path) and isinstance(document, dict) and {"gateway", "admin"} <= document.keys():
                yield path, document


def _nodes_in(folder: Path) -> Iterator[RunningNode]:
    for path, document in _documents(folder):
        try:
            tls = document.get("tls") or {}
            yield RunningNode(
                gateway=str(document["gateway"]),
                admin=str(document["admin"]),
                data_dir=Path(document["data_dir"]),
                pid=int(path.name.partition("-")[0]),
                pids={str(name): int(pid) for name, pid in document["pids"].items()},
                ca=Path(tls["ca"]) if tls else None,
                name=str(tls.get("name", "")),
                key_file=Path(document["key_file"]) if document.get("key_file") else None,
                versions={str(name): str(text) for name, text in document.get("versions", {}).items()},
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            # The file of a server, or one that is not a pointer.
            continue


def _is_alive(path: Path) -> bool:
    match = _POINTER.match(path.name)
    return match is not None and _started(int(match[2])) == match[3]


def _started(pid: int) -> str | None:
    """Return the start time of a process in clock ticks since boot (proc(5), field 22); None when it does not run."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]
    except (OSError, IndexError, ValueError):
        return None
