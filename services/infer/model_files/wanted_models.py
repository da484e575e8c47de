"""What should be served: said by a folder (`repository`) or by the store (`registry`), made so by `models`."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path

from shoal.errors import FailedPrecondition

CONFIG_FILE = "config.pbtxt"

MAX_CONFIG_BYTES = 4 << 20
_MAX_TEXT_BYTES = 64 << 20
# Labels of a million classes are some ten megabytes.


@dataclass(frozen=True)
class ModelFiles:
    """One version's files, on disk, complete, and unchanged for as long as they are held open."""

    folder: Path | None
    """The model's folder: `config.pbtxt`, labels, `warmup/`. None for a bare file."""
    version_folder: Path
    """Where the model's file lies."""
    bare_file: str = ""
    """Its name, when it is all there is."""
    config: str | None = None
    """The configuration that holds in place of `config.pbtxt`."""

    def config_text(self) -> str:
        """The configuration as written; empty when there is none. Raises FailedPrecondition when it cannot be read."""
        if self.config is not None:
            return self.config
        if self.folder is None or not os.path.lexists(self.folder / CONFIG_FILE):
            return ""
        return read_text(self.folder / CONFIG_FILE, MAX_CONFIG_BYTES)


@dataclass(frozen=True)
class WantedVersion:
    """One version that should be served."""

    version: int
    digest: str
    """What it is made of: another digest is another model."""
    open: Callable[[], AbstractAsyncContextManager[ModelFiles]] = field(compare=False)
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
    is_unloaded: bool = False
    """It is known, and is not to be served: the index says so."""
    others: tuple[WantedVersion, ...] = ()
    """Versions that exist beside those that should be served: another configuration may pick them."""

    @property
    def is_served(self) -> bool:
        """Whether anything of it should be served."""
        return bool(self.versions or self.problem)


def picked(name: str, there: Mapping[int, WantedVersion], numbers: Iterable[int], stable: int | None) -> WantedModel:
    """The model with the versions that are `there`, of which those with `numbers` should be served."""
    wanted = set(numbers)
    return WantedModel(
        name,
        tuple(version for n, version in sorted(there.items()) if n in wanted),
        frozenset(there),
        stable,
        "" if wanted else "its version_policy picks none of the versions that it has",
        others=tuple(version for n, version in sorted(there.items()) if n not in wanted),
    )


def read_text(file: Path, most_bytes: int = _MAX_TEXT_BYTES) -> str:
    """A small text file. Raises FailedPrecondition when it is missing, not UTF-8, too large, or no plain file."""
    try:
        return read_bytes(file, most_bytes).decode("utf-8")
    except UnicodeError as err:
        raise FailedPrecondition(f"cannot read {file.name}: {err}") from err


def read_bytes(file: Path, most_bytes: int) -> bytes:
    """A whole file. Raises FailedPrecondition when it is missing, too large, or no plain file."""
    try:
        # Without waiting: a pipe that nobody writes to would be waited for without end.
        with os.fdopen(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as opened:
            if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
                raise FailedPrecondition(f"cannot read {file.name}: it is no plain file")
            data = opened.read(most_bytes + 1)
    except OSError as err:
        raise FailedPrecondition(f"cannot read {file.name}: {err.strerror}") from err
    if len(data) > most_bytes:
        raise FailedPrecondition(f"cannot read {file.name}: it has more than {most_bytes} bytes")
    return data
