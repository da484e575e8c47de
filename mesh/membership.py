"""Who is here: each instance holds a key in etcd under a lease; whoever wants to know keeps a live copy of the keys.

    Registration   one instance's own key: STARTING ──> READY <──> READY with other models ──> DRAINING ──> gone
    Directory      everyone's keys, as a view that is replaced after each change

A process that dies stops refreshing its lease, and its key goes within TTL_S. An etcd that was away for longer comes
back without the keys: each instance notices at its next refresh and writes its key again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache
from types import TracebackType
from typing import Any

from mesh.config import ServiceConfig
from mesh.etcd import Etcd, Lease, LeaseLost, Modified, Put
from mesh.mirror import Copy, Mirror
from shoal import __version__
from shoal.errors import ShoalError

log = logging.getLogger(__name__)

PREFIX = b"/shoal/instances/"
TTL_S = 3
"""A killed process is forgotten after so long. Envoy's health checks notice long before."""
REFRESH_S = 1.0
"""Two refreshes may be lost before the lease is."""
_RETRY_S = 0.3
_FAREWELL_S = 1.0
# How long leaving waits for etcd. Envoy's health checks cover an etcd that is away.


class State(StrEnum):
    """What an instance says of itself."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"


@dataclass(frozen=True)
class ReadyModel:
    """A model that is loaded and warm, with the versions that are, ascending."""

    name: str
    versions: tuple[int, ...]
    has_sequences: bool = False
    """Its requests are steps of sequences: those of one must come to one instance."""


@dataclass(frozen=True)
class Instance:
    """One running process of a service."""

    service: str
    node: str
    instance: str
    """`<service>-<n>`."""
    address: str
    pid: int
    state: State
    started_at: float
    """Unix seconds."""
    models: tuple[ReadyModel, ...] = ()
    version: str = ""

    @property
    def name(self) -> str:
        """`<node>/<service>-<n>`: unique in the cluster."""
        return f"{self.node}/{self.instance}"

    @property
    def key(self) -> bytes:
        """Its key in etcd."""
        return PREFIX + f"{self.service}/{self.node}/{self.instance}".encode()


def encode(instance: Instance) -> bytes:
    """The value of an instance's key: JSON with the fields of Instance."""
    models = [_written(model) for model in instance.models]
    return json.dumps({**vars(instance), "models": models}, separators=(",", ":")).encode()


def _written(model: ReadyModel) -> dict[str, Any]:
    said: dict[str, Any] = {"name": model.name, "versions": list(model.versions)}
    return {**said, "has_sequences": True} if model.has_sequences else said


def decode(key: bytes, value: bytes) -> Instance:
    """Reads what `encode` wrote. Fields that it does not know (a newer Shoal's) are left out.

    Raises:
        ValueError: not JSON, a field is missing or of another type, or the key names another instance.
    """
    raw = json.loads(value)
    if not isinstance(raw, dict):
        raise ValueError(f"expected a JSON object, got {type(raw).__name__}")
    instance = Instance(
        service=_text(raw, "service"),
        node=_text(raw, "node"),
        instance=_text(raw, "instance"),
        address=_text(raw, "address"),
        pid=_number(raw, "pid"),
        state=State(_text(raw, "state")),
        started_at=_seconds(raw, "started_at"),
        models=tuple(_model(model) for model in _list(raw, "models")),
        version=_text(raw, "version") if "version" in raw else "",
    )
    if instance.key != key:
        raise ValueError(f"the value names {instance.service}/{instance.name}")
    return instance


def _text(raw: Mapping[str, Any], field: str) -> str:
    value = raw.get(field)
    if not isinstance(value, str):
        raise ValueError(f"{field}: expected a string, got {value!r}")
    return value


def _number(raw: Mapping[str, Any], field: str) -> int:
    value = raw.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 63:
        raise ValueError(f"{field}: expected a whole number of 64 bits, got {value!r}")
    return value


def _seconds(raw: Mapping[str, Any], field: str) -> float:
    value = raw.get(field)
    # Up to the year 9999, the last that a protobuf Timestamp can hold.
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 253402300800:
        raise ValueError(f"{field}: expected unix seconds, got {value!r}")
    return float(value)


def _list(raw: Mapping[str, Any], field: str) -> list[Any]:
    value = raw.get(field, [])
    if not isinstance(value, list):
        raise ValueError(f"{field}: expected a list, got {value!r}")
    return value


def _model(raw: Any) -> ReadyModel:
    if not isinstance(raw, dict) or not raw.get("name"):
        raise ValueError(f"models: expected objects with a name, got {raw!r}")
    versions = _list(raw, "versions")
    has_sequences = raw.get("has_sequences", False)
    if not isinstance(has_sequences, bool):
        raise ValueError(f"has_sequences: expected a boolean, got {has_sequences!r}")
    numbers = tuple(sorted(_number({"versions": v}, "versions") for v in versions))
    return ReadyModel(_text(raw, "name"), numbers, has_sequences)


