"""Model repository: a folder of models, as `shoal serve` takes it.

    REPO/<model>/config.pbtxt          optional
    REPO/<model>/<version>/model.onnx  one folder for each version: 1, 2, ...
    REPO/<model>.onnx                  a bare file: version 1 of a model of that name

A model without files (backend "remote") needs no version folder: it is version 1.

An invalid model does not keep the others from being served: it is UNAVAILABLE, and the repository index says why.
Symbolic links are followed; only plain files are read, no pipes or devices.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path

from services.infer.loading import model_config
from services.infer.model_files.wanted_models import ModelFiles, WantedModel, WantedVersion, picked
from shoal.errors import FailedPrecondition, ShoalError

_VERSION = re.compile(r"[1-9][0-9]{0,17}")
_BARE = ".onnx"
# In bytes: the limit of file systems.
_LONGEST_NAME = 255 - len(_BARE)
# Python writes this folder when it runs a model: no change of the model.
_COMPILED = "__pycache__"
# Files of one version that are checked for changes. No model has more; a huge folder would slow every scan.
_MOST_FILES = 10_000


def check(root: Path) -> None:
    """Check that `root` is a repository. Raises FailedPrecondition otherwise; the message says what to give."""
    try:
        if root.is_file() and root.suffix == _BARE:
            return
        if not root.is_dir():
            raise FailedPrecondition(f"{root} is not a folder: give a folder of models, or one .onnx file")
        if (root / "config.pbtxt").exists() or any(_version_folders(root)):
            raise FailedPrecondition(f"{root} is the folder of one model: give the folder that it lies in")
    except OSError as err:
        raise FailedPrecondition(f"cannot read the repository {root}: {err.strerror}") from err


def scan(root: Path) -> list[WantedModel]:
    """Return the models of the repository `root`, sorted by name. A file `x.onnx` is a repository of one model.

    Raises:
        FailedPrecondition: `root` is missing, unreadable, or the folder of one model; the message says what to give.
    """
    check(root)
    if root.is_file():
        return [model for model in [_entry(root)] if model is not None]
    try:
        names = sorted(name for name in os.listdir(root) if not name.startswith("."))
    except OSError as err:
        raise FailedPrecondition(f"cannot read the repository {root}: {err.strerror}") from err
    models: dict[str, WantedModel] = {}
    for name in names:
        model = _entry(root / name)
        # A folder comes before a bare file of the same name.
        if model is not None and (model.name not in models or not name.endswith(_BARE)):
            models[model.name] = model
    return [models[name] for name in sorted(models)]


def look(root: Path, name: str) -> WantedModel | None:
    """Return the model `name` of the repository as it is now, or None. Raises nothing."""
    if root.is_file():
        return _entry(root) if root.stem == name else None
    if not name or name.startswith(".") or "/" in name or "\0" in name or len(name.encode()) > _LONGEST_NAME:
        return None
    for path in (root / name, root / f"{name}{_BARE}"):
        if os.path.lexists(path) and (found := _entry(path)) is not None and found.name == name:
            return found
    return None


def model_in(folder: Path, name: str) -> WantedModel:
    """Return the model in `folder`, under the name `name`."""
    try:
        versions = dict(_version_folders(folder))
        stamp = _stamp(entry for entry in _entries(folder) if entry.name not in {str(n) for n in versions})
        stamps = {n: f"{stamp}/{_stamp(_entries(path))}" for n, path in versions.items()}
    except OSError as err:
        return WantedModel(name, (), problem=f"cannot read its folder: {err.strerror}")
    if not versions and _has_no_files(folder):
        versions, stamps = {1: folder}, {1: stamp}
    if not versions:
        return WantedModel(name, (), problem="its folder has no version: put the model into a folder named 1")
    there = {n: WantedVersion(n, stamps[n], _opener(ModelFiles(folder, versions[n]))) for n in sorted(versions)}
    try:
        config = model_config.parse(ModelFiles(folder, folder).config_text())
    # The load of the newest version reports the same error as its reason.
    except ShoalError:
        config = model_config.parse("")
    return picked(name, there, model_config.served_versions(config, there), None)


def _has_no_files(folder: Path) -> bool:
    """Return True when a model consists of its configuration only."""
    try:
        return model_config.parse(ModelFiles(folder, folder).config_text()).backend == model_config.REMOTE
    except ShoalError:
        return False


def _entry(path: Path) -> WantedModel | None:
    """Return the model at `path`, or None when `path` is no model."""
    name = os.fsencode(path.name).decode("utf-8", "backslashreplace")
    try:
        return _model_at(path, name)
    except OSError as err:
        return WantedModel(name, (), problem=f"cannot look at it: {err.strerror}")


def _model_at(path: Path, name: str) -> WantedModel | None:
    if name != path.name:
        is_one = path.is_dir() or path.suffix == _BARE
        return WantedModel(name, (), problem="its name is not UTF-8: rename it") if is_one else None
    if path.is_dir():
        return model_in(path, name)
    if path.suffix == _BARE and path.is_file():
        return _bare(path)
    if path.is_symlink() and not path.exists():
        return WantedModel(name, (), problem="it is a symbolic link that leads nowhere")
    return None


def _bare(file: Path) -> WantedModel:
    files = ModelFiles(None, file.parent, file.name)
    try:
        status = file.stat()
    except OSError as err:
        return WantedModel(file.stem, (), problem=f"cannot read {file.name}: {err.strerror}")
    return WantedModel(file.stem, (WantedVersion(1, f"{file} {_state(status)}", _opener(files)),), frozenset({1}))


def _version_folders(folder: Path) -> Iterator[tuple[int, Path]]:
    for name in os.listdir(folder):
        if _VERSION.fullmatch(name) and (folder / name).is_dir():
            yield int(name), folder / name


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _stamp(entries: Iterable[os.DirEntry[str]]) -> str:
    """Return a digest of the files' names, times and sizes, with those of the folders below."""
    lines: list[str] = []
    left = [entry for entry in entries if entry.name != _COMPILED]
    while left and len(lines) < _MOST_FILES:
        entry = left.pop()
        try:
            if entry.is_dir(follow_symlinks=False):
                left.extend(below for below in _entries(Path(entry.path)) if below.name != _COMPILED)
                continue
            status = entry.stat()
        # Deleted or unreadable: if the file matters, the load reports it.
        except OSError:
            continue
        lines.append(f"{entry.path!r} {_state(status)}")
    return hashlib.blake2b("\n".join(sorted(lines)).encode(), digest_size=16).hexdigest()


def _state(status: os.stat_result) -> str:
    return f"{status.st_mtime_ns} {status.st_size} {status.st_ino}"


def _opener(files: ModelFiles) -> Callable[[], AbstractAsyncContextManager[ModelFiles]]:
    return partial(_in_place, files)


@asynccontextmanager
async def _in_place(files: ModelFiles) -> AsyncIterator[ModelFiles]:
    yield files
