"""Files of a model on disk: one bare `.onnx` file, or a folder in Triton's layout.

mymodel/                     name: mymodel
    config.pbtxt             ../config.pbtxt   belongs to every version
    labels.txt               ../labels.txt
    1/model.onnx             version 1: model.onnx
    2/model.onnx             version 2: model.onnx
    2/tokens/vocab.txt                  tokens/vocab.txt

A remote model (backend "remote") consists of its config.pbtxt alone; it needs no version folder.
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
# Files of editors, file browsers, version control and Python: never part of a model.
_IGNORED = re.compile(r"^(\..*|__pycache__|.*~|Thumbs\.db)$")
# Files for weights that exceed the .onnx file (protobuf's limit is 2 GiB).
# As in the registry.
_LARGEST_VERSION = (1 << 63) - 1
_EXTERNAL_DATA = (".data", "_data", ".weights")


@dataclass(frozen=True)
class Bundle:
    """Files of one model version, sorted: pairs of the path in the registry and the local path."""

    name: str
    version: int
    """0: assign the next free number."""
    files: tuple[tuple[str, Path], ...]


def read(path: Path, *, name: str | None = None, version: int | None = None) -> list[Bundle]:
    """Return the versions in `path`, ascending; with `version` only that one.

    Raises:
        NotFound: `path` or the version does not exist.
        InvalidArgument: `path` is not a model; the message says what `path` looks like.
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
    files = [("model.onnx", path), *((data_file.name, data_file) for data_file in _external_data(path))]
    return [Bundle(checked(name or path.stem), version or 0, tuple(sorted(files)))]


def renumbered(bundles: Sequence[Bundle], version: int | None) -> Bundle:
    """Return the only element of `bundles` as `version`; None means the next free number.

    Raises:
        InvalidArgument: there are several bundles, or `version` is below 1.
    """
    if len(bundles) != 1:
        raise InvalidArgument(f"{bundles[0].name} has {len(bundles)} versions: only one can get another number")
    if version is not None and version < 1:
        raise InvalidArgument(f"version {version}: versions count from 1")
    return replace(bundles[0], version=version or 0)


def checked(name: str) -> str:
    """Return `name`. Raises InvalidArgument when `name` is not a valid model name."""
    if not _NAME.match(name):
        allowed = "letters, digits, `.`, `_`, `-`, starting with a letter or digit"
        raise InvalidArgument(f"model name {name!r}: use {allowed} (1 to 128 characters): set one with --name")
    return name


def _external_data(path: Path) -> Iterator[Path]:
    for ending in _EXTERNAL_DATA:
        data_file = path.with_name(path.name + ending)
        if data_file.is_file():
            yield data_file


def _read_folder(folder: Path, name: str, version: int | None) -> list[Bundle]:
    versions = sorted(int(child.name) for child in folder.iterdir() if _is_version(child))
    if versions and versions[-1] > _LARGEST_VERSION:
        raise InvalidArgument(f"{folder}/{versions[-1]}: a version is at most {_LARGEST_VERSION}")
    if not versions and configuration(folder).backend == "remote":
        common = [(f"../{relative_path}", file) for relative_path, file in _files(folder)]
        return [Bundle(name, version or 0, tuple(sorted(common)))]
    if not versions:
        raise InvalidArgument(_missing_hint(folder))
    if version is not None and version not in versions:
        raise NotFound(f"{folder}: no version {version}; versions: {', '.join(map(str, versions))}")
    common = [(f"../{relative_path}", file) for relative_path, file in _files(folder, skip=_is_version)]
    return [
        Bundle(name, number, tuple(sorted([*_files(folder / str(number)), *common])))
        for number in (versions if version is None else [version])
    ]


def configuration(folder: Path) -> ModelConfig:
    """Return the folder's parsed config.pbtxt; empty when missing, or invalid, which the server reports at load."""
    try:
        return text_format.Parse((folder / "config.pbtxt").read_text(), ModelConfig())
    except (OSError, UnicodeError, text_format.ParseError):
        return ModelConfig()


def _is_version(child: Path) -> bool:
    # `01` is not a version: it would be the same number as `1`.
    return child.is_dir() and child.name.isascii() and child.name.isdecimal() and child.name[0] != "0"


def _files(folder: Path, skip: Callable[[Path], bool] = lambda child: False) -> Iterator[tuple[str, Path]]:
    for child in sorted(folder.iterdir()):
        if _IGNORED.match(child.name) or skip(child):
            continue
        if child.is_file():
            yield child.name, child
        elif child.is_symlink():
            # A link to a folder may form a cycle; a link to nothing would be a missing file later.
            raise InvalidArgument(f"{child} is a link to {child.readlink()}: link only to existing files")
        elif child.is_dir():
            yield from ((f"{child.name}/{relative_path}", file) for relative_path, file in _files(child))


def _missing_hint(folder: Path) -> str:
    models = sorted(child.name for child in folder.iterdir() if looks_like_model(child))
    if models:
        return f"{folder} is a repository of models ({', '.join(models[:5])}): push one of them: {folder / models[0]}"
    bare = sorted(folder.glob("*.onnx"))
    if len(bare) > 1:
        return (
            f"{folder} has {len(bare)} .onnx files, and no folder for each model: push each file, such as {bare[0]}, "
            f"or put each into a folder, as {folder / bare[0].stem / '1' / 'model.onnx'}"
        )
    if bare:
        return f"{folder} has no version folder: push the file itself: {bare[0]} --name {folder.resolve().name}"
    if (folder / "config.pbtxt").is_file():
        return (
            f"{folder} is not a model, it has no version: put the model into a folder named 1 (an empty folder for an "
            "ensemble or a preprocessing operator; git keeps it when it holds a .gitkeep)"
        )
    return f"{folder} is not a model: expected <version>/model.onnx, such as {folder / '1' / 'model.onnx'}"


def looks_like_model(path: Path) -> bool:
    """Return True when `path` is a folder with a configuration or with version folders."""
    return path.is_dir() and ((path / "config.pbtxt").is_file() or any(map(_is_version, path.iterdir())))
