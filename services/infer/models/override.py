"""Override of a RepositoryModelLoad request: configuration and files that replace those of the repository.

    config                       a ModelConfig as JSON: it holds in place of config.pbtxt
    file:<version>/<name>        bytes: with any of these, the given files are all that the model consists of

The files are kept in a folder of their own while a version made of them is loaded, or may be loaded again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath

from google.protobuf import json_format, text_format

from services.infer.error_text import quoted
from services.infer.loading import model_config
from services.infer.model_files.wanted_models import (
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    ModelFiles,
    WantedModel,
    WantedVersion,
    picked,
)
from services.infer.sources import repository
from shoal.errors import FailedPrecondition, InvalidArgument
from shoal.inference.v2 import inference_pb2 as pb
from shoal.inference.v2 import model_config_pb2

_FILE = "file:"
_PREFIX, _LOCK = "shoal-load-", "lock"
_MOST_FILES = 4096
_MOST_PARTS = 8
_PART = re.compile(r"[^/\\\x00-\x1f\x7f]{1,200}")


@dataclass(frozen=True)
class Given:
    """Override parameters of one request."""

    config: str
    """As the text of a config.pbtxt."""
    files: Mapping[PurePosixPath, bytes]
    """By their path in the model's folder."""


def has_files(parameters: Mapping[str, pb.ModelRepositoryParameter]) -> bool:
    """Return True when a request carries files."""
    return any(name.startswith(_FILE) for name in parameters)


def read(parameters: Mapping[str, pb.ModelRepositoryParameter]) -> Given | None:
    """Return the override that a request carries, or None.

    Raises:
        InvalidArgument: an unknown parameter, or one of another type.
        FailedPrecondition: the configuration is invalid, a path leads out of the model's folder, or files are given
            without a configuration.
    """
    files: dict[PurePosixPath, bytes] = {}
    config: str | None = None
    for name, value in parameters.items():
        if name == "config":
            _must_be(name, value, "string_param")
            config = _config_text(value.string_param)
        elif name.startswith(_FILE):
            _must_be(name, value, "bytes_param")
            files[_path(name)] = value.bytes_param
        else:
            raise InvalidArgument(
                f"unrecognized load parameter {quoted(name)}: expected 'config' or 'file:<version>/<name>'"
            )
    if files and config is None:
        raise FailedPrecondition("files are overridden without the parameter 'config': give both")
    if len(files) > _MOST_FILES:
        raise FailedPrecondition(f"{len(files)} files: expected {_MOST_FILES} at most")
    return None if config is None else Given(config, files)


def _must_be(name: str, value: pb.ModelRepositoryParameter, kind: str) -> None:
    if value.WhichOneof("parameter_choice") != kind:
        raise InvalidArgument(f"invalid value type for load parameter {quoted(name)}, expected {kind}")


def _config_text(text: str) -> str:
    if len(text) > MAX_CONFIG_BYTES:
        raise FailedPrecondition(f"config has {len(text)} characters: expected {MAX_CONFIG_BYTES} at most")
    try:
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise FailedPrecondition("config: expected a JSON object, a ModelConfig")
        config = json_format.ParseDict(fields, model_config_pb2.ModelConfig())
    except (ValueError, RecursionError, json_format.ParseError) as err:
        raise FailedPrecondition(f"config is no ModelConfig in JSON: {str(err)[:500]}") from err
    # A parsed message cannot tell 0 from unset, and here the difference counts: unset is guessed, 0 is kept.
    is_zero = not config.max_batch_size and not fields.keys().isdisjoint(("max_batch_size", "maxBatchSize"))
    return ("max_batch_size: 0\n" if is_zero else "") + text_format.MessageToString(config)


def _path(parameter: str) -> PurePosixPath:
    parts = parameter.removeprefix(_FILE).split("/")
    if len(parts) > _MOST_PARTS or not all(_PART.fullmatch(part) and part not in (".", "..") for part in parts):
        raise FailedPrecondition(f"{quoted(parameter)} is no path in a model's folder: expected file:<version>/<name>")
    try:
        "/".join(parts).encode()
    except UnicodeError:
        raise FailedPrecondition(f"{quoted(parameter)}: the name is not UTF-8") from None
    return PurePosixPath(*parts)


