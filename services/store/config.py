"""What the store service is told: `SHOAL_STORE_<FIELD>`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationInfo, field_validator

from mesh.process.config import ServiceConfig
from services.store.allowed_locations import PLACE

_BLOB_URL = r"^(file:///.+|(s3|s3a|gs|az|azure|adl|abfs|abfss)://[^/\s]+.*)$"


class StoreConfig(ServiceConfig):
    """Configuration of the store service. Units are in the names."""

    mongo: Annotated[str, Field(pattern=r"^mongodb(\+srv)?://.+")]
    """MongoDB, a replica set (change streams and transactions need one)."""
    database: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,63}$")] = "shoal"
    """The database there."""
    blobs: Annotated[str, Field(pattern=_BLOB_URL)]
    """Where bytes are kept: `file:///folder`, `s3://bucket/prefix`, `gs://...`, `az://...`. Credentials and endpoints
    of object stores come from their usual variables (AWS_ACCESS_KEY_ID, AWS_ENDPOINT, ...)."""
    staging: Annotated[Path | None, Field(validate_default=True)] = None
    """Local folder of unfinished uploads. For file:// it is always `<folder>/staging`; else it must be given."""
    s3_checksums: bool = True
    """Send S3 a SHA-256 with everything that is stored. Only for an S3 that refuses `x-amz-checksum-sha256`: false."""
    inline_bytes: Annotated[int, Field(ge=0, le=8 << 20)] = 256 << 10
    """Answers above this are blobs, and the result refers to them: queries stay light."""
    max_artifact_bytes: Annotated[int, Field(ge=1, le=1 << 42)] = 8 << 30
    """Largest artifact that is accepted."""
    max_uploads: Annotated[int, Field(ge=1, le=10_000)] = 64
    """Unfinished uploads that are kept, live ones included. Each may take `max_artifact_bytes` of the staging disk."""
    upload_age_ms: Annotated[int, Field(ge=1_000)] = 24 * 3_600_000
    """An upload that nobody goes on with is discarded after so long."""
    upload_idle_ms: Annotated[int, Field(ge=100)] = 60_000
    """An upload that sends nothing for so long is ended; what has arrived is kept."""
    collect_every_ms: Annotated[int, Field(ge=1_000)] = 600_000
    """How often artifacts that nobody refers to are looked for."""
    retention_ms: Annotated[int, Field(ge=100, le=86_400_000)] = 60_000
    """How often what retention no longer keeps is removed."""
    max_watches: Annotated[int, Field(ge=1, le=2_000)] = 200
    """Open WatchResults streams, each of which holds a change stream of its own."""
    max_streams: Annotated[int, Field(ge=1, le=2_000)] = 64
    """Open StreamResults streams, each of which holds up to 4 MiB (or one response that is larger)."""

    exports: tuple[Annotated[str, Field(pattern=PLACE)], ...] = ()
    """Where ExportResults may write: URLs with commas between them (`file:///data/exports,s3://reports/shoal,gs://`),
    each with all that lies under it. Exports to the caller need none."""
    max_exports: Annotated[int, Field(ge=1, le=100)] = 2
    """Exports that run at once, each of which holds a part (64 MiB of answers) in memory."""

    backups: tuple[Annotated[str, Field(pattern=PLACE)], ...] = ()
    """Where BackUp may write and Restore may read: URLs with commas between them, each with all that lies under it."""
    backup_databases: tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,63}$")], ...] = ()
    """Databases of the same MongoDB that belong into a backup, too: that of an ingest which has one of its own."""

    @field_validator("exports", "backups", "backup_databases", mode="before")
    @classmethod
    def _listed(cls, given: object) -> object:
        return tuple(filter(None, map(str.strip, given.split(",")))) if isinstance(given, str) else given

    @field_validator("staging")
    @classmethod
    def _staging_suits_blobs(cls, staging: Path | None, info: ValidationInfo) -> Path | None:
        is_local = str(info.data.get("blobs", "")).startswith("file://")
        if is_local and staging is not None:
            raise ValueError("only for object stores: with file:// blobs it is always <folder>/staging")
        if "blobs" in info.data and not is_local and staging is None:
            raise ValueError("required with an object store: a local folder for unfinished uploads")
        return staging
