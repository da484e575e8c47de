"""A folder of models, as `shoal serve` takes it.

    REPO/<model>/config.pbtxt          optional
    REPO/<model>/<version>/model.onnx  one folder for each version: 1, 2, ...
    REPO/<model>.onnx                  a bare file: version 1 of a model of that name

It is read once, at start. A model that is wrong does not keep the others from being served: it is UNAVAILABLE, and the
repository index says why.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path

from services.infer import modelconfig
from services.infer.wanted import ModelFiles, WantedModel, WantedVersion
from shoal.errors import FailedPrecondition, ShoalError

_VERSION = re.compile(r"[1-9][0-9]{0,17}")


def scan(root: Path) -> list[WantedModel]:
    """The models of the repository `root`, sorted by name. A file `x.onnx` is a repository of one model.

    Raises:
        FailedPrecondition: it is not there, cannot be read, or is one model's folder; the message says what to give.
    """
    try:
        if root.is_file() and root.suffix == ".onnx":
            return [_bare(root)]
        if not root.is_dir():
            raise FailedPrecondition(f"{root} is not a folder: give a folder of models")
        if (root / "config.pbtxt").exists() or any(_version_folders(root)):
            raise FailedPrecondition(f"{root} is the folder of one model: give the folder that it lies in")
        entries = sorted(path for path in root.iterdir() if not path.name.startswith("."))
    except OSError as err:
        raise FailedPrecondition(f"cannot read the repository {root}: {err.strerror}") from err
    models: dict[str, WantedModel] = {}
    for path in entries:
        if path.is_dir():
            models[path.name] = _folder(path)
        elif path.suffix == ".onnx" and path.stem not in models:
            models[path.stem] = _bare(path)
    return [models[name] for name in sorted(models)]


def _bare(file: Path) -> WantedModel:
    files = ModelFiles(None, file.parent, file.name)
    return WantedModel(file.stem, (WantedVersion(1, str(file), _opener(files)),), frozenset({1}))


def _folder(folder: Path) -> WantedModel:
    try:
        versions = dict(_version_folders(folder))
    except OSError as err:
        return WantedModel(folder.name, (), problem=f"cannot read its folder: {err.strerror}")
    if not versions:
        return WantedModel(folder.name, (), problem="its folder has no version: put the model into a folder named 1")
    try:
        config = modelconfig.parse(ModelFiles(folder, folder).config_text())
        picked = modelconfig.served_versions(config, versions)
    except ShoalError:  # Loading the newest version says the same, as the reason of that version.
        picked = (max(versions),)
    if not picked:
        return WantedModel(folder.name, (), problem="its version_policy picks none of the versions that it has")
    wanted = (WantedVersion(n, str(versions[n]), _opener(ModelFiles(folder, versions[n]))) for n in picked)
    return WantedModel(folder.name, tuple(wanted), frozenset(versions))


def _version_folders(folder: Path) -> Iterator[tuple[int, Path]]:
    for path in folder.iterdir():
        if _VERSION.fullmatch(path.name) and path.is_dir():
            yield int(path.name), path


def _opener(files: ModelFiles) -> Callable[[], AbstractAsyncContextManager[ModelFiles]]:
    return partial(_in_place, files)


@asynccontextmanager
async def _in_place(files: ModelFiles) -> AsyncIterator[ModelFiles]:
    yield files
