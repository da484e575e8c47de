"""Storage locations by URL: local files and objects of an object store.

    file:///data/rows.parquet    s3://bucket/rows.jsonl    gs://bucket/images/    az://container/rows.npz

Writes are atomic, and durable when the call returns. All functions block: run them in a thread.

The operator configures the allowed URLs, because files are read and written with the rights of this process.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import ObjectStore, from_url

from mesh.tenant_locations import of_tenant
from services.ingest.batches.inputs.ranged import Ranged
from shoal.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    ShoalError,
    Unavailable,
)

SCHEMES = ("file", "s3", "gs", "az")
URL_CHARS = 2_048
# Time until an unavailable object store is reported. obstore's default is three minutes, which is too long for callers.
_RETRY = timedelta(seconds=10)
_PART_BYTES = 8 << 20
_PARTS_AT_ONCE = 4
_LISTED_AT_ONCE = 1_000
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@dataclass(frozen=True, slots=True)
class Entry:
    """Snapshot of a file's or an object's identity: URL, size and version."""

    url: str
    size: int
    version: str
    """Changes when the content does: an object's e-tag, a file's size and time."""


class InputLocations:
    """Access to the locations whose URLs lie below one of `allowed`.

    Verified callers do not trust each other: each uses the locations of its tenant (`mesh.tenant_locations`).
    """

    def __init__(self, allowed: Sequence[str]) -> None:
        self._allowed = tuple(allowed)
        self._stores: dict[str, ObjectStore] = {}

    def check(self, field: str, url: str, tenant: str | None = None) -> str:
        """Return `url` in canonical form. `tenant` is that of a verified caller; None without a policy.

        Raises:
            InvalidArgument: the URL is malformed. PermissionDenied: the operator does not allow it.
        """
        scheme, separator, rest = url.partition("://")
        if len(url) > URL_CHARS or not separator or scheme not in SCHEMES or not rest or "\0" in url:
            raise InvalidArgument(
                f"{field}: {url[:200]!r} is not a URL of a storage location: expected "
                "file:///path, s3://bucket/key, gs://bucket/key or az://container/key"
            )
        known = _local(field, rest) if scheme == "file" else f"{scheme}://{_key(field, rest)}"
        roots = self._allowed if tenant is None else of_tenant(self._allowed, tenant)
        if not any(is_within(known, _resolved(root)) for root in roots):
            allowed = ", ".join(roots) or "none"
            example = "s3://bucket/prefix" if tenant is None else "s3://bucket/{tenant}"
            raise PermissionDenied(
                f"{field}: {url[:200]!r} may not be used here; this node allows: {allowed}. The operator names others "
                f"in SHOAL_INGEST_BATCH_URLS, such as {example}"
            )
        return known

    def stat(self, url: str) -> Entry:
        """Return the entry of a file or object.

        Raises:
            NotFound: it does not exist. PermissionDenied, Unavailable.
        """
        with _translated(f"looking up {url}"):
            if path := _path(url):
                return _entry_of(path)
            store, key = self._object(url)
            return _object_entry(url, obstore.head(store, key))

    def is_file(self, url: str) -> bool:
        """Return True when the URL is a local file. (In an object store a name may be object and prefix.)"""
        return (path := _path(url)) is not None and path.is_file()

    def open(self, entry: Entry) -> BinaryIO:
        """Open an entry as a seekable file. The caller closes it. Raises as `stat` does."""
        with _translated(f"reading {entry.url}"):
            if path := _path(entry.url):
                return path.open("rb")
        store, key = self._object(entry.url)

        def read(start: int, end: int) -> bytes:
            with _translated(f"reading {entry.url}"):
                return bytes(obstore.get_range(store, key, start=start, end=end))

        return Ranged(read, entry.size)

    def read(self, url: str, max_bytes: int) -> bytes:
        """Return the content of a file or object.

        Raises:
            InvalidArgument: it is larger than `max_bytes`. NotFound, PermissionDenied, Unavailable.
        """
        entry = self.stat(url)
        if entry.size > max_bytes:
            raise InvalidArgument(f"{url} has {entry.size} bytes: at most {max_bytes} are accepted")
        with self.open(entry) as file:
            return file.read()

    def fetch(self, url: str) -> tuple[Entry, bytes]:
        """Return a small file's or object's content, with the entry that it belongs to. Raises as `stat` does."""
        with _translated(f"reading {url}"):
            if path := _path(url):
                return _entry_of(path), path.read_bytes()
            store, key = self._object(url)
            got = obstore.get(store, key)
            return _object_entry(url, got.meta), bytes(got.bytes())

    def list(self, url: str) -> Iterator[Entry]:
        """Yield the entries below the prefix `url`, which ends with a slash. Local files are sorted by path.

        Folders and names that begin with a dot are left out. Raises as `stat` does, while iterating.
        """
        with _translated(f"listing {url}"):
            if path := _path(url):
                yield from _walk(path)
                return
            store, key = self._object(url)
            for page in obstore.list(store, key.rstrip("/") or None, chunk_size=_LISTED_AT_ONCE):
                for found in page:
                    if not found["path"].rpartition("/")[2].startswith("."):
                        yield _object_entry(_root_of(url) + "/" + found["path"], found)

    def put(self, url: str, data: bytes, *, only_new: bool = False) -> None:
        """Store `data`.

        Raises:
            AlreadyExists: with `only_new`, the URL exists. PermissionDenied, ResourceExhausted, Unavailable.
        """
        with _translated(f"writing {url}"):
            if path := _path(url):
                _write(path, data, only_new=only_new)
                return
            store, key = self._object(url)
            obstore.put(store, key, data, mode="create" if only_new else "overwrite")

    def adopt(self, url: str, file: Path) -> None:
        """Move a finished local file to `url`. Raises as `put` does."""
        with _translated(f"writing {url}"):
            if path := _path(url):
                _move(file, path)
                return
            store, key = self._object(url)
            obstore.put(store, key, file, chunk_size=_PART_BYTES, max_concurrency=_PARTS_AT_ONCE)
            file.unlink(missing_ok=True)

    def publish(self, from_url: str, to_url: str) -> None:
        """Move `from_url` to `to_url` and replace what is there; idempotent.

        Raises:
            NotFound: neither exists. PermissionDenied, ResourceExhausted, Unavailable.
        """
        try:
            with _translated(f"moving {from_url}"):
                if (source := _path(from_url)) and (target := _path(to_url)):
                    _move(source, target)
                    return
                store, key = self._object(from_url)
                obstore.copy(store, key, self._object(to_url)[1])
                obstore.delete(store, key)
        except NotFound:
            # Either the move was done before, or `from_url` never existed.
            self.stat(to_url)

    def remove_all(self, url: str) -> None:
        """Remove everything below a prefix. Errors are ignored, because leftover files are harmless."""
        with suppress(ShoalError), _translated(f"removing {url}"):
            if path := _path(url):
                shutil.rmtree(path, ignore_errors=True)
                return
            store, key = self._object(url)
            for page in obstore.list(store, key.rstrip("/"), chunk_size=_LISTED_AT_ONCE):
                obstore.delete(store, [found["path"] for found in page])

    def _object(self, url: str) -> tuple[ObjectStore, str]:
        root = _root_of(url)
        if (store := self._stores.get(root)) is None:
            store = self._stores[root] = from_url(root, retry_config={"retry_timeout": _RETRY})
        return store, url[len(root) + 1 :]


def is_within(url: str, root: str) -> bool:
    """Return True when `url` is at or below `root`, by whole names: `s3://a/bc` is not within `s3://a/b`."""
    root = root if root.endswith("://") else root.rstrip("/")
    root = "file://" if root == "file:" else root
    return url == root or url.startswith(root if root.endswith("://") else root + "/")


def join(prefix: str, name: str) -> str:
    """Return the URL of `name` below `prefix`."""
    return f"{prefix.rstrip('/')}/{name}"


def _local(field: str, rest: str) -> str:
    path = unquote(rest)
    if not path.startswith("/") or "\0" in path:
        raise InvalidArgument(f"{field}: {'file://' + rest[:200]!r}: expected an absolute path: file:///path")
    # Links are resolved here, so that their targets are checked too.
    real = os.path.realpath(path)
    return "file://" + real + ("/" if path.endswith("/") and real != "/" else "")


def _resolved(root: str) -> str:
    """Return an allowed URL without links in it, as the URLs that are compared with it."""
    scheme, _, rest = root.partition("://")
    return f"file://{os.path.realpath(unquote(rest))}" if scheme == "file" else root


def _key(field: str, rest: str) -> str:
    bucket, _, key = rest.partition("/")
    names = key.rstrip("/").split("/") if key else []
    if any(char in bucket for char in "@:?#%\\"):
        raise InvalidArgument(
            f"{field}: {rest[:200]!r}: expected a bucket's name first; credentials and endpoint are those of ingest"
        )
    if not bucket or any(name in ("", ".", "..") for name in names):
        raise InvalidArgument(f"{field}: {rest[:200]!r}: expected BUCKET/KEY, without empty, . or .. names in it")
    return rest


def _path(url: str) -> Path | None:
    return Path(url[len("file://") :]) if url.startswith("file://") else None


def _root_of(url: str) -> str:
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.partition('/')[0]}"


def _object_entry(url: str, found: obstore.ObjectMeta) -> Entry:
    version = found["e_tag"] or f"{found['size']}-{found['last_modified'].isoformat()}"
    return Entry(url, found["size"], version)


def _entry_of(path: Path) -> Entry:
    stat = path.stat()
    if not path.is_file():
        raise InvalidArgument(f"{path} is not a file; a prefix ends with a slash: file://{path}/")
    return Entry(f"file://{path}", stat.st_size, f"{stat.st_size}-{stat.st_mtime_ns}")


def _walk(folder: Path) -> Iterator[Entry]:
    """Yield the files below a folder. Memory holds one folder's names for each level."""
    with os.scandir(folder) as found:
        children = sorted((child for child in found if not child.name.startswith(".")), key=lambda child: child.name)
    for child in children:
        if child.is_dir(follow_symlinks=False):
            yield from _walk(Path(child.path))
        elif child.is_file(follow_symlinks=False):
            yield _entry_of(Path(child.path))