@dataclass(eq=False)
class Folder:
    """Temporary folder, removed once it is released and has no holder. Used by the event loop's thread only."""

    path: Path
    _lock: int
    _holders: int = 0
    _is_released: bool = False

    @asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """Keep the folder until the block ends."""
        self._holders += 1
        try:
            yield
        finally:
            self._holders -= 1
            self._remove()

    def release(self) -> None:
        """Remove the folder as soon as it has no holder."""
        self._is_released = True
        self._remove()

    def _remove(self) -> None:
        if self._is_released and not self._holders and self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


@dataclass(frozen=True)
class Override:
    """Configuration of one load, and its files if the request had any."""

    given_config: str
    digest: str
    model: WantedModel | None = field(default=None)
    """The model made of the files; None when only the configuration is overridden."""
    folder: Folder | None = None

    def over(self, base: WantedModel | None) -> WantedModel:
        """Return the desired model when the repository has `base`, which must not be None for a configuration alone."""
        if self.model is not None:
            return self.model
        assert base is not None, "a configuration alone is given for a model that is there"
        config = model_config.parse(self.given_config)
        versions = {v.version: self._configured(v) for v in (*base.versions, *base.others)}
        if not versions:
            return base
        numbers = model_config.served_versions(config, versions, base.stable)
        return picked(base.name, versions, numbers, base.stable)

    def _configured(self, version: WantedVersion) -> WantedVersion:
        opener = partial(_with_config, version, self.given_config)
        return WantedVersion(version.version, f"{version.digest}+{self.digest}", opener, version.tenant)

    def release(self) -> None:
        """End the override, and release its folder."""
        if self.folder is not None:
            self.folder.release()


def keep(name: str, given: Given, root: Path) -> Override:
    """Make an override for the model `name`; files go into a new folder in `root`. Blocking.

    Raises:
        FailedPrecondition: the configuration is another model's, one path is another's folder, there is no version.
        OSError: the disk is full or broken.
    """
    if (said := model_config.parse(given.config).name) not in ("", name):
        raise FailedPrecondition(f"config is that of model {quoted(said)}")
    digest = hashlib.sha256(given.config.encode())
    if not given.files:
        return Override(given.config, digest.hexdigest())
    for path, data in sorted(given.files.items()):
        digest.update(b"%d %s %d " % (len(str(path).encode()), str(path).encode(), len(data)))
        digest.update(data)
    folder = _new_folder(root)
    try:
        _write(folder.path / "model", given)
        found = repository.model_in(folder.path / "model", name)
        if not found.available:
            raise FailedPrecondition(f"the files given are no model: {found.problem}")
    except BaseException:
        folder.release()
        raise
    made = {v.version: _held(v, digest.hexdigest(), folder) for v in (*found.versions, *found.others)}
    model = picked(name, made, (v.version for v in found.versions), None)
    return Override(given.config, digest.hexdigest(), model, folder)


def _write(folder: Path, given: Given) -> None:
    for path, data in given.files.items():
        try:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            with (folder / path).open("xb") as file:
                file.write(data)
        except (FileExistsError, NotADirectoryError, IsADirectoryError) as err:
            raise FailedPrecondition(f"{quoted(f'file:{path}')} is a file and a folder at once") from err
    (folder / CONFIG_FILE).write_text(given.config, encoding="utf-8")


def _held(version: WantedVersion, digest: str, folder: Folder) -> WantedVersion:
    return WantedVersion(version.version, digest, partial(_in_folder, version, folder))


@asynccontextmanager
async def _in_folder(version: WantedVersion, folder: Folder) -> AsyncIterator[ModelFiles]:
    async with folder.held(), version.open() as files:
        yield files


@asynccontextmanager
async def _with_config(version: WantedVersion, config: str) -> AsyncIterator[ModelFiles]:
    opened: AbstractAsyncContextManager[ModelFiles] = version.open()
    async with opened as files:
        yield replace(files, config=config)


def _new_folder(root: Path) -> Folder:
    path = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getuid()}-", dir=root))
    # It has its name only when it is held: whoever finds it free may remove the folder.
    lock = os.open(path / "lock.new", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    (path / "lock.new").rename(path / _LOCK)
    return Folder(path, lock)


def sweep(root: Path) -> None:
    """Removes what processes of this user that were killed have left in `root`: folders whose lock nobody holds."""
    for lock in root.glob(f"{_PREFIX}{os.getuid()}-*/{_LOCK}"):
        with suppress(OSError):
            number = os.open(lock, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent, ignore_errors=True)
            finally:
                os.close(number)
