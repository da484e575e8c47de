"""Batches and their chunks: plain values and pure functions over them, without clock or database.

                         list, plan, run chunks                all chunks done
    submit ──> RUNNING ─────────────────────────> RUNNING ──────────────────────> SUCCEEDED
                 │  ^                                │
          pause  v  │  resume                        ├─ cancelled by a client ──> CANCELLED
                PAUSED ──────────────────────────────┴─ bad input or output ─────> FAILED

A **duty** is work for a batch as a whole, which one instance does under a lease. The duties list the inputs (which pins
them), plan the chunks, and write the summary. A **chunk** is a range of consecutive rows of one file:

                claim                  stage (fenced)            publish
    WAITING ────────────> RUNNING ─────────────────────> STAGED ─────────> DONE
       ^                     │   the part is named after the lease         the part has its final name
       └─ lapse, release ────┘

Every write about a chunk names the lease of its writer (the fence). When two instances run one chunk, because one was
slow, the fence lets only one stage its part. Only a staged part is published. So each row is in the results once, and
the counts are those of the parts.

A chunk that is claimed again runs from its first row; nothing of the earlier attempt is visible.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum

from services.ingest.batches.inputs.locations import Entry, join
from services.ingest.batches.inputs.piece import Span
from services.ingest.batches.rows.signature import Signature
from services.ingest.job import Lease
from shoal.errors import Code, ShoalError

STAGING = "_staging"
MARKER = "_batch.json"
LISTING = "_inputs.jsonl"
MANIFEST = "_manifest.json"
SUMMARY = "_summary.json"
DEAD = "_dead"
"""Names in the output. Readers of Parquet folders skip names that begin with an underscore."""

CHUNK_ROWS = 4_096
"""Default number of rows of a chunk."""
ATTEMPTS = 5
"""Default number of attempts of a row that is sent by itself."""
MAX_TRIES = 8
"""Failures of a chunk or a duty, for a reason of its own, before its batch fails. The limit ends a poison chunk that
kills its instance each time."""
EXCLUSIVE_AFTER = 4
"""Failures of a chunk before it runs exclusively, so that chunks beside a poison chunk are not blamed for it."""
RETRY_MS = 1_000
RETRY_MAX_MS = 30_000


class BatchState(StrEnum):
    """State of a batch."""

    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


FINAL = frozenset({BatchState.SUCCEEDED, BatchState.FAILED, BatchState.CANCELLED})


class ChunkState(StrEnum):
    """State of a chunk."""

    WAITING = "waiting"
    RUNNING = "running"
    STAGED = "staged"
    DONE = "done"
    DROPPED = "dropped"
    """The batch ended without this chunk."""


class Format(StrEnum):
    """Format of the inputs."""

    JSONL = "jsonl"
    PARQUET = "parquet"
    NPZ = "npz"
    OBJECTS = "objects"


SUFFIXES: Mapping[str, Format] = {
    ".jsonl": Format.JSONL,
    ".ndjson": Format.JSONL,
    ".parquet": Format.PARQUET,
    ".npz": Format.NPZ,
}


@dataclass(frozen=True, slots=True)
class BatchStep:
    """One transition of a batch."""

    state: BatchState
    at: datetime
    instance: str
    reason: str


@dataclass(frozen=True, slots=True)
class Ending:
    """Final state and reason that a batch gets, once no instance works on it any more."""

    state: BatchState
    reason: str


@dataclass(frozen=True, slots=True)
class Totals:
    """Counts of a batch: so far, or final."""

    rows: int = 0
    """Rows of the planned chunks."""
    ok: int = 0
    failed: int = 0
    chunks: int = 0
    chunks_done: int = 0
    nbytes: int = 0
    """Size of the parts."""
    codes: Mapping[str, int] = field(default_factory=dict)
    """Failed rows by status code."""
    versions: tuple[str, ...] = ()
    """Versions of the model that ran rows."""
    note: str = ""
    """Cause for which a chunk waits."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Snapshot of a batch. Times are UTC, in whole milliseconds."""

    id: str
    inputs: tuple[str, ...]
    """Empty where only the state of a batch was read."""
    output: str
    format: Format
    model_name: str
    signature: Signature
    columns: tuple[tuple[str, str], ...]
    """Pairs: an input of the model, and the column that feeds it."""
    submitted_at: datetime
    updated_at: datetime
    model_version: str = ""
    kept: bytes = b""
    """Serialised Arrow schema of the columns that are carried over."""
    texts: tuple[str, ...] = ()
    state: BatchState = BatchState.RUNNING
    tenant: str = ""
    key: str = ""
    digest: bytes = b""
    labels: tuple[tuple[str, str], ...] = ()
    chunk_rows: int = CHUNK_ROWS
    max_attempts: int = ATTEMPTS
    free_at: datetime | None = None
    """Time from which the duty may be claimed."""
    lease: Lease | None = None
    tries: int = 0
    """Claims of the current duty that did not finish it."""
    listing: Entry | None = None
    """File that lists the pinned inputs; None until the inputs are pinned."""
    files: int = 0
    is_planned: bool = False
    ending: Ending | None = None
    totals: Totals | None = None
    """Final counts; None while they can still change."""
    ended_at: datetime | None = None
    message: str = ""
    """Reason of a failure or cancellation."""
    note: str = ""
    """Cause for which the duty waits."""
    steps: tuple[BatchStep, ...] = ()
    caller: bytes = b""
    """The verified caller that the batch runs for; empty without a policy."""

    @property
    def is_final(self) -> bool:
        return self.state in FINAL

    @property
    def is_ending(self) -> bool:
        """True when no further chunk is started."""
        return self.ending is not None or self.totals is not None

    def output_url(self, *names: str) -> str:
        """Return a URL below the output."""
        return join(self.output, "/".join(names))


