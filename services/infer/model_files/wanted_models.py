"""Desired models: declared by a folder (`repository`) or the store (`registry`), loaded by `models`."""

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
# Labels of a million classes take some ten megabytes.
_MAX_TEXT_BYTES = 64 << 20


@dataclass(frozen=True)
class ModelFiles:
    """Files of one version on disk, complete and unchanged while they are held open."""

    folder: Path | None
    """The model's folder: `config.pbtxt`, labels, `warmup/`. None for a bare file."""
    version_folder: Path
    """Folder of the model's file."""
    bare_file: str = ""
    """Name of the file of a model without a folder; empty otherwise."""
    config: str | None = None
    """Configuration that replaces `config.pbtxt`."""

    def config_text(self) -> str:
        """Return the configuration's text, or an empty text. Raises FailedPrecondition when the file is unreadable."""
        if self.config is not None:
            return self.config
        if self.folder is None or not os.path.lexists(self.folder / CONFIG_FILE):
            return ""
        return read_text(self.folder / CONFIG_FILE, MAX_CONFIG_BYTES)


@dataclass(frozen=True)
class WantedVersion:
    """One desired version."""

    version: int
    digest: str
    """Digest of the content: another digest is another model."""
    open: Callable[[], AbstractAsyncContextManager[ModelFiles]] = field(compare=False)
    """Provides the verified files until the block ends. Raises ShoalError or OSError."""
    tenant: str = field(default="", compare=False)
    """Tenant that registered the version; empty when none is known. Tenants share the loads at a time."""


@dataclass(frozen=True)
class WantedModel:
    """One desired model."""

    name: str
    versions: tuple[WantedVersion, ...]
    """Ascending."""
    available: frozenset[int] = frozenset()
    """All existing versions. A serving one goes on until a desired version can take over."""
    stable: int | None = None
    """Version of requests that name none, while it is ready; otherwise the newest ready one."""
    problem: str = ""
    """Reason why the model has no version at all."""
    is_unloaded: bool = False
    """True for a known model that is not to be served; the index shows it."""
    others: tuple[WantedVersion, ...] = ()
    """Existing versions that are not desired; another configuration may select them."""

    @property
    def is_served(self) -> bool:
        """True when a version is desired, or the model is desired and has a problem."""
        return bool(self.versions or self.problem)


def picked(name: str, there: Mapping[int, WantedVersion], numbers: Iterable[int], stable: int | None) -> WantedModel:
    """Return the model with the existing versions `there`, of which those in `numbers` are desired."""
    wanted = set(numbers)
    return WantedModel(
        name,
        tuple(version for n, version in sorted(there.items()) if n in wanted),
        frozenset(there),
        stable,
        "" if wanted else "its version_policy selects none of its versions",
        others=tuple(version for n, version in sorted(there.items()) if n not in wanted),
    )


def read_text(file: Path, most_bytes: int = _MAX_TEXT_BYTES) -> str:
    """Read a small text file. Raises FailedPrecondition when it is missing, not UTF-8, too large, or no plain file."""
    try:
        return read_bytes(file, most_bytes).decode("utf-8")
    except UnicodeError as err:
        raise FailedPrecondition(f"cannot read {file.name}: {err}") from err


def read_bytes(file: Path, most_bytes: int) -> bytes:
    """Read a whole file. Raises FailedPrecondition when it is missing, too large, or no plain file."""
    try:
        # Non-blocking: opening a pipe without a writer would block for ever.
        with os.fdopen(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as opened:
            if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
                raise FailedPrecondition(f"cannot read {file.name}: it is no plain file")
            data = opened.read(most_bytes + 1)
    except OSError as err:
        raise FailedPrecondition(f"cannot read {file.name}: {err.strerror}") from err
    if len(data) > most_bytes:
        raise FailedPrecondition(f"cannot read {file.name}: it has more than {most_bytes} bytes")
    return data
