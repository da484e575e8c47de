"""Checks of model names, versions, labels and files; no name or path reaches outside the model's folder."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from services.store.artifacts.digest import brief, checked
from shoal.errors import InvalidArgument

MAX_VERSION = (1 << 63) - 1
MAX_FILES = 4_096
"""Well below the number that fits a document of 16 MiB with paths of full length."""
MAX_PATH_CHARACTERS = 1_024
MAX_LABELS = 64
MAX_LABEL_CHARACTERS = 256
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_ALIAS = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class File:
    """File of a model version. `path` is relative to the version's folder."""

    path: str
    sha256: str
    size: int


def check_name(name: str, field: str = "name") -> str:
    """Return a model name. Raises InvalidArgument when it is invalid."""
    if not _NAME.fullmatch(name):
        raise InvalidArgument(
            f"{field}: expected 1 to 128 letters, digits, '.', '_' or '-', a letter or digit first; got {brief(name)}"
        )
    return name


def check_alias(alias: str) -> str:
    """Return an alias. Raises InvalidArgument when it is invalid."""
    if not _ALIAS.fullmatch(alias):
        raise InvalidArgument(
            f"alias: expected 1 to 128 letters, digits, '.', '_' or '-', a letter first; got {brief(alias)}"
        )
    return alias


def check_version(version: int) -> int:
    """Return a version; 0 means all, none or the next. Raises InvalidArgument when it is negative."""
    if version < 0:
        raise InvalidArgument(f"version: expected 0 or more, got {version}")
    return version


def check_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """Return the labels, sorted by key. Raises InvalidArgument when one is invalid."""
    if len(labels) > MAX_LABELS:
        raise InvalidArgument(f"labels: {len(labels)} are too many: {MAX_LABELS} at most")
    for key, value in labels.items():
        if not 1 <= len(key) <= MAX_LABEL_CHARACTERS or len(value) > MAX_LABEL_CHARACTERS:
            raise InvalidArgument(
                f"labels[{brief(key)}]: keys have 1 to {MAX_LABEL_CHARACTERS} characters, values that many at most"
            )
    return dict(sorted(labels.items()))


def check_files(files: Sequence[File]) -> tuple[File, ...]:
    """Return the files, sorted by path.

    Raises:
        InvalidArgument: none or too many files, a bad path, digest or size, or two that cannot be in one folder.
    """
    if not files:
        raise InvalidArgument("files: a model version needs at least one file")
    if len(files) > MAX_FILES:
        raise InvalidArgument(f"files: {len(files)} are too many: {MAX_FILES} at most")
    for at, file in enumerate(files):
        check_path(file.path, f"files[{at}].path")
        checked(file.sha256, f"files[{at}].sha256")
        if file.size < 0:
            raise InvalidArgument(f"files[{at}].size_bytes: expected 0 or more, got {file.size}")
    _check_layout([file.path for file in files])
    return tuple(sorted(files, key=lambda file: file.path))


def check_path(path: str, field: str) -> None:
    """Check a path inside the version's folder, or inside the model's when it starts with `../`."""

    def refuse(why: str) -> NoReturn:
        raise InvalidArgument(f"{field}: {brief(path)}: {why}")

    if not 1 <= len(path) <= MAX_PATH_CHARACTERS:
        refuse(f"a path has 1 to {MAX_PATH_CHARACTERS} characters")
    if "\\" in path or any(unicodedata.category(char) in ("Cc", "Cs") for char in path):
        refuse("no backslashes and no control characters")
    if path.startswith("/"):
        refuse("a path is relative: to the version's folder, or to the model's when it starts with '../'")
    parts = path.removeprefix("../").split("/")
    if any(part in ("", ".", "..") for part in parts):
        refuse("no empty part, no '.', and no '..' but one at its start")
    if any(len(part.encode()) > 255 for part in parts):
        refuse("a file or folder name has at most 255 bytes")
    if path.startswith("../") and parts[0].isdecimal():
        refuse("a folder whose name is a number belongs to that version of the model")


def _check_layout(paths: Iterable[str]) -> None:
    """Reject a repeated path, and a path that is both a file and a folder."""
    seen: set[str] = set()
    for path in paths:
        if path in seen:
            raise InvalidArgument(f"files: the path {brief(path)} occurs twice")
        seen.add(path)
    for path in seen:
        parts = path.split("/")
        for end in range(1, len(parts)):
            if (folder := "/".join(parts[:end])) in seen:
                raise InvalidArgument(f"files: {brief(folder)} cannot be a file and the folder of {brief(path)}")


def content_digest(files: Iterable[File]) -> str:
    """Return the digest of a version: SHA-256 over `<path> NUL <sha256> LF` of its files, sorted by path."""
    found = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.path):
        found.update(f"{file.path}\0{file.sha256}\n".encode())
    return found.hexdigest()
