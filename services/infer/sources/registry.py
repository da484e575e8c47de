"""Desired models from the store's registry.

    saved snapshot ──> desired models       immediately: a restarted instance serves while the store is unavailable
    watch ──snapshot──> desired, saved      again and again; after a broken watch, a new one with backoff

The newest version's configuration selects the served versions (`version_policy`; unset: the newest). The version of
the alias `stable` is always among them.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Protocol

from google.protobuf.message import DecodeError

from mesh.process.backoff import Backoff
from services.infer.error_text import quoted
from services.infer.loading import model_config
from services.infer.model_files.wanted_models import (
    CONFIG_FILE,
    ModelFiles,
    WantedModel,
    WantedVersion,
    picked,
    read_text,
)
from services.infer.offload import offload_if_long
from services.infer.sources.cache import Cache
from shoal.errors import FailedPrecondition, InvalidArgument, ShoalError, Unavailable
from shoal.store.v1 import store_pb2 as pb

log = logging.getLogger(__name__)

STABLE = "stable"
"""Alias of the version that serves requests without a version."""

_RETRY_FIRST_S, _RETRY_MAX_S = 0.1, 2.0
# The services of a node start at the same time: until then, an unreachable store is no reason to warn.
_START_S = 30.0

# Time in which an unavailable store is asked again for the files of a trial: a node that has just become ready may
# still connect its services.
_FETCH_RETRY_S = 10.0
# A new watch costs the store little, and a model that was pushed should be there soon.

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_CONFIG_PATH = f"../{CONFIG_FILE}"
_MAX_CONFIG_BYTES = 4 << 20
_LONG_CHARACTERS = 4 << 10
# Pruning checks every file of the cache, and a folder of models is pushed in hundreds of snapshots.
_PRUNE_S = 60.0
# Files of one version, as the store limits them.
_MOST_FILES = 4_096


class Registered(Protocol):
    """Source of registry snapshots."""

    def watch(self) -> AsyncIterator[pb.WatchModelsResponse]:
        """Yield the whole registry now and after each change. Raises ShoalError when the watch breaks."""
        ...

    async def check_sees(self, caller: bytes, sha256: str) -> None:
        """Check that a caller sees an artifact. Raises NotFound, the same as for one that is not stored; ShoalError."""


@dataclass(frozen=True)
class _Read:
    """A model as the last snapshot has it, and what follows from that."""

    versions: list[pb.ModelVersion]
    wanted: WantedModel
    is_certain: bool
    """False when its configuration could not be read."""


class Registry:
    """Follows the registry while `follow` runs."""

    def __init__(
        self,
        store: Registered,
        cache: Cache,
        want: Callable[[Sequence[WantedModel]], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Store the parts. `want` receives the desired models; `clock` returns unix seconds."""
        self._store = store
        self._cache = cache
        self._want = want
        self._clock = clock
        self._models: dict[str, _Read] = {}
        self._prune_at = 0.0
        self._needed: frozenset[str] = frozenset()
        """Digests of the files of all registered versions."""
        self.is_tried = asyncio.Event()
        """Set after the first snapshot, or the first failure to reach the store."""

    async def follow(self) -> None:
        """Report the desired models to `want` until cancelled."""
        await self._take_saved()
        backoff = Backoff(_RETRY_FIRST_S, _RETRY_MAX_S)
        quiet_until = self._clock() + _START_S
        while True:
            try:
                async for response in self._store.watch():
                    backoff.reset()
                    quiet_until = 0.0
                    await self._take(response.snapshot)
                    self._keep(response)
                log.info("the watch of the registry ended: watching again", {"event": "registry.watch_ended"})
            except ShoalError as err:
                level = logging.WARNING if self._clock() >= quiet_until else logging.INFO
                log.log(
                    level,
                    "the registry cannot be watched: %(error)s",
                    {"event": "registry.unreachable", "error": err.message},
                )
            # A bug met in one snapshot must not end the watch for ever.
            except Exception:
                log.exception("unexpected error while following the registry", {"event": "registry.follow_failed"})
            self.is_tried.set()
            await asyncio.sleep(backoff.next_s())

    @asynccontextmanager
    async def unregistered(self, version: pb.ModelVersion, caller: bytes = b"") -> AsyncIterator[WantedVersion]:
        """Provide a version that is not registered, with its files in the cache. Version 0 becomes version 1.

        With `caller`, only from files that this caller sees: the store is asked, since the cache has those of every
        tenant.

        After an error, the files that no registered version needs leave the cache soon.

        Raises:
            InvalidArgument: an invalid name, or too many files.
            ShoalError, OSError: the files cannot be fetched.
        """
        numbered = pb.ModelVersion()
        numbered.CopyFrom(version)
        numbered.version = version.version or 1
        if not _is_valid(numbered) or len(version.files) > _MOST_FILES:
            raise InvalidArgument(f"{quoted(version.name)} with {len(version.files)} files is no model version")
        digests = {file.sha256 for file in version.files}
        try:
            await self._fetch_all(version.files, caller)
            content = "".join(f"{file.path} {file.sha256}\n" for file in version.files)
            digest = hashlib.sha256(content.encode()).hexdigest()
            yield WantedVersion(numbered.version, digest, self._opener(numbered))
        except BaseException:
            self._cache.expire(digests - self._needed, self._clock())
            raise

    async def _fetch_all(self, files: Iterable[pb.ModelFile], caller: bytes = b"") -> None:
        """Fetch the files into the cache; while the store is unavailable, try again for a while."""
        backoff = Backoff(_RETRY_FIRST_S, _RETRY_MAX_S)
        give_up_at = time.monotonic() + _FETCH_RETRY_S
        for file in files:
            while True:
                try:
                    if caller:
                        await self._store.check_sees(caller, file.sha256)
                    await self._cache.fetch(file.sha256, file.size_bytes)
                    break
                except Unavailable:
                    if time.monotonic() > give_up_at:
                        raise
                await asyncio.sleep(backoff.next_s())

    async def _take_saved(self) -> None:
        data = self._cache.remembered()
        if data is None:
            return
        try:
            snapshot = pb.WatchModelsResponse.FromString(data).snapshot
        except DecodeError:
            log.warning("the saved registry in the cache is damaged and ignored", {"event": "registry.copy_damaged"})
            return
        log.info(
            "serving the %(versions)d model versions of the last known registry until the store responds",
            {"event": "registry.last_known_served", "versions": len(snapshot)},
        )
        await self._take(snapshot)

    async def _take(self, snapshot: Iterable[pb.ModelVersion]) -> None:
        by_name = sorted(snapshot, key=lambda version: (version.name, version.version))
        models = [list(versions) for _, versions in groupby(by_name, key=lambda version: version.name)]
        before, self._models = self._models, {}
        for versions in models:
            if _is_named(versions[0]):
                # Most models are as before: their configurations are not read again.
                known = before.get(versions[0].name)
                if known is None or known.versions != versions or not known.is_certain:
                    known = await self._read(versions)
                self._models[versions[0].name] = known
        self._want([model.wanted for model in self._models.values()])
        self.is_tried.set()

    def _keep(self, response: pb.WatchModelsResponse) -> None:
        self._needed = frozenset(file.sha256 for version in response.snapshot for file in version.files)
        try:
            self._cache.remember(response.SerializeToString())
            if (now := self._clock()) >= self._prune_at:
                self._prune_at = now + _PRUNE_S
                self._cache.prune(self._needed, now)
        except OSError as err:
            log.warning("the cache cannot be written: %(error)s", {"event": "cache.not_written", "error": err})

    async def _read(self, versions: list[pb.ModelVersion]) -> _Read:
        by_number = {version.version: version for version in versions}
        stable = next((v.version for v in versions if STABLE in v.aliases), None)
        there = {n: WantedVersion(n, v.content_digest, self._opener(v), v.tenant) for n, v in by_number.items()}
        is_certain = True
        try:
            text = await self._config_text(versions[-1])
            # 1 MiB takes two seconds.
            config = await offload_if_long(partial(model_config.parse, text), len(text) > _LONG_CHARACTERS)
            served = model_config.served_versions(config, [*there], stable)
        except (ShoalError, OSError):
            # The load will fail for the same reason, and the index will show it.
            served, is_certain = model_config.served_versions(model_config.parse(""), [*there], stable), False
        return _Read(versions, picked(versions[0].name, there, served, stable), is_certain)

    async def _config_text(self, version: pb.ModelVersion) -> str:
        """Return the configuration of a version; empty when it has none. Raises ShoalError or OSError."""
        file = next((file for file in version.files if file.path == _CONFIG_PATH), None)
        if file is None:
            return ""
        if file.size_bytes > _MAX_CONFIG_BYTES:
            raise FailedPrecondition(f"{CONFIG_FILE} has {file.size_bytes} bytes")
        return read_text(await self._cache.fetch(file.sha256, file.size_bytes))

    def _opener(self, version: pb.ModelVersion) -> Callable[[], AbstractAsyncContextManager[ModelFiles]]:
        return partial(_opened, self._cache, version)


@asynccontextmanager
async def _opened(cache: Cache, version: pb.ModelVersion) -> AsyncIterator[ModelFiles]:
    files = [(file.path, file.sha256, file.size_bytes) for file in version.files]
    async with cache.open(version.name, version.version, files) as folder:
        yield ModelFiles(folder, Path(folder, str(version.version)))


def _is_valid(version: pb.ModelVersion) -> bool:
    return _NAME.fullmatch(version.name) is not None and version.version > 0


def _is_named(version: pb.ModelVersion) -> bool:
    is_named = _is_valid(version)
    if not is_named:
        log.error(
            "the registry has a model with the invalid name %(model)s, which is ignored",
            {"event": "registry.invalid_name", "model": quoted(version.name)},
        )
    return is_named