@dataclass(frozen=True, slots=True)
class Chunk:
    """Range of consecutive rows of one file."""

    batch: str
    number: int
    entry: Entry
    """The file; for objects, the listing."""
    line: int
    line_end: int
    """Offsets in the listing: of the file's line, and of the line after it."""
    span: Span
    first: int
    """Number of the first row, counted through the whole batch."""
    state: ChunkState = ChunkState.WAITING
    free_at: datetime | None = None
    """Time from which the chunk may be claimed: planned, delayed until, or the lease's end. None: never again."""
    lease: Lease | None = None
    attempts: int = 0
    staged: str = ""
    """Name of the part in the staging folder."""
    ok: int = 0
    failed: int = 0

    @property
    def id(self) -> str:
        return f"{self.batch}-{self.number:08d}"


class Duty(StrEnum):
    """Work for a batch as a whole."""

    LIST = "list"
    PLAN = "plan"
    FINISH = "finish"


def duty_of(batch: Batch, *, is_busy: bool, has_unfinished: bool) -> Duty | None:
    """Return the next duty of a batch, or None when there is nothing to do.

    Args:
        is_busy: an instance runs a chunk, or a part waits to be published.
        has_unfinished: some chunk is not done.
    """
    if batch.is_final:
        return None
    if batch.is_ending:
        return None if is_busy else Duty.FINISH
    if batch.state is BatchState.PAUSED:
        return None
    if batch.listing is None:
        return Duty.LIST
    if not batch.is_planned:
        return Duty.PLAN
    return None if has_unfinished else Duty.FINISH


def ending_of(batch: Batch) -> Ending:
    """Return the ending of a batch that no instance works on any more, and whose totals are final."""
    if batch.ending is not None:
        return batch.ending
    if batch.totals is not None and batch.totals.failed and not batch.totals.ok:
        codes = ", ".join(f"{rows} {code}" for code, rows in batch.totals.codes.items())
        return Ending(BatchState.FAILED, f"no row succeeded ({codes}): {DEAD}/ has the reason of each row")
    return Ending(BatchState.SUCCEEDED, "every row was run")


@dataclass(frozen=True, slots=True)
class RetryDecision:
    """Decision after a failure: retry at `retry_at`, counted or not, or (None) fail the batch."""

    retry_at: datetime | None
    is_counted: bool
    reason: str


_FATAL = frozenset({Code.INVALID_ARGUMENT, Code.DATA_LOSS, Code.NOT_FOUND, Code.ALREADY_EXISTS, Code.UNIMPLEMENTED})
_TRANSIENT = frozenset({Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED, Code.DEADLINE_EXCEEDED, Code.ABORTED})


def decide_after_failure(tries: int, error: ShoalError, now: datetime) -> RetryDecision:
    """Decide about a chunk or a duty that failed `tries` times by an error, this failure included.

    Bad inputs fail the batch immediately. Outages are retried without limit. Any other error is retried up to
    MAX_TRIES times.
    """
    reason = f"{error.code.name}: {error.message}"
    if error.code in _FATAL or (error.code not in _TRANSIENT and tries >= MAX_TRIES):
        return RetryDecision(None, True, reason)
    wait_ms = min(RETRY_MS * 2 ** min(tries - 1, 10), RETRY_MAX_MS)
    return RetryDecision(now + timedelta(milliseconds=wait_ms), error.code not in _TRANSIENT, reason)


def paused_ms(steps: tuple[BatchStep, ...], now: datetime) -> int:
    """Return the time that a batch was paused."""
    total = timedelta()
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        if step.state is BatchState.PAUSED:
            total += (now if following is None else following.at) - step.at
    return int(total.total_seconds() * 1000)


def seconds_of(batch: Batch, now: datetime) -> float:
    """Return the running time of a batch in seconds, without pauses."""
    end = batch.ended_at or now
    return max((end - batch.submitted_at).total_seconds() - paused_ms(batch.steps, end) / 1000, 0.001)