def _write(path: Path, data: bytes, *, only_new: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.parent / f".{uuid.uuid4().hex}.tmp"
    try:
        with staged.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if only_new:
            # Unlike a rename, a link does not replace an existing file.
            os.link(staged, path)
            staged.unlink()
        else:
            staged.replace(path)
        _sync_folder(path.parent)
    finally:
        staged.unlink(missing_ok=True)


def _move(file: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
    try:
        file.replace(target)
    except OSError as err:
        if err.errno != errno.EXDEV:
            raise
        staged = target.parent / f".{uuid.uuid4().hex}.tmp"
        shutil.copyfile(file, staged)
        _move(staged, target)
        file.unlink(missing_ok=True)
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _translated(doing: str) -> Iterator[None]:
    """Translate errors of the system and of obstore to ShoalError, with their cause."""
    try:
        yield
    except ShoalError:
        raise
    except (FileNotFoundError, NotADirectoryError) as err:
        raise NotFound(f"{doing}: it does not exist") from err
    except (AlreadyExistsError, FileExistsError) as err:
        raise AlreadyExists(f"{doing}: it exists already") from err
    except (PermissionDeniedError, UnauthenticatedError) as err:
        raise PermissionDenied(f"{doing}: the object store refuses: check the credentials of ingest") from err
    except PermissionError as err:
        raise PermissionDenied(f"{doing}: permission denied: check the rights of ingest's user there") from err
    except BaseError as err:
        raise Unavailable(f"{doing}: the object store is unavailable ({_brief(err)})") from err
    except OSError as err:
        if err.errno in _FULL:
            raise ResourceExhausted(f"{doing}: the disk is full: free some space there", retry_after_ms=1_000) from err
        raise FailedPrecondition(f"{doing}: {err.strerror or err}") from err


def _brief(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
