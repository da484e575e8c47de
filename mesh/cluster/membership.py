"""Cluster membership: each instance keeps a key in etcd under a lease, and readers keep a live copy of the keys.

    Registration   one instance's own key: STARTING ──> READY <──> READY with other models ──> DRAINING ──> deleted
    Directory      the keys of all instances, as a view that is replaced after each change

A process that dies stops refreshing its lease, and etcd deletes its key within TTL_S. After a longer outage of etcd the
keys are gone: each instance notices at its next refresh and writes its key again.
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

from mesh.cluster.etcd import Etcd, Lease, LeaseLost, Modified, Put
from mesh.cluster.mirror import Copy, Mirror
from mesh.process.config import ServiceConfig
from shoal import __version__
from shoal.errors import ShoalError

log = logging.getLogger(__name__)

PREFIX = b"/shoal/instances/"
TTL_S = 3
"""Time to live of a registration: a killed process is removed after this long. Envoy's health checks are faster."""
REFRESH_S = 1.0
"""Two refreshes may be lost before the lease is."""
_RETRY_S = 0.3
# Longest wait for etcd while leaving. Envoy's health checks cover an unreachable etcd.
_LEAVE_S = 1.0


class State(StrEnum):
    """State that an instance publishes."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"


@dataclass(frozen=True)
class ReadyModel:
    """A model that is loaded and warm, with its ready versions in ascending order."""

    name: str
    versions: tuple[int, ...]
    has_sequences: bool = False
    """True when requests are steps of sequences: all steps of one sequence must reach the same instance."""
    slow_path: str = ""
    """The reason why ordinary requests take infer's slow path; empty for the fast path."""


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
    awaited: tuple[str, ...] | None = ()
    """Models that the instance is to serve, has no ready version of, and has not given up. None: not known yet."""
    policy_revision: int | None = None
    """Revision of etcd of the policy that the instance enforces, 0 before the first one. None: it enforces none."""
    admin: str = ""
    """Address of the metrics of all processes of the node, from the instance that knows it; else empty."""

    @property
    def name(self) -> str:
        """`<node>/<service>-<n>`: unique in the cluster."""
        return f"{self.node}/{self.instance}"

    @property
    def key(self) -> bytes:
        """Key of the instance in etcd."""
        return PREFIX + f"{self.service}/{self.node}/{self.instance}".encode()


def encode(instance: Instance) -> bytes:
    """Return the value of an instance's key: JSON with the fields of Instance."""
    models = [_written(model) for model in instance.models]
    document = {**vars(instance), "models": models}
    if instance.awaited == ():
        del document["awaited"]
    if instance.policy_revision is None:
        del document["policy_revision"]
    if not instance.admin:
        del document["admin"]
    return json.dumps(document, separators=(",", ":")).encode()


def _written(model: ReadyModel) -> dict[str, Any]:
    document: dict[str, Any] = {"name": model.name, "versions": list(model.versions)}
    if model.has_sequences:
        document["has_sequences"] = True
    if model.slow_path:
        document["slow_path"] = model.slow_path
    return document


