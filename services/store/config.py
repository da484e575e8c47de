"""Configuration of the store service, from variables `SHOAL_STORE_<FIELD>`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationInfo, field_validator

from mesh.process.config import ServiceConfig
from services.store.allowed_locations import LOCATION_URL

_BLOB_URL = r"^(file:///.+|(s3|s3a|gs|az|azure|adl|abfs|abfss)://[^/\s]+.*)$"


class StoreConfig(ServiceConfig):
    """Configuration of the store service. Units are in the names."""

    mongo: Annotated[str, Field(pattern=r"^mongodb(\+srv)?://.+")]
    """MongoDB, a replica set (change streams and transactions need one)."""
    database: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,63}$")] = "shoal"
    """Name of the MongoDB database."""
    blobs: Annotated[str, Field(pattern=_BLOB_URL)]
    """URL of the blobs: `file:///folder`, `s3://bucket/prefix`, `gs://...`, `az://...`. Credentials and endpoints
    of object stores come from their usual variables (AWS_ACCESS_KEY_ID, AWS_ENDPOINT, ...)."""
    staging: Annotated[Path | None, Field(validate_default=True)] = None
    """Local folder of unfinished uploads. For file:// it is always `<folder>/staging`; else it must be given."""
    s3_checksums: bool = True
    """Send S3 a SHA-256 with every upload. Set it to false only for an S3 that rejects `x-amz-checksum-sha256`."""
    inline_bytes: Annotated[int, Field(ge=0, le=8 << 20)] = 256 << 10
    """Larger answers are stored as blobs, and the result refers to them: queries stay light."""
    max_artifact_bytes: Annotated[int, Field(ge=1, le=1 << 42)] = 8 << 30
    """Largest artifact that is accepted."""
    registry_bytes: Annotated[int, Field(ge=1 << 20, le=64 << 20)] = 8 << 20
    """Bytes of the versions and aliases of all models in the registry, as MongoDB stores them: about 400 for a version
    with one file and 130 for each further one."""
    max_uploads: Annotated[int, Field(ge=1, le=10_000)] = 64
    """Unfinished uploads that are kept, including those in progress. Each may use `max_artifact_bytes` of the staging
    disk."""
    min_free_disk_bytes: Annotated[int, Field(ge=0)] = 1 << 30
    """Free space of the staging disk that uploads leave: twice what ingest reserves for queued jobs. 0: no limit."""
    upload_age_ms: Annotated[int, Field(ge=1_000)] = 24 * 3_600_000
    """Time after which an upload that is not resumed is discarded."""
    upload_idle_ms: Annotated[int, Field(ge=100)] = 60_000
    """Time after which an upload that sends nothing is ended; the received bytes are kept."""
    collect_every_ms: Annotated[int, Field(ge=1_000)] = 600_000
    """Interval of garbage collection: unreferenced artifacts are marked, then removed."""
    retention_ms: Annotated[int, Field(ge=100, le=86_400_000)] = 60_000
    """Interval of retention: everything older than its rule allows is removed."""
    max_watches: Annotated[int, Field(ge=1, le=2_000)] = 200
    """Most WatchResults streams at a time, each with a change stream of its own. As many WatchModels streams of tenants
    may be open, and of services."""
    max_streams: Annotated[int, Field(ge=1, le=2_000)] = 64
    """Most StreamResults streams at a time. Each holds up to 4 MiB (or one response that is larger)."""

    audit_keep_ms: Annotated[int, Field(ge=86_400_000)] = 400 * 86_400_000
    """Time for which entries of the audit log are kept."""
    audit_anchor_ms: Annotated[int, Field(ge=1_000, le=86_400_000)] = 300_000
    """Interval of anchors of the audit log. An entry that is cut off before the next anchor may not be missed."""

    exports: tuple[Annotated[str, Field(pattern=LOCATION_URL)], ...] = ()
    """URLs, separated by commas, below which ExportResults may write (`file:///data/exports,s3://reports/shoal,gs://`).
    Exports to the caller need none. With a policy, `{tenant}` stands for the tenant of the caller
    (`s3://reports/{tenant}`), and `file:///` or `s3://` alone allow nothing."""
    max_exports: Annotated[int, Field(ge=1, le=100)] = 3
    """Most exports at a time, of which one tenant may have two thirds. Each holds a part (64 MiB of answers) in
    memory."""

    backups: tuple[Annotated[str, Field(pattern=LOCATION_URL)], ...] = ()
    """URLs, separated by commas, below which BackUp may write and Restore may read."""
    backup_databases: tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,63}$")], ...] = ()
    """Other databases of the same MongoDB that a backup includes: that of an ingest with its own database."""

    @field_validator("exports", "backups", "backup_databases", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        return tuple(filter(None, map(str.strip, value.split(",")))) if isinstance(value, str) else value

    @field_validator("staging")
    @classmethod
    def _staging_suits_blobs(cls, staging: Path | None, info: ValidationInfo) -> Path | None:
        is_local = str(info.data.get("blobs", "")).startswith("file://")
        if is_local and staging is not None:
            raise ValueError("only for object stores: with file:// blobs it is always <folder>/staging")
        if "blobs" in info.data and not is_local and staging is None:
            raise ValueError("required with an object store: a local folder for unfinished uploads")
        return staging