class Registration:
    """One instance's own entry in the membership, for as long as the `async with` block lasts.

    Entering does not wait for etcd: a background task writes the key when it can, keeps its lease, and writes it again
    when the lease was lost. Leaving says DRAINING, goes on for `notice_ms` so that every Envoy hears, then takes the
    key away. Without etcd (`of` a config that names none) nothing of this happens.
    """

    def __init__(self, etcd: str | None, instance: Instance, *, notice_ms: int) -> None:
        self._etcd = etcd
        self._instance = instance
        self._notice_s = notice_ms / 1000
        self._wish = asyncio.Event()
        self._written: Instance | None = None
        self._kept = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @classmethod
    def of(cls, config: ServiceConfig, service: str, address: str) -> Registration:
        """The registration of this process, which serves `service` at `address`."""
        instance = Instance(
            service, config.node, config.instance, address, os.getpid(), State.STARTING, time.time(), (), __version__
        )
        return cls(config.etcd, instance, notice_ms=config.notice_ms)

    @property
    def instance(self) -> Instance:
        """What it says of itself, or will as soon as it reaches etcd."""
        return self._instance

    async def update(self, *, state: State | None = None, models: Sequence[ReadyModel] | None = None) -> None:
        """Changes what the entry says. Never raises and never waits: the background task makes it so."""
        after = self._instance
        if state is not None:
            after = replace(after, state=state)
        if models is not None:
            after = replace(after, models=tuple(sorted(models, key=lambda model: model.name)))
        if after != self._instance:
            self._instance = after
            self._wish.set()

    async def __aenter__(self) -> Registration:
        if self._etcd is not None:
            self._task = asyncio.create_task(self._run(self._etcd), name="registration")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self._task is None:
            return
        self._kept.clear()
        await self.update(state=State.DRAINING)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FAREWELL_S):
                while self._written != self._instance:
                    self._kept.clear()
                    await self._kept.wait()
        await asyncio.sleep(self._notice_s)
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _run(self, addresses: str) -> None:
        """Keeps the key, lease after lease, until cancelled."""
        async with Etcd(addresses) as etcd:
            away = False
            while True:
                try:
                    lease = await etcd.grant(TTL_S)
                    if away:
                        log.info("etcd is back: registering again")
                    away = False
                    await self._keep(etcd, lease)
                except LeaseLost as err:
                    log.warning("lost the registration: %s", err)
                except Exception as err:
                    if not isinstance(err, ShoalError):  # A fault of ours must not end the registration for ever.
                        log.exception("registration")
                    elif not away:
                        log.warning("cannot register for now: %s", err)
                    away = True
                    await asyncio.sleep(_RETRY_S)

    async def _keep(self, etcd: Etcd, lease: Lease) -> None:
        """Writes the key under `lease` and keeps both until the lease is lost, or surely will be."""
        try:
            self._written = None
            while True:
                self._wish.clear()
                wanted = self._instance
                await _claim(etcd, wanted, lease)
                await lease.refresh()  # Every time: changes that follow each other closely must not starve it.
                self._written = wanted
                self._kept.set()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wish.wait(), REFRESH_S)
        except asyncio.CancelledError:
            with contextlib.suppress(ShoalError, TimeoutError):
                async with asyncio.timeout(_FAREWELL_S):
                    # Takes the key along, unless a process that replaced this one has written it since.
                    await lease.revoke()
            raise


async def _claim(etcd: Etcd, instance: Instance, lease: Lease) -> None:
    """Sees to it that the key says `instance` and hangs on `lease`, unless a later process has taken over the name."""
    value = encode(instance)
    while True:
        entry = await etcd.get(instance.key)
        if entry is not None:
            if entry.value == value and entry.lease == lease.id:
                return
            holder = _readable(entry.key, entry.value)
            if holder is not None and holder.started_at > instance.started_at:
                return
        # Somebody may write it, or delete it by hand, between the look and the leap.
        as_seen = Modified(instance.key, entry.mod_revision if entry is not None else 0)
        if (await etcd.transact([as_seen], [Put(instance.key, value, lease.id)])).succeeded:
            return


@dataclass(frozen=True)
class View:
    """Every instance at one etcd revision, sorted by service and name."""

    instances: tuple[Instance, ...] = ()
    revision: int = 0
    stale: bool = True
    """True while etcd cannot be reached: this is the last that was known."""


@lru_cache(maxsize=4096)
def _readable(key: bytes, value: bytes) -> Instance | None:
    """Cached, so that an unreadable key is logged once and not at each change of another."""
    try:
        return decode(key, value)
    except (ValueError, RecursionError) as err:
        log.warning("ignoring the key %r in etcd: %s", key, err)
        return None


def view_of(copy: Copy) -> View:
    """The instances in a copy of the keys (which may have others too). What cannot be read is logged and left out."""
    found = (_readable(key, entry.value) for key, entry in copy.entries.items() if key.startswith(PREFIX))
    instances = sorted((i for i in found if i is not None), key=lambda i: (i.service, i.name))
    return View(tuple(instances), copy.revision, copy.stale)


class Directory:
    """A live view of all instances, for as long as the `async with` block lasts. Entering does not wait for etcd."""

    def __init__(self, etcd: Etcd) -> None:
        self._mirror = Mirror(etcd, PREFIX)

    async def __aenter__(self) -> Directory:
        await self._mirror.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._mirror.__aexit__(kind, err, tb)

    @property
    def view(self) -> View:
        """The newest view."""
        return view_of(self._mirror.copy)

    async def follow(self) -> AsyncIterator[View]:
        """The view as it is now, and again after each change. Never ends; the slow miss what was replaced meanwhile."""
        async for copy in self._mirror.follow():
            yield view_of(copy)


__all__ = [
    "PREFIX",
    "TTL_S",
    "Directory",
    "Instance",
    "ReadyModel",
    "Registration",
    "State",
    "View",
    "decode",
    "encode",
    "view_of",
]
