"""What an ingest instance is told (SHOAL_INGEST_*)."""

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
    """See each field."""

    mesh: Address
    """Required here: every job goes through it, to infer and to store."""
    mongo: Annotated[str, Field(pattern=r"^mongodb(\+srv)?://")]
    """Where jobs are kept: a replica set (a set of one will do), for its majority writes and change streams."""
    database: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,38}$")] = "shoal"
    """The database there."""
    lease_ms: Annotated[int, Field(ge=500, le=300_000)] = 5_000
    """A claimed job whose instance is not heard of for so long goes to another, and so does the lead."""
    renew_ms: Annotated[int, Field(ge=100, le=100_000)] = 1_500
    """How often leases are renewed: two renewals may be lost before a lease lapses."""
    max_in_flight: Annotated[int, Field(ge=1, le=10_000)] = 256
    """Jobs of one model that may be in calls to infer at once; of all models together, four times as many are held.
    infer batches what comes together, so this also bounds its batches."""
    attempt_timeout_ms: Annotated[int, Field(ge=1, le=86_400_000)] = 60_000
    """Longest a single attempt may take."""
    poll_ms: Annotated[int, Field(ge=10, le=60_000)] = 250
    """How soon an idle instance notices jobs that others submitted, or left."""
    ageing_ms: Annotated[int, Field(ge=0, le=86_400_000)] = 60_000
    """What one level of priority is worth: a job goes before one that waits so much longer at the next lower level."""
    inline_bytes: Annotated[int, Field(ge=0, le=12 << 20)] = 256 << 10
    """Requests above this are kept in the store, and the job refers to them: claims and scans stay light."""
    max_backlog: Annotated[int, Field(ge=1)] = 1_000_000
    """Queued jobs, of all instances together, beyond which submits are refused."""
    max_write_wait_ms: Annotated[int, Field(ge=100, le=3_600_000)] = 5_000
    """Submits that would wait longer for MongoDB are refused at once: half of what they may wait in all."""
    min_free_disk_bytes: Annotated[int, Field(ge=0)] = 512 << 20
    """While less is free on MongoDB's disk, submits are refused, so that what was accepted can end. 0: never."""
    stream_items: Annotated[int, Field(ge=1, le=100_000)] = 1_000
    """Unacknowledged items of one SubmitStream beyond which it is not read further."""
    stream_bytes: Annotated[int, Field(ge=1)] = 32 << 20
    """The same in bytes; a single larger item passes alone."""
    pending_bytes: Annotated[int, Field(ge=1 << 20)] = 256 << 20
    """Requests in memory that wait to be written, all calls together; beyond it Submit is refused and streams wait."""
    max_watches: Annotated[int, Field(ge=1)] = 10_000
    """WatchJob streams at once."""
    batch_urls: Annotated[str, Field(pattern=r"^((file|s3|gs|az)://[^,\s]*(,\s*|$))*$")] = "s3://,gs://,az://"
    """What batches may read and write, as beginnings of URLs with commas between them: `file:///data,s3://bucket/x`.
    Whoever may submit a batch reaches these places with the rights of this process. Empty: nothing."""
    batch_chunks: Annotated[int, Field(ge=1, le=64)] = 2
    """Chunks of batches that this instance runs at once: while one is read and written, the other keeps models busy."""
    batch_calls: Annotated[int, Field(ge=1, le=1_000)] = 16
    """Calls to infer at once for batches, each of as many rows as the model takes."""
    max_filter_watches: Annotated[int, Field(ge=1, le=2_000)] = 100
    """WatchJobs streams at once, each of which holds a change stream of its own: MongoDB reads its log for each."""
    run_items: Annotated[int, Field(ge=1, le=100_000)] = 1_000
    """Jobs of one RunStream without a result beyond which it is not read further."""
    run_items_together: Annotated[int, Field(ge=1)] = 100_000
    """The same of all such streams together; each may have one beyond it. About 2 KiB of memory each."""
    max_streams: Annotated[int, Field(ge=1)] = 10_000
    """RunStreams at once."""
    connectors: Path | None = None
    """A file of connectors (TOML): streams of Kafka and others that this instance takes part in."""
    keep_ended_ms: Annotated[int, Field(ge=0)] = 7 * 86_400_000
    """Jobs that succeeded, were cancelled or expired stay so long after their end, unless a rule says otherwise
    (SetJobRetention); their idempotency keys are known for as long. 0: for ever. Else a minute at least."""
    keep_dead_ms: Annotated[int, Field(ge=0)] = 30 * 86_400_000
    """The same of dead letters: jobs that are dead or failed."""
    keep_batches_ms: Annotated[int, Field(ge=0, le=36_500 * 86_400_000)] = 30 * 86_400_000
    """Batches stay so long after their end, and their idempotency keys are known for as long; what they wrote is not
    touched. 0: for ever. Else a minute at least."""
    retention_round_ms: Annotated[int, Field(ge=10, le=86_400_000)] = 30_000
    """How often the leader looks for jobs that have stayed long enough."""

    @property
    def batch_places(self) -> tuple[str, ...]:
        """`batch_urls`, one by one."""
        return tuple(url.strip() for url in self.batch_urls.split(",") if url.strip())

    @property
    def retention(self) -> dict[What, Keep]:
        """How long jobs and batches stay when no rule says otherwise."""
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
