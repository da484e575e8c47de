"""Models in the store's registry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp

from shoal.errors import ShoalError
from shoal.store.v1 import store_pb2 as store


@dataclass(frozen=True)
class ModelFile:
    """One file of a version."""

    path: str
    """Path in the version's folder; a leading `../` means the model's folder."""
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class ModelVersion:
    """One version of a model. Versions are immutable."""

    name: str
    version: int
    files: tuple[ModelFile, ...]
    content_digest: str
    """Digest of all files: equal for versions with equal files."""
    created_at: datetime | None
    labels: Mapping[str, str] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    """Aliases that point at the version at present."""

    @property
    def size_bytes(self) -> int:
        """Size of all files together."""
        return sum(file.size_bytes for file in self.files)


@dataclass(frozen=True)
class Pushed:
    """Outcome of a push, for one version."""

    model: ModelVersion
    existed: bool
    """True when the registry held the same content before: nothing was registered."""
    sent_bytes: int
    """Bytes uploaded for the version; 0 when the store had all of its files."""
    ready: bool | None = None
    """True: ready on every infer instance. False: the model's version policy excludes it. None: no wait requested."""


@dataclass(frozen=True)
class ModelPush:
    """Outcome of one model of a repository."""

    name: str
    pushed: tuple[Pushed, ...] = ()
    """Its versions; empty when it was not pushed."""
    error: ShoalError | None = None
    """Reason why the model was not pushed, or is registered and not ready."""


@dataclass(frozen=True)
class Progress:
    """Progress of a push or download."""

    path: str
    """The file being transferred."""
    done_bytes: int
    """Bytes of all files so far; files that the store already had count as done."""
    total_bytes: int


def of_model(message: store.ModelVersion) -> ModelVersion:
    """Return the ModelVersion of a registry entry."""
    return ModelVersion(
        name=message.name,
        version=message.version,
        files=tuple(ModelFile(file.path, file.sha256, file.size_bytes) for file in message.files),
        content_digest=message.content_digest,
        created_at=of_time(message, "created_at"),
        labels=dict(message.labels),
        aliases=tuple(message.aliases),
    )


def of_time(message: object, field_name: str) -> datetime | None:
    """Return a message's timestamp in UTC; None when it is not set."""
    if not message.HasField(field_name):  # type: ignore[attr-defined]
        return None
    stamp: Timestamp = getattr(message, field_name)
    return stamp.ToDatetime(tzinfo=UTC)
