"""Models as the store's registry has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp

from shoal.store.v1 import store_pb2 as store


@dataclass(frozen=True)
class ModelFile:
    """One file of a version."""

    path: str
    """In the version's folder; `../` in front: in the model's folder."""
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class ModelVersion:
    """One version of a model. Versions are immutable."""

    name: str
    version: int
    files: tuple[ModelFile, ...]
    content_digest: str
    """Equal for two versions with equal files."""
    created_at: datetime | None
    labels: Mapping[str, str] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    """Aliases that point at it now."""

    @property
    def size_bytes(self) -> int:
        """All its files."""
        return sum(file.size_bytes for file in self.files)


@dataclass(frozen=True)
class Pushed:
    """What a push made of one version."""

    model: ModelVersion
    existed: bool
    """The registry had this very content before: nothing was registered."""
    sent_bytes: int
    """What was uploaded for it: 0 when the store had all of it."""
    ready: bool | None = None
    """Every infer instance has it ready. False: the model's version policy leaves it out. None: not waited for."""


@dataclass(frozen=True)
class Progress:
    """How far a push (or a download) is."""

    path: str
    """The file that is on its way."""
    done_bytes: int
    """Of all files; those that the store already had count as done."""
    total_bytes: int


def of_model(message: store.ModelVersion) -> ModelVersion:
    """The value of a registry entry."""
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
    """A message's timestamp in UTC; None when it is not set."""
    if not message.HasField(field_name):  # type: ignore[attr-defined]
        return None
    stamp: Timestamp = getattr(message, field_name)
    return stamp.ToDatetime(tzinfo=UTC)