def decode(key: bytes, value: bytes) -> Instance:
    """Parse the value of an instance's key. Unknown fields, as a newer Shoal may write, are ignored.

    Raises:
        ValueError: not JSON; a field is missing or has another type; or the key names another instance.
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
        awaited=_names(raw, "awaited"),
        policy_revision=_number(raw, "policy_revision") if "policy_revision" in raw else None,
        admin=_text(raw, "admin") if "admin" in raw else "",
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
    # The bound is the end of the year 9999, the last that a protobuf Timestamp can hold.
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 253402300800:
        raise ValueError(f"{field}: expected unix seconds, got {value!r}")
    return float(value)


def _list(raw: Mapping[str, Any], field: str) -> list[Any]:
    value = raw.get(field, [])
    if not isinstance(value, list):
        raise ValueError(f"{field}: expected a list, got {value!r}")
    return value


def _names(raw: Mapping[str, Any], field: str) -> tuple[str, ...] | None:
    if raw.get(field, ()) is None:
        return None
    names = _list(raw, field)
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"{field}: expected strings, got {names!r}")
    return tuple(names)


def _model(raw: Any) -> ReadyModel:
    if not isinstance(raw, dict) or not raw.get("name"):
        raise ValueError(f"models: expected objects with a name, got {raw!r}")
    versions = _list(raw, "versions")
    has_sequences = raw.get("has_sequences", False)
    if not isinstance(has_sequences, bool):
        raise ValueError(f"has_sequences: expected a boolean, got {has_sequences!r}")
    numbers = tuple(sorted(_number({"versions": v}, "versions") for v in versions))
    slow_path = _text(raw, "slow_path") if "slow_path" in raw else ""
    return ReadyModel(_text(raw, "name"), numbers, has_sequences, slow_path)


class Registration:
    """Membership entry of this instance, kept while the `async with` block runs.

    Entering does not wait for etcd: a background task writes the key when it can, refreshes its lease, and writes the
    key again after a lost lease. Leaving publishes DRAINING, waits `notice_ms` so that every Envoy receives it, and
    deletes the key. Without an etcd address the registration does nothing.
    """

    def __init__(self, etcd: str | None, instance: Instance, *, notice_ms: int) -> None:
        self._etcd = etcd
        self._instance = instance
        self._notice_s = notice_ms / 1000
        self._has_changed = asyncio.Event()
        self._written: Instance | None = None
        self._was_written = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @classmethod
    def of(cls, config: ServiceConfig, service: str, address: str, *, admin: str = "") -> Registration:
        """Return the registration of this process, which serves `service` at `address`; `admin` is as in Instance."""
        instance = Instance(
            service,
            config.node,
            config.instance,
            address,
            os.getpid(),
            State.STARTING,
            time.time(),
            version=__version__,
            admin=admin,
        )
        return cls(config.etcd, instance, notice_ms=config.notice_ms)

    @property
    def instance(self) -> Instance:
        """Desired entry: etcd has it, or gets it as soon as etcd is reachable."""
        return self._instance

    async def update(
        self,
        *,
        state: State | None = None,
        models: Sequence[ReadyModel] | None = None,
        awaited: Sequence[str] | None = (),
        policy_revision: int | None = None,
    ) -> None:
        """Change the entry. Never raises and never waits: the background task writes the change.

        `awaited` goes with `models`.
        """
        after = self._instance
        if state is not None:
            after = replace(after, state=state)
        if models is not None:
            ready = tuple(sorted(models, key=lambda model: model.name))
            after = replace(after, models=ready, awaited=None if awaited is None else tuple(awaited))
        if policy_revision is not None:
            after = replace(after, policy_revision=policy_revision)
        if after != self._instance:
            self._instance = after
            self._has_changed.set()

    async def __aenter__(self) -> Registration:
        if self._etcd is not None:
            self._task = asyncio.create_task(self._run(self._etcd), name="registration")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self._task is None:
            return
        self._was_written.clear()
        await self.update(state=State.DRAINING)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LEAVE_S):
                while self._written != self._instance:
                    self._was_written.clear()
                    await self._was_written.wait()
        await asyncio.sleep(self._notice_s)
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _run(self, addresses: str) -> None:
        """Keep the key registered, lease after lease, until cancelled."""
        async with Etcd(addresses) as etcd:
            is_failing = False
            while True:
                try:
                    lease = await etcd.grant(TTL_S)
                    if is_failing:
                        log.info("etcd is reachable again: registering", {"event": "registration.resumed"})
                    is_failing = False
                    await self._keep(etcd, lease)
                except LeaseLost as err:
                    log.warning("lost the registration: %(error)s", {"event": "registration.lost", "error": err})
                except Exception as err:
                    if not isinstance(err, ShoalError):  # A bug must not end the registration for ever.
                        log.exception("registration", {"event": "registration.failed"})
                    elif not is_failing:
                        log.warning(
                            "cannot register for now: %(error)s", {"event": "registration.retrying", "error": err}
                        )
                    is_failing = True
                    await asyncio.sleep(_RETRY_S)

    async def _keep(self, etcd: Etcd, lease: Lease) -> None:
        """Write the key under `lease`, and keep key and lease until the lease is lost or an error occurs."""
        try:
            self._written = None
            while True:
                self._has_changed.clear()
                desired = self._instance
                await _write_key(etcd, desired, lease)
                await lease.refresh()  # In every round: frequent changes must not starve the lease.
                self._written = desired
                self._was_written.set()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._has_changed.wait(), REFRESH_S)
        except asyncio.CancelledError:
            with contextlib.suppress(ShoalError, TimeoutError):
                async with asyncio.timeout(_LEAVE_S):
                    # Also deletes the key, unless a process that replaced this one has rewritten it since.
                    await lease.revoke()
            raise


async def _write_key(etcd: Etcd, instance: Instance, lease: Lease) -> None:
    """Write `instance` to its key under `lease`, unless a later process has taken over the name."""
    value = encode(instance)
    while True:
        entry = await etcd.get(instance.key)
        if entry is not None:
            if entry.value == value and entry.lease == lease.id:
                return
            holder = _readable(entry.key, entry.value)
            if holder is not None and holder.started_at > instance.started_at:
                return
        # Another process may write the key, or a person delete it, between the read and the write.
        as_seen = Modified(instance.key, entry.mod_revision if entry is not None else 0)
        if (await etcd.transact([as_seen], [Put(instance.key, value, lease.id)])).succeeded:
            return


@dataclass(frozen=True)
class View:
    """All instances at one revision of etcd, sorted by service and name."""

    instances: tuple[Instance, ...] = ()
    revision: int = 0
    stale: bool = True
    """True while etcd is unreachable: the view is the last known one."""


@lru_cache(maxsize=4096)
def _readable(key: bytes, value: bytes) -> Instance | None:
    """Decode a key's value; None when invalid. Cached, so that an invalid key is logged once."""
    try:
        return decode(key, value)
    except (ValueError, RecursionError) as err:
        log.warning(
            "ignoring the key %(key)r in etcd: %(error)s", {"event": "etcd.key_ignored", "key": key, "error": err}
        )
        return None


def view_of(copy: Copy) -> View:
    """Return the instances in a copy of etcd's keys. Other keys are ignored; invalid values are logged and ignored."""
    found = (_readable(key, entry.value) for key, entry in copy.entries.items() if key.startswith(PREFIX))
    instances = sorted((i for i in found if i is not None), key=lambda i: (i.service, i.name))
    return View(tuple(instances), copy.revision, copy.stale)


class Directory:
    """Live view of all instances while the `async with` block runs. Entering does not wait for etcd."""

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
        """Newest view."""
        return view_of(self._mirror.copy)

    async def follow(self) -> AsyncIterator[View]:
        """Yield the view now and after each change, for ever. A slow reader skips views that were replaced."""
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
