"""What travels through a connector: values."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

from services.ingest.limits import KEY_CHARS

_DIGEST_CHARS = 16


@dataclass(eq=False, slots=True)
class Partition:
    """A part of a source whose messages have an order: a partition, a shard. Pub/Sub has one."""

    name: str
    is_revoked: bool = False
    """It is somebody else's now: what is still under way here is delivered to them again, and not settled here."""
    on_revoked: Callable[[Partition], None] | None = None

    def mark_revoked(self) -> None:
        """It has gone to somebody else. To be called on the event loop."""
        if not self.is_revoked:
            self.is_revoked = True
            if self.on_revoked is not None:
                self.on_revoked(self)


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a source."""

    lane: Partition
    position: int
    """Where it lies in its lane, ascending. Pub/Sub: counted by the source."""
    place: str
    """Its name for people, and in its job's key: `topic/partition/offset`, `stream/shard/sequence number`."""
    value: bytes
    key: bytes | None = None
    """By which the broker spreads messages; what follows from it keeps it."""
    headers: tuple[tuple[str, bytes], ...] = ()
    stamp: int = 0
    """When the broker got it, in milliseconds since 1970; 0 where it does not say. The same at each delivery."""
    handle: str = ""
    """What the source needs to settle it."""

    @property
    def nbytes(self) -> int:
        return len(self.value) + len(self.key or b"") + sum(len(name) + len(value) for name, value in self.headers)


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One message for a sink."""

    value: bytes
    key: bytes | None = None
    headers: tuple[tuple[str, bytes], ...] = field(default=())

    @property
    def nbytes(self) -> int:
        return len(self.value) + len(self.key or b"") + sum(len(name) + len(value) for name, value in self.headers)


def job_key(connector: str, message: Message) -> str:
    """The idempotency key of a message's job: the same at each delivery, at most 128 characters.

    A digest of the message is in it, because places are given out anew when a topic is deleted and made again: another
    message at the same place is another job.
    """
    digest = hashlib.sha256(message.stamp.to_bytes(8, "big", signed=True))
    for part in (message.key or b"", message.value):
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    mark = digest.hexdigest()[:_DIGEST_CHARS]
    key = f"{connector}/{message.place}/{mark}"
    if len(key) <= KEY_CHARS:
        return key
    return f"{hashlib.sha256(f'{connector}/{message.place}'.encode()).hexdigest()}/{mark}"
