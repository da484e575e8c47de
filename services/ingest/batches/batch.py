"""A batch and its chunks: plain values, and plain functions from one to the next. No clock, no database.

                         list, plan, run chunks                all chunks done
    submit ──> RUNNING ─────────────────────────> RUNNING ──────────────────────> SUCCEEDED
                 │  ^                                │
          pause  v  │  resume                        ├─ cancelled by a client ──> CANCELLED
                PAUSED ──────────────────────────────┴─ input or output at fault > FAILED

A **duty** is what one instance at a time does for a batch as a whole, under a lease: it lists the inputs (which pins
them), plans chunks, and in the end says what came of it. A **chunk** is some rows that follow each other in one file:

                claim                  stage (fenced)            publish
    WAITING ────────────> RUNNING ─────────────────────> STAGED ─────────> DONE
       ^                     │   the part lies under the lease's own name     the part has its own name
       └─ lapse, release ────┘

Every write about a chunk names the lease that its writer holds (the fence). Of two that run one chunk, because one was
only slow, the fence lets one stage its part; and only what was staged is published. So a row is in the results once,
and the counts are those of the parts.

Chunks that are claimed again run from their first row; nothing of the attempt before is seen anywhere.
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
"""In the output. Names that begin with an underscore are passed over by readers of folders of Parquet."""

CHUNK_ROWS = 4_096
"""Rows of a chunk, unless a client says otherwise."""
ATTEMPTS = 5
"""Of a row by itself."""
MAX_TRIES = 8
"""Times that a chunk, or a duty, may break for a reason of its own before its batch fails: so one that kills its
instance each time does not do so for ever."""
EXCLUSIVE_AFTER = 4
"""Times that a chunk may break before it is run by itself: what runs beside one that kills is not to be blamed."""
RETRY_MS = 1_000
RETRY_MAX_MS = 30_000


class BatchState(StrEnum):
    """Where a batch stands."""

    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


FINAL = frozenset({BatchState.SUCCEEDED, BatchState.FAILED, BatchState.CANCELLED})


class ChunkState(StrEnum):
    """Where a chunk stands."""

    WAITING = "waiting"
    RUNNING = "running"
    STAGED = "staged"
    DONE = "done"
    DROPPED = "dropped"
    """Its batch has ended without it."""


class Format(StrEnum):
    """What the inputs are."""

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
    """How a batch is going to end, once nobody works on it any more."""

    state: BatchState
    reason: str


@dataclass(frozen=True, slots=True)
class Totals:
    """What has come of a batch so far, or in the end."""

    rows: int = 0
    """In the chunks that are planned."""
    ok: int = 0
    failed: int = 0
    chunks: int = 0
    chunks_done: int = 0
    nbytes: int = 0
    """Of the parts."""
    codes: Mapping[str, int] = field(default_factory=dict)
    """Failed rows by status code."""
    versions: tuple[str, ...] = ()
    """Of the model, that answered."""
    note: str = ""
    """What some chunk waits for."""


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch as it is at one moment. Times are UTC, in whole milliseconds."""

    id: str
    inputs: tuple[str, ...]
    output: str
    format: Format
    model_name: str
    signature: Signature
    columns: tuple[tuple[str, str], ...]
    """Input of the model, and the column that feeds it."""
    submitted_at: datetime
    updated_at: datetime
    model_version: str = ""
    kept: bytes = b""
    """The Arrow schema (serialised) of the columns that are carried over."""
    texts: tuple[str, ...] = ()
    state: BatchState = BatchState.RUNNING
    tenant: str = ""
    key: str = ""
    digest: bytes = b""
    labels: tuple[tuple[str, str], ...] = ()
    chunk_rows: int = CHUNK_ROWS
    max_attempts: int = ATTEMPTS
    free_at: datetime | None = None
    """Its duty may be taken up from then on."""
    lease: Lease | None = None
    tries: int = 0
    """Times that a duty was taken up and did not come to its end."""
    listing: Entry | None = None
    """Set once the inputs are pinned."""
    files: int = 0
    is_planned: bool = False
    ending: Ending | None = None
    totals: Totals | None = None
    """Set when nothing more can change."""
    ended_at: datetime | None = None
    message: str = ""
    """Why it failed or was cancelled."""
    note: str = ""
    """What its duty waits for."""
    steps: tuple[BatchStep, ...] = ()

    @property
    def is_final(self) -> bool:
        return self.state in FINAL

    @property
    def is_ending(self) -> bool:
        """No chunk is begun any more."""
        return self.ending is not None or self.totals is not None

    def output_url(self, *names: str) -> str:
        """A URL below the output."""
        return join(self.output, "/".join(names))


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some rows of one file."""

    batch: str
    number: int
    entry: Entry
    """The file; for objects, the listing."""
    line: int
    line_end: int
    """Where the file's line begins in the listing, and where the next one does."""
    span: Span
    first: int
    """The number of its first row, counted through the whole batch."""
    state: ChunkState = ChunkState.WAITING
    free_at: datetime | None = None
    """May be claimed from then on: waiting since, waiting until, or when its lease lapses. None: not any more."""
    lease: Lease | None = None
    attempts: int = 0
    staged: str = ""
    """The name of its part in the staging folder."""
    ok: int = 0
    failed: int = 0

    @property
    def id(self) -> str:
        return f"{self.batch}-{self.number:08d}"


