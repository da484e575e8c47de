"""What should be served: said by a folder (`repository`) or by the store (`registry`), made so by `models`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

from shoal.errors import FailedPrecondition

CONFIG_FILE = "config.pbtxt"


@dataclass(frozen=True)
class ModelFiles:
    """One version's files, on disk, complete, and unchanged for as long as they are held open."""

    folder: Path | None
    """The model's folder: `config.pbtxt`, labels, `warmup/`. None for a bare file."""
    version_folder: Path
    """Where the model's file lies."""
    bare_file: str = ""
    """Its name, when it is all there is."""

    def config_text(self) -> str:
        """The configuration as written; empty when there is none. Raises FailedPrecondition when it cannot be read."""
        if self.folder is None or not (self.folder / CONFIG_FILE).exists():
            return ""
        return read_text(self.folder / CONFIG_FILE)


@dataclass(frozen=True)
class WantedVersion:
    """One version that should be served."""

    version: int
    digest: str
    """What it is made of: another digest is another model."""
    open: Callable[[], AbstractAsyncContextManager[ModelFiles]]
    """Brings its files here, verified, and keeps them until the block ends. Raises ShoalError or OSError."""


@dataclass(frozen=True)
class WantedModel:
    """One model that should be served."""

    name: str
    versions: tuple[WantedVersion, ...]
    """Ascending."""
    available: frozenset[int] = frozenset()
    """All versions that exist. One of them that is served already goes on until a wanted one can take over."""
    stable: int | None = None
    """The version for calls that name none, when it is ready; else it is the newest."""
    problem: str = ""
    """Why there is no version at all."""


def read_text(file: Path) -> str:
    """A small text file. Raises FailedPrecondition when it is missing or not UTF-8."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as err:
        reason = err.strerror if isinstance(err, OSError) else str(err)
        raise FailedPrecondition(f"cannot read {file.name}: {reason}") from err
