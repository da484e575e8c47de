"""What a model on disk consists of: one bare `.onnx` file, or a folder in Triton's layout.

mymodel/                     name: mymodel
    config.pbtxt             ../config.pbtxt   of every version
    labels.txt               ../labels.txt
    1/model.onnx             version 1: model.onnx
    2/model.onnx             version 2: model.onnx
    2/tokens/vocab.txt                  tokens/vocab.txt

A model of another server (backend "remote") is its config.pbtxt alone: it needs no folder of a version.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from google.protobuf import text_format

from shoal.errors import InvalidArgument, NotFound
from shoal.inference.v2.model_config_pb2 import ModelConfig

_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")
# Left by editors, file browsers, version control and Python: never part of a model.
_IGNORED = re.compile(r"^(\..*|__pycache__|.*~|Thumbs\.db)$")
# Where exporters put weights that do not fit the .onnx file (protobuf ends at 2 GiB).
_EXTERNAL_DATA = (".data", "_data", ".weights")


@dataclass(frozen=True)
class Bundle:
    """The files of one version: path in the registry, and where it lies here, sorted by path."""

    name: str
    version: int
    """0: the next free number."""
    files: tuple[tuple[str, Path], ...]


def read(path: Path, *, name: str | None = None, version: int | None = None) -> list[Bundle]:
    """The versions that `path` holds, ascending; only `version`, when it is given.

    Raises:
        NotFound: nothing is there, or not that version.
        InvalidArgument: it is no model; the message says what it looks like.
    """
    if version is not None and version < 1:
        raise InvalidArgument(f"version {version}: versions count from 1")
    path = Path(path)
    if path.is_dir():
        return _read_folder(path, checked(name or path.resolve().name), version)
    if not path.exists():
        raise NotFound(f"{path}: no such file or folder")
    if path.suffix != ".onnx":
        raise InvalidArgument(f"{path}: expected a .onnx file, or a model folder with <version>/model.onnx in it")
    files = [("model.onnx", path), *((side.name, side) for side in _external_data(path))]
    return [Bundle(checked(name or path.stem), version or 0, tuple(sorted(files)))]


def renumbered(bundles: Sequence[Bundle], version: int | None) -> Bundle:
    """The one of `bundles`, as `version`; as the next free one when that is None.

    Raises:
        InvalidArgument: there are several, or `version` is none.
    """
    if len(bundles) != 1:
        raise InvalidArgument(f"{bundles[0].name} has {len(bundles)} versions: only one can get another number")
    if version is not None and version < 1:
        raise InvalidArgument(f"version {version}: versions count from 1")
    return replace(bundles[0], version=version or 0)


def checked(name: str) -> str:
    """`name`. Raises InvalidArgument when no model may be called that."""
    if not _NAME.match(name):
        allowed = "letters, digits, `.`, `_`, `-`, starting with a letter or digit"
        raise InvalidArgument(f"model name {name!r}: use {allowed} (1 to 128 characters): give one with --name")
    return name


def _external_data(path: Path) -> Iterator[Path]:
    for ending in _EXTERNAL_DATA:
        side = path.with_name(path.name + ending)
        if side.is_file():
            yield side


def _read_folder(folder: Path, name: str, version: int | None) -> list[Bundle]:
    versions = sorted(int(child.name) for child in folder.iterdir() if _is_version(child))
    if not versions and configuration(folder).backend == "remote":
        beside = [(f"../{inside}", file) for inside, file in _files(folder)]
        return [Bundle(name, version or 0, tuple(sorted(beside)))]
    if not versions:
        raise InvalidArgument(_what_is_missing(folder))
    if version is not None and version not in versions:
        raise NotFound(f"{folder}: no version {version} in it: there are {', '.join(map(str, versions))}")
    beside = [(f"../{inside}", file) for inside, file in _files(folder, skip=_is_version)]
    return [
        Bundle(name, number, tuple(sorted([*_files(folder / str(number)), *beside])))
        for number in (versions if version is None else [version])
    ]


def configuration(folder: Path) -> ModelConfig:
    """What the folder's config.pbtxt says; an empty one where there is none, or none that can be read: the server says
    why."""
    try:
        return text_format.Parse((folder / "config.pbtxt").read_text(), ModelConfig())
    except (OSError, UnicodeError, text_format.ParseError):
        return ModelConfig()


def _is_version(child: Path) -> bool:
    # `01` is no version: `1` would be the same one.
    return child.is_dir() and child.name.isascii() and child.name.isdecimal() and child.name[0] != "0"


def _files(folder: Path, skip: Callable[[Path], bool] = lambda child: False) -> Iterator[tuple[str, Path]]:
    for child in sorted(folder.iterdir()):
        if _IGNORED.match(child.name) or skip(child):
            continue
        if child.is_file():
            yield child.name, child
        elif child.is_symlink():  # To a folder it may lead in circles, to nothing it is a file that will be missed.
            raise InvalidArgument(f"{child} is a link to {child.readlink()}: link files only, to files that exist")
        elif child.is_dir():
            yield from ((f"{child.name}/{inside}", file) for inside, file in _files(child))


def _what_is_missing(folder: Path) -> str:
    models = sorted(child.name for child in folder.iterdir() if looks_like_model(child))
    if models:
        return f"{folder} is a repository of models ({', '.join(models[:5])}): push one of them: {folder / models[0]}"
    bare = sorted(folder.glob("*.onnx"))
    if bare:
        return f"{folder} has no version folder: push the file itself: {bare[0]} --name {folder.resolve().name}"
    if (folder / "config.pbtxt").is_file():
        return (
            f"{folder} is no model yet, it has no version: put the model into a folder named 1 (an empty one for an "
            "ensemble or an operation; git keeps it when it holds a .gitkeep)"
        )
    return f"{folder} is no model: expected <version>/model.onnx in it, such as {folder / '1' / 'model.onnx'}"


def looks_like_model(path: Path) -> bool:
    """Whether it is a folder with a configuration, or with versions."""
    return path.is_dir() and ((path / "config.pbtxt").is_file() or any(map(_is_version, path.iterdir())))
