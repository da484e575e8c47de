"""Drain marks: an operator takes one process out of traffic. Pure.

A mark is a key in etcd that names the process: whoever replaces that process under its name is not drained.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from mesh.cluster.etcd import Entry
from mesh.cluster.membership import Instance
from shoal.errors import InvalidArgument, NotFound

log = logging.getLogger(__name__)

PREFIX = b"/shoal/drains/"


@dataclass(frozen=True)
class DrainMark:
    """One drained process."""

    name: str
    """`<node>/<service>-<n>`."""
    pid: int
    started_at: float

    @property
    def key(self) -> bytes:
        return key_of(self.name)

    def is_on(self, instance: Instance) -> bool:
        """Whether it is this very process that is drained."""
        return (self.name, self.pid, self.started_at) == (instance.name, instance.pid, instance.started_at)


def key_of(name: str) -> bytes:
    return PREFIX + name.encode()


def mark_of(instance: Instance) -> DrainMark:
    """The mark that drains the process behind `instance`."""
    return DrainMark(instance.name, instance.pid, instance.started_at)


def encode(mark: DrainMark) -> bytes:
    return json.dumps({"pid": mark.pid, "started_at": mark.started_at}).encode()


@lru_cache(maxsize=1024)
def _readable(key: bytes, value: bytes) -> DrainMark | None:
    """Cached, so that an unreadable key is logged once and not at each change of another."""
    try:
        raw = json.loads(value)
        return DrainMark(key.removeprefix(PREFIX).decode(), int(raw["pid"]), float(raw["started_at"]))
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as err:
        log.warning("ignoring the key %r in etcd: %r", key, err)
        return None


def marks_of(entries: Mapping[bytes, Entry]) -> tuple[DrainMark, ...]:
    """The marks among the entries of etcd. What cannot be read is logged and left out."""
    found = (_readable(key, entry.value) for key, entry in entries.items() if key.startswith(PREFIX))
    return tuple(sorted((mark for mark in found if mark is not None), key=lambda mark: mark.name))


def drained(instances: Iterable[Instance], marks: Iterable[DrainMark]) -> frozenset[str]:
    """The names of the instances that are drained."""
    by_name = {mark.name: mark for mark in marks}
    return frozenset(i.name for i in instances if i.name in by_name and by_name[i.name].is_on(i))


def resolve(name: str, instances: Iterable[Instance]) -> Instance:
    """The instance called `name`: in full, or without its node where that is unambiguous.

    Raises:
        InvalidArgument: the name is empty or ambiguous.
        NotFound: no such instance.
    """
    if not name:
        raise InvalidArgument("name: expected an instance such as local/infer-0, got nothing")
    there = tuple(instances)
    found = [i for i in there if i.name == name] or [i for i in there if i.instance == name]
    if len(found) > 1:
        raise InvalidArgument(f"{name} is on several nodes, say which: {', '.join(sorted(i.name for i in found))}")
    if not found:
        known = ", ".join(i.name for i in there[:20]) or "none"
        raise NotFound(f"no instance {name[:100]!r}; there are: {known}{', ...' if len(there) > 20 else ''}")
    return found[0]


def obsolete(
    marks: Iterable[DrainMark],
    instances: Iterable[Instance],
    absent_since: Mapping[str, float],
    now: float,
    patience_s: float,
) -> tuple[DrainMark, ...]:
    """Marks whose process is gone: replaced by another, or absent for `patience_s` (after an outage of etcd everybody
    is absent for a moment). `absent_since`: when each mark's process was first missed.
    """
    by_name = {instance.name: instance for instance in instances}
    gone = []
    for mark in marks:
        instance = by_name.get(mark.name)
        replaced = instance is not None and not mark.is_on(instance)
        absent = instance is None and now - absent_since.get(mark.name, now) >= patience_s
        if replaced or absent:
            gone.append(mark)
    return tuple(gone)
