"""Configuration of an ingest instance (SHOAL_INGEST_*)."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from mesh.process.config import Address, ServiceConfig
from services.ingest.connectors import settings
from services.ingest.job import DEAD_LETTERS, FINAL
from services.ingest.retention.rules import BATCHES, SHORTEST, Keep, What


class IngestConfig(ServiceConfig):
    """Configuration; each field has its environment variable."""

    mesh: Address
    """Address of the mesh, through which all calls to infer and the store go. Required."""
    mongo: Annotated[str, Field(pattern=r"^mongodb(\+srv)?://")]
    """MongoDB URI of the job database: a replica set (one member is enough) for majority writes and change streams."""
    database: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,38}$")] = "shoal"
    """Name of the job database in MongoDB."""
    lease_ms: Annotated[int, Field(ge=500, le=300_000)] = 5_000
    """Duration of a lease on a job or on leadership. Without a renewal for so long, another instance takes it over."""
    renew_ms: Annotated[int, Field(ge=100, le=100_000)] = 1_500
    """Interval between lease renewals: two renewals may be lost before a lease lapses."""
    max_in_flight: Annotated[int, Field(ge=1, le=10_000)] = 256
    """Maximum jobs of one model in concurrent calls to infer; an instance holds four times as many of all models.
    infer batches concurrent requests, so this also bounds its batches."""
    attempt_timeout_ms: Annotated[int, Field(ge=1, le=86_400_000)] = 60_000
    """Timeout of one attempt."""
    poll_ms: Annotated[int, Field(ge=10, le=60_000)] = 250
    """Interval at which an instance polls for jobs of other instances; up to four times as long while it finds none."""
    ageing_ms: Annotated[int, Field(ge=0, le=86_400_000)] = 60_000
    """Waiting time that one priority level is worth: a job runs before lower-priority jobs that wait less than so much
    longer."""
    inline_bytes: Annotated[int, Field(ge=0, le=12 << 20)] = 256 << 10
    """Maximum size of a request in the job's document. Larger requests go to the store, which keeps claims fast."""
    max_backlog: Annotated[int, Field(ge=1)] = 1_000_000
    """Maximum number of queued jobs, of all instances together; submits beyond it are rejected. Includes the jobs that
    wait for other jobs."""
    max_write_wait_ms: Annotated[int, Field(ge=100, le=3_600_000)] = 5_000
    """Maximum expected wait for a write to MongoDB; submits beyond it are rejected. Half of a submit's timeout."""
    min_free_disk_bytes: Annotated[int, Field(ge=0)] = 512 << 20
    """Minimum free space on MongoDB's disk; below it submits are rejected, so that queued jobs can end. 0: no limit."""
    stream_items: Annotated[int, Field(ge=1, le=100_000)] = 1_000
    """Maximum unacknowledged items of one SubmitStream; at the maximum, reading pauses."""
    stream_bytes: Annotated[int, Field(ge=1)] = 32 << 20
    """Maximum unacknowledged bytes of one SubmitStream; a single larger item passes alone."""
    pending_bytes: Annotated[int, Field(ge=1 << 20)] = 256 << 20
    """Maximum bytes of requests in memory that wait for their write, of which a tenant may have twice what is free (two
    thirds when it is alone). Beyond it Submit is rejected, and streams wait."""
    max_watches: Annotated[int, Field(ge=1)] = 10_000
    """Maximum number of concurrent WatchJob streams."""
    batch_urls: Annotated[str, Field(pattern=r"^((file|s3|gs|az)://[^,\s]*(,\s*|$))*$")] = "s3://,gs://,az://"
    """URL prefixes that batches may read and write, separated by commas: `file:///data,s3://bucket/x`. Every client
    that may submit a batch accesses these URLs with the rights of this process. Empty: none. With a policy, `{tenant}`
    stands for the tenant of the caller (`file:///data/{tenant}`), and `file:///` or `s3://` alone
    allow nothing."""
    batch_chunks: Annotated[int, Field(ge=1, le=64)] = 3
    """Chunks of batches that this instance runs concurrently; a tenant leaves a third of them to others. Models stay
    busy while another chunk is read or written."""
    batch_calls: Annotated[int, Field(ge=1, le=1_000)] = 24
    """Maximum concurrent calls to infer for batches, each with as many rows as the model accepts; a tenant leaves a
    third of them to others."""
    max_filter_watches: Annotated[int, Field(ge=1, le=2_000)] = 100
    """Maximum number of concurrent WatchJobs streams. Each is a change stream, for which MongoDB reads its log."""
    run_items: Annotated[int, Field(ge=1, le=100_000)] = 1_000
    """Maximum jobs without a result of one RunStream; at the maximum, reading pauses."""
    run_items_together: Annotated[int, Field(ge=1)] = 100_000
    """Maximum jobs without a result of all RunStreams together; each stream may have one more. About 2 KiB each."""
    max_streams: Annotated[int, Field(ge=1)] = 10_000
    """Maximum number of concurrent RunStreams."""
    connectors: Path | None = None
    """TOML file of connectors: streams of Kafka and other brokers that this instance serves."""
    keep_ended_ms: Annotated[int, Field(ge=0)] = 7 * 86_400_000
    """Retention of jobs that succeeded, were cancelled or expired, and of their idempotency keys, from the job's end;
    rules (SetJobRetention) override it. 0: for ever; otherwise at least a minute."""
    keep_dead_ms: Annotated[int, Field(ge=0)] = 30 * 86_400_000
    """Retention of dead letters: jobs that are dead or failed. Otherwise like `keep_ended_ms`."""
    keep_batches_ms: Annotated[int, Field(ge=0, le=36_500 * 86_400_000)] = 30 * 86_400_000
    """Retention of batches and their idempotency keys, from the batch's end; their output files stay. 0: for ever;
    otherwise at least a minute."""
    retention_round_ms: Annotated[int, Field(ge=10, le=86_400_000)] = 30_000
    """Interval at which the leader removes jobs past their retention."""

    @property
    def batch_url_prefixes(self) -> tuple[str, ...]:
        """The URL prefixes of `batch_urls`."""
        return tuple(url.strip() for url in self.batch_urls.split(",") if url.strip())

    @property
    def retention(self) -> dict[What, Keep]:
        """Default retention of jobs and batches, which rules override."""
        spans: dict[What, int] = {
            state: self.keep_dead_ms if state in DEAD_LETTERS else self.keep_ended_ms for state in FINAL
        }
        spans[BATCHES] = self.keep_batches_ms
        return {what: timedelta(milliseconds=ms) if ms else None for what, ms in spans.items()}

    @field_validator("connectors")
    @classmethod
    def _usable(cls, path: Path | None) -> Path | None:
        if path is not None:
            settings.read(path)
        return path

    @field_validator("keep_ended_ms", "keep_dead_ms", "keep_batches_ms")
    @classmethod
    def _stays_a_minute(cls, keep_ms: int) -> int:
        if 0 < keep_ms < SHORTEST // timedelta(milliseconds=1):
            raise ValueError(f"{keep_ms}: 0 for ever, or at least 60000")
        return keep_ms

    @model_validator(mode="after")
    def _renews_in_time(self) -> IngestConfig:
        if self.renew_ms * 2 > self.lease_ms:
            raise ValueError(f"renew_ms={self.renew_ms} must be at most half of lease_ms={self.lease_ms}")
        return self
