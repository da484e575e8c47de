"""Entries of the audit log, and the hashes that chain them.

    hash of entry n = SHA-256(hash of entry n - 1 as hex || canonical JSON of entry n)

The canonical JSON has sorted keys, no spaces and no escapes of non-ASCII characters, and contains the entry's id and
time. So a changed, exchanged or missing entry no longer fits its neighbours.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from mesh.mongo import Document
from mesh.mongo_clock import milliseconds
from shoal.access.audit import EVENT_FIELDS, Event

FIRST_HASH: Final = "0" * 64
"""Stands for the hash before the first entry of a chain."""

# Types of fields that are no texts.
_TYPES: Mapping[str, type] = {"code": int, "count": int, "at": datetime}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# Numbers begin with 1, and have 12 digits: another form of one would be a second id of the same entry.
_ID = re.compile(r"(.+)/(?!0{12})([0-9]{12})", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Entry:
    """An event in its chain."""

    writer: str
    """Name of the chain: one life of one store instance."""
    n: int
    """Number in the chain, from 1."""
    at_ms: int
    """Milliseconds since 1970; never less than the entry before."""
    event: Event
    hash: str

    @property
    def id(self) -> str:
        return entry_id(self.writer, self.n)

    def document(self) -> Document:
        """Return the entry as a MongoDB document; fields with the value of an unknown are left out."""
        return {
            "_id": self.id,
            "at": _EPOCH + timedelta(milliseconds=self.at_ms),
            **_known(self.event),
            "hash": self.hash,
        }


def entry_id(writer: str, n: int) -> str:
    """Return the id of entry `n`. Ids of a chain sort by number."""
    return f"{writer}/{n:012d}"


def parts_of(id_: object) -> tuple[str, int] | None:
    """Return the writer and the number in the id of an entry; None when no entry has such an id."""
    found = _ID.fullmatch(id_) if isinstance(id_, str) else None
    return None if found is None else (found[1], int(found[2]))


def chained(writer: str, n: int, at_ms: int, event: Event, previous: str) -> Entry:
    """Return the entry that follows the one with the hash `previous`."""
    return Entry(writer, n, at_ms, event, _hash(previous, entry_id(writer, n), at_ms, event))


def entry_of(document: Mapping[str, Any]) -> Entry:
    """Return the entry of a document, whatever the document says. Raises ValueError when it is none."""
    parts = parts_of(document["_id"])
    if parts is None:
        raise ValueError(f"{document['_id']!r} is no id of an entry")
    unknown = set(document) - {"_id", "at", "hash", *EVENT_FIELDS}
    if unknown:
        raise ValueError(f"unknown fields {', '.join(sorted(unknown))}")
    values = {name: document[name] for name in EVENT_FIELDS if name in document}
    for name, value in [*values.items(), ("at", document["at"]), ("hash", document["hash"])]:
        if not isinstance(value, _TYPES.get(name, str)):
            raise ValueError(f"{name} has the type {type(value).__name__}")
    return Entry(*parts, milliseconds(document["at"]), Event(**values), document["hash"])


def fits(entry: Entry, previous: str) -> bool:
    """Return True when the entry follows the one with the hash `previous`, and is as it was written."""
    return entry.hash == _hash(previous, entry.id, entry.at_ms, entry.event)


def _hash(previous: str, id_: str, at_ms: int, event: Event) -> str:
    content = {"id": id_, "at": at_ms, **_known(event)}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(previous.encode() + text.encode()).hexdigest()


def _known(event: Event) -> dict[str, Any]:
    defaults = Event(kind="")
    return {name: value for name, value in asdict(event).items() if value != getattr(defaults, name)}
