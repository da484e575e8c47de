"""Limits on submitted fields, and the names that ingest reserves."""

from __future__ import annotations

from datetime import timedelta

from google.protobuf.duration_pb2 import Duration

from shoal.errors import InvalidArgument

REQUEST_BYTES = 12 << 20
KEY_CHARS = 128
CALLER_BYTES = 4 << 10
"""Longest claims that are stored with a job: those of a token with a few groups take less than a tenth."""
LABELS = 64
LABEL_CHARS = 256
MODEL_NAME_CHARS = 128
MODEL_VERSION_CHARS = 32
REASON_CHARS = 1_000
MOST_ATTEMPTS = 100
LONGEST_BACKOFF = timedelta(days=1)
LONGEST_DEADLINE = timedelta(days=3_660)
LONGEST_DELAY = LONGEST_DEADLINE
LONGEST_ATTEMPT = timedelta(hours=1)
"""Longest time that a job may ask for one attempt: a model that never answers holds a place of its instance so long."""

SCHEDULED = "schedule:"
"""Reserved prefix of the idempotency keys of scheduled jobs: a client's job with such a key would block that firing."""

CONNECTOR_LABEL, SOURCE_LABEL = "connector", "source"
"""Labels of a connector's jobs. A client's job with an idempotency key may not have both: a connector whose message has
that key would take the job for its own, and send its answer."""

EXPLAIN = "explain"
"""Request parameter that makes infer add the instance, versions and timings to its response."""


def ms_of(field: str, duration: Duration, longest: timedelta) -> int:
    """Return a duration in whole milliseconds.

    Raises:
        InvalidArgument: the duration is invalid, negative, or longer than `longest`; the message names `field`.
    """
    seconds, nanos = duration.seconds, duration.nanos
    if not -1_000_000_000 < nanos < 1_000_000_000 or (seconds < 0 < nanos) or (nanos < 0 < seconds):
        raise InvalidArgument(f"{field}: not a valid duration ({seconds} s and {nanos} ns)")
    if seconds < 0 or nanos < 0:
        raise InvalidArgument(f"{field}: must not be negative, got {seconds} s and {nanos} ns")
    if seconds > longest.total_seconds():
        raise InvalidArgument(f"{field}: at most {int(longest.total_seconds())} s, got {seconds} s")
    return seconds * 1000 + nanos // 1_000_000
