"""Messages and partitions, the values that pass through a connector."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

from services.ingest.limits import KEY_CHARS

_DIGEST_CHARS = 16


@dataclass(eq=False, slots=True)
class Partition:
    """Ordered part of a source: a partition or a shard. Pub/Sub has a single one."""

    name: str
    is_revoked: bool = False
    """True once another instance owns the partition: messages in flight are delivered there, and not settled here."""
    on_revoked: Callable[[Partition], None] | None = None

    def mark_revoked(self) -> None:
        """Mark the partition as owned by another instance. Call it on the event loop."""
        if not self.is_revoked:
            self.is_revoked = True
            if self.on_revoked is not None:
                self.on_revoked(self)


@dataclass(frozen=True, slots=True)
class Message:
    """Message of a source."""

    partition: Partition
    position: int
    """Position in the partition, ascending. Pub/Sub: counted by the source."""
    location: str
    """Readable name, also part of the job's key: `topic/partition/offset`, `stream/shard/sequence number`."""
    value: bytes
    key: bytes | None = None
    """Partition key of the broker; the answer and the dead letter keep it."""
    headers: tuple[tuple[str, bytes], ...] = ()
    received_ms: int = 0
    """Time at which the broker received the message, in ms since 1970; 0: unknown. The same at each delivery."""
    handle: str = ""
    """Identifier with which the source settles the message."""

    @property
    def nbytes(self) -> int:
        return len(self.value) + len(self.key or b"") + sum(len(name) + len(value) for name, value in self.headers)


@dataclass(frozen=True, slots=True)
class Outgoing:
    """Message for a sink."""

    value: bytes
    key: bytes | None = None
    headers: tuple[tuple[str, bytes], ...] = field(default=())

    @property
    def nbytes(self) -> int:
        return len(self.value) + len(self.key or b"") + sum(len(name) + len(value) for name, value in self.headers)


def job_key(connector: str, message: Message) -> str:
    """Return the idempotency key of a message's job: the same at each delivery, at most 128 characters.

    The key has a digest of the message, because locations are reused when a topic is deleted and created again: another
    message at the same location is another job.
    """
    digest = hashlib.sha256(message.received_ms.to_bytes(8, "big", signed=True))
    for part in (message.key or b"", message.value):
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    suffix = digest.hexdigest()[:_DIGEST_CHARS]
    key = f"{connector}/{message.location}/{suffix}"
    if len(key) <= KEY_CHARS:
        return key
    return f"{hashlib.sha256(f'{connector}/{message.location}'.encode()).hexdigest()}/{suffix}"
