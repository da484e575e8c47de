"""Drain marks, with which an operator takes one process out of traffic. Pure.

A mark is a key in etcd that identifies the process. A later process under the same name is not drained.
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
    """Identity of one drained process."""

    name: str
    """`<node>/<service>-<n>`."""
    pid: int
    started_at: float

    @property
    def key(self) -> bytes:
        return key_of(self.name)

    def is_on(self, instance: Instance) -> bool:
        """Return True when the mark drains this process, not an earlier one of the same name."""
        return (self.name, self.pid, self.started_at) == (instance.name, instance.pid, instance.started_at)


def key_of(name: str) -> bytes:
    return PREFIX + name.encode()


def mark_of(instance: Instance) -> DrainMark:
    """Return the mark that drains the process of `instance`."""
    return DrainMark(instance.name, instance.pid, instance.started_at)


def encode(mark: DrainMark) -> bytes:
    return json.dumps({"pid": mark.pid, "started_at": mark.started_at}).encode()


@lru_cache(maxsize=1024)
def _decode(key: bytes, value: bytes) -> DrainMark | None:
    """Parse a mark, or log an unreadable value and return None. The cache prevents repeated log lines."""
    try:
        raw = json.loads(value)
        return DrainMark(key.removeprefix(PREFIX).decode(), int(raw["pid"]), float(raw["started_at"]))
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as err:
        log.warning(
            "ignoring the key %(key)r in etcd: %(error)r", {"event": "etcd.key_ignored", "key": key, "error": err}
        )
        return None


def marks_of(entries: Mapping[bytes, Entry]) -> tuple[DrainMark, ...]:
    """Return the marks among the entries of etcd, by name. Unreadable marks are logged and left out."""
    found = (_decode(key, entry.value) for key, entry in entries.items() if key.startswith(PREFIX))
    return tuple(sorted((mark for mark in found if mark is not None), key=lambda mark: mark.name))


def drained(instances: Iterable[Instance], marks: Iterable[DrainMark]) -> frozenset[str]:
    """Return the names of the drained instances."""
    by_name = {mark.name: mark for mark in marks}
    return frozenset(i.name for i in instances if i.name in by_name and by_name[i.name].is_on(i))


def resolve(name: str, instances: Iterable[Instance]) -> Instance:
    """Return the instance with this name: the full name, or without the node if that is unambiguous.

    Raises:
        InvalidArgument: the name is empty or ambiguous.
        NotFound: no instance has the name.
    """
    if not name:
        raise InvalidArgument("name: expected an instance such as local/infer-0, got nothing")
    known = tuple(instances)
    found = [i for i in known if i.name == name] or [i for i in known if i.instance == name]
    if len(found) > 1:
        raise InvalidArgument(f"{name} is on several nodes, say which: {', '.join(sorted(i.name for i in found))}")
    if not found:
        listed = ", ".join(i.name for i in known[:20]) or "none"
        raise NotFound(f"no instance {name[:100]!r}; there are: {listed}{', ...' if len(known) > 20 else ''}")
    return found[0]


def obsolete(
    marks: Iterable[DrainMark],
    instances: Iterable[Instance],
    absent_since: Mapping[str, float],
    now: float,
    patience_s: float,
) -> tuple[DrainMark, ...]:
    """Return the marks whose process has ended: replaced by another, or absent for `patience_s`.

    After an outage of etcd all instances are absent for a moment, hence the grace time. `absent_since` maps the name of
    each mark to the time at which its process was first found absent.
    """
    by_name = {instance.name: instance for instance in instances}
    found = []
    for mark in marks:
        instance = by_name.get(mark.name)
        replaced = instance is not None and not mark.is_on(instance)
        absent = instance is None and now - absent_since.get(mark.name, now) >= patience_s
        if replaced or absent:
            found.append(mark)
    return tuple(found)