class Duty(StrEnum):
    """What is to be done for a batch as a whole."""

    LIST = "list"
    PLAN = "plan"
    FINISH = "finish"


def duty_of(batch: Batch, *, is_busy: bool, has_unfinished: bool) -> Duty | None:
    """What there is to do.

    Args:
        is_busy: somebody runs a chunk, or a part waits to be published.
        has_undone: some chunk is not done.
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
    """How a batch ends that nobody works on any more, and whose totals are known."""
    if batch.ending is not None:
        return batch.ending
    if batch.totals is not None and batch.totals.failed and not batch.totals.ok:
        codes = ", ".join(f"{rows} {code}" for code, rows in batch.totals.codes.items())
        return Ending(BatchState.FAILED, f"no row was answered ({codes}): {DEAD}/ says why, row by row")
    return Ending(BatchState.SUCCEEDED, "every row was run")


@dataclass(frozen=True, slots=True)
class RetryDecision:
    """Decision about what broke: again at a time, counted or not, or the batch fails for it."""

    again_at: datetime | None
    is_counted: bool
    reason: str


_FATAL = frozenset({Code.INVALID_ARGUMENT, Code.DATA_LOSS, Code.NOT_FOUND, Code.ALREADY_EXISTS, Code.UNIMPLEMENTED})
_PASSING = frozenset({Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED, Code.DEADLINE_EXCEEDED, Code.ABORTED})


def decide_after_failure(tries: int, error: ShoalError, now: datetime) -> RetryDecision:
    """What becomes of a chunk or a duty that broke `tries` times, this one included: by an error, not by a kill.

    What is wrong with the inputs is so for ever; an outage passes, however long it lasts; anything else is tried some
    times.
    """
    reason = f"{error.code.name}: {error.message}"
    if error.code in _FATAL or (error.code not in _PASSING and tries >= MAX_TRIES):
        return RetryDecision(None, True, reason)
    wait_ms = min(RETRY_MS * 2 ** min(tries - 1, 10), RETRY_MAX_MS)
    return RetryDecision(now + timedelta(milliseconds=wait_ms), error.code not in _PASSING, reason)


def paused_ms(steps: tuple[BatchStep, ...], now: datetime) -> int:
    """How long a batch was paused."""
    total = timedelta()
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        if step.state is BatchState.PAUSED:
            total += (now if following is None else following.at) - step.at
    return int(total.total_seconds() * 1000)


def seconds_of(batch: Batch, now: datetime) -> float:
    """How long a batch has been at work, without the time that it was paused."""
    end = batch.ended_at or now
    return max((end - batch.submitted_at).total_seconds() - paused_ms(batch.steps, end) / 1000, 0.001)
