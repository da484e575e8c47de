"""The word that a node is ready: a JSON file, whole at every moment, there only while the node is ready."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from shoal.errors import InvalidArgument
from shoal.node.folder import write_whole


@dataclass(frozen=True)
class Ready:
    """Where a ready node is, and which processes it is made of."""

    gateway: str
    """`host:port`"""
    admin: str
    data_dir: Path
    pids: Mapping[str, int]
    """By name: `infer-0`, `envoy`, `etcd` ... A part that was given by URL is not among them."""

    def as_json(self) -> str:
        document: dict[str, object] = {
            "gateway": self.gateway,
            "admin": self.admin,
            "data_dir": str(self.data_dir),
            "pids": dict(self.pids),
        }
        return json.dumps(document, indent=2)


class ReadyFiles:
    """The same word in several places. None is there when the block begins, and none when it has ended."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = tuple(paths)

    def check(self) -> None:
        """Sees to it that the files can be written, and that none is left of an earlier run.

        Raises:
            InvalidArgument: one cannot.
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
        """Writes all of them; returns what went wrong with which, in words: a full disk must not end a node."""
        troubles = []
        for path in self._paths:
            try:
                write_whole(path, ready.as_json() + "\n")
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
