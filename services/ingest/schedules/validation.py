"""Validation of a schedule message, and its conversion to a Schedule. Errors name the field."""

from __future__ import annotations

import re
from datetime import datetime

from services.ingest.intake.submission import job_of
from services.ingest.limits import LABELS
from services.ingest.schedules import cron
from services.ingest.schedules.schedule import Misfire, Overlap, Schedule
from shoal.errors import InvalidArgument
from shoal.ingest.v1 import ingest_pb2 as pb

TEMPLATE_BYTES = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_OWN_LABELS = 2
_NOT_IN_A_TEMPLATE = ("idempotency_key", "not_before", "delay", "depends_on")
_MISFIRES = {0: Misfire.SKIP, **{pb.MisfirePolicy.Value(f"MISFIRE_POLICY_{one.name}"): one for one in Misfire}}
_OVERLAPS = {0: Overlap.ALLOW, **{pb.OverlapPolicy.Value(f"OVERLAP_POLICY_{one.name}"): one for one in Overlap}}


def checked_name(name: str) -> str:
    """Return a valid name of a schedule.

    Raises:
        InvalidArgument: the name is invalid.
    """
    if not _NAME.fullmatch(name):
        raise InvalidArgument(
            f"name: 1 to 64 letters, digits, '.', '_' and '-', beginning with a letter or a digit; got {name[:80]!r}"
        )
    return name


def schedule_of(message: pb.Schedule, now: datetime, caller: bytes = b"") -> Schedule:
    """Return the schedule of a valid message, created at `now` by `caller`.

    Raises:
        InvalidArgument: a field is invalid; the message names it, and what was expected and received.
    """
    if message.misfire not in _MISFIRES:
        raise InvalidArgument(f"misfire: there is no policy {message.misfire}")
    if message.overlap not in _OVERLAPS:
        raise InvalidArgument(f"overlap: there is no policy {message.overlap}")
    zone = cron.checked(message.cron, message.time_zone)
    return Schedule(
        tenant=message.tenant,
        name=checked_name(message.name),
        cron=message.cron,
        zone=message.time_zone or "UTC",
        template=_template(message, now),
        created_at=now,
        updated_at=now,
        next_at=None if message.paused else cron.next_after(message.cron, zone, now),
        misfire=_MISFIRES[message.misfire],
        overlap=_OVERLAPS[message.overlap],
        is_paused=message.paused,
        caller=caller,
    )


def _template(message: pb.Schedule, now: datetime) -> bytes:
    if not message.HasField("job"):
        raise InvalidArgument("job: required, and not set")
    job = pb.SubmitRequest()
    job.CopyFrom(message.job)
    for name in _NOT_IN_A_TEMPLATE:
        field: object = getattr(job, name)
        if job.HasField(name) if name in ("not_before", "delay") else field:
            raise InvalidArgument(f"job.{name}: must be unset in a recurring job: the schedule sets its times and keys")
    if job.tenant not in ("", message.tenant):
        raise InvalidArgument(f"job.tenant: expected the schedule's own, {message.tenant!r}, or none")
    if len(job.labels) > LABELS - _OWN_LABELS:
        raise InvalidArgument(f"job.labels: at most {LABELS - _OWN_LABELS}, got {len(job.labels)}")
    if (size := job.ByteSize()) > TEMPLATE_BYTES:
        raise InvalidArgument(f"job: at most {TEMPLATE_BYTES} bytes serialised, got {size}")
    job.tenant = message.tenant
    try:
        job_of(job, job_id="", now=now, instance="", inline_bytes=0, traceparent="")
    except InvalidArgument as err:
        raise InvalidArgument(f"job.{err.message}") from err
    return job.SerializeToString(deterministic=True)
