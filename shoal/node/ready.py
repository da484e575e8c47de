"""Ready files of a node: JSON with its addresses and pids, written atomically, present only while the node is ready."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from mesh.process.files import write_atomically
from shoal.errors import InvalidArgument

if TYPE_CHECKING:
    from shoal.node.tls.served import Trust


@dataclass(frozen=True)
class Ready:
    """Addresses and processes of a ready node."""

    gateway: str
    """`host:port`, as processes of this machine call it."""
    admin: str
    """`host:port`"""
    data_dir: Path
    pids: Mapping[str, int]
    """Pids by name: `infer-0`, `envoy`, `etcd` ... An etcd or MongoDB that runs elsewhere has none."""
    listen: str = ""
    """`host:port` that the gateway listens at."""
    trust: Trust | None = None
    """Certificate of the gateway; None: clients speak plaintext."""
    key_file: Path | None = None
    """Key of the node's user; None: callers are not authenticated."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of the node's own etcd, mongod and Envoy."""

    def as_json(self) -> str:
        document: dict[str, object] = {
            "gateway": self.gateway,
            "listen": self.listen or self.gateway,
            "tls": None if self.trust is None else dataclasses.asdict(self.trust),
            "key_file": None if self.key_file is None else str(self.key_file),
            "admin": self.admin,
            "data_dir": str(self.data_dir),
            "pids": dict(self.pids),
            "versions": dict(self.versions),
        }
        return json.dumps(document, indent=2)


class ReadyFiles:
    """Ready files in several folders. Entering the block removes old ones; leaving the block removes them all."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = tuple(paths)

    def check(self) -> None:
        """Check that the files can be written, and remove those of an earlier run.

        Raises:
            InvalidArgument: a file cannot be written.
        """
        for path in self._paths:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                trial = path.with_name(f".{path.name}.trial")
                trial.touch()
                trial.unlink()
                path.unlink(missing_ok=True)
            except OSError as err:
                raise InvalidArgument(f"the ready file {path} cannot be written: {err.strerror}") from err

    def write(self, ready: Ready) -> list[str]:
        """Write all files. Return a message for each failure: a full disk must not end a node."""
        troubles = []
        for path in self._paths:
            try:
                write_atomically(path, ready.as_json() + "\n")
            except OSError as err:
                troubles.append(f"the ready file {path} cannot be written: {err.strerror}")
        return troubles

    def remove(self) -> None:
        for path in self._paths:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def __enter__(self) -> ReadyFiles:
        self.check()
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        self.remove()
