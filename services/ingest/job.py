"""A job and its states: plain values, and plain functions from one to the next. No clock, no database.

                      claim                       end (the store has the result)
    submit ──> QUEUED ──────────> RUNNING ──────────────────────> SUCCEEDED   the model answered
                 ^  │              │  │                           FAILED      the request is at fault
                 │  │              │  │                           DEAD        out of attempts
                 └──│── try_again ─┘  │                           CANCELLED   by a client
                    │   (backoff, lapse, release)                 EXPIRED     its deadline passed
                    └──── take_over ──┴── end ──────────────────>

    FAILED, DEAD ──requeue──> QUEUED, as the next generation

A job that somebody works on carries a **lease**: an id that is never used twice, its owner, and when it lapses. Every
write about such a job names the lease that the writer holds and the attempt it belongs to (the fence), so a worker that
was only slow writes nothing. `take_over` gives the job a new lease and thereby shuts out the old holder; cancellation,
expiry and recovery begin with it.

A job ends in two steps: its result is recorded in the store, where the first one stands for ever; then the state
follows from the result that stands (`state_of`). A process that dies between the steps leaves a lease that lapses;
whoever takes the job over records again, is told what stands, and ends the job by it. So states and results cannot
disagree.

A job with dependencies is QUEUED, and not due before they have succeeded (`dependencies/`).

A **generation** is one such life. A dead letter (FAILED, DEAD) that is requeued lives again as the next generation,
with all its attempts; its result carries the generation, and the store lets it take the place of the earlier failure.
What a holder of the earlier generation still writes, the fence keeps from the job, and the store from the result.

`attempts` counts attempts that may have reached a model. One that certainly did not (nobody there, or shed before it
ran) is taken back and counted in `refusals` instead: an outage costs no attempts, however long it lasts. `lapses`
counts those whose holder died, which is mostly no fault of the job's: they have a bound of their own, `MAX_LAPSES`.
What has lapsed more than `SOON_AGAIN` times comes back at a drawn time, away from those that it lapsed with. So
innocent jobs outlive a holder that dies again and again, and what kills each of its holders ends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import IntEnum, StrEnum
from typing import Any, TypedDict, Unpack

from services.ingest.tenant_queue import TenantQueueKey
from shoal.errors import Code


class State(StrEnum):
    """Where a job stands."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    DEAD = "dead"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


DEAD_LETTERS = frozenset({State.FAILED, State.DEAD})
"""What may be requeued: it ended without an answer that anybody waits for, and its request is kept."""
FINAL = frozenset({State.SUCCEEDED, State.FAILED, State.DEAD, State.CANCELLED, State.EXPIRED})
DONE_WITH = FINAL - DEAD_LETTERS
"""Nobody looks into their requests any more, unless a client said so (`Job.is_kept`)."""


class Outcome(IntEnum):
    """How a result ended its job; the numbers are those of shoal.store.v1.Result.Outcome."""

    SUCCEEDED = 1
    FAILED = 2
    CANCELLED = 3
    EXPIRED = 4


PERMANENT = frozenset(
    {
        Code.INVALID_ARGUMENT,
        Code.FAILED_PRECONDITION,
        Code.OUT_OF_RANGE,
        Code.ALREADY_EXISTS,
        Code.UNIMPLEMENTED,
        Code.PERMISSION_DENIED,
        Code.UNAUTHENTICATED,
    }
)
"""The request is at fault: no further attempt would help. Every other code is tried again, NOT_FOUND too: a model that
was pushed a moment ago may not be everywhere yet. A job may name its own codes instead (`Policy.codes`)."""

NOT_READY_WAIT_MS = 1_000
NOT_READY_MAX_WAIT_MS = 4_000
"""Shortest waits while a model seems not to be ready, doubling between these (and never above the job's longest): five
attempts then outlast the ten seconds that a restarted instance may take to load it."""
REFUSED_WAIT_MS = 200
REFUSED_MAX_WAIT_MS = 5_000
"""Waits of a job that found nobody: doubling between these, so that an outage costs little and its end is seen soon."""
MAX_LAPSES = 20
"""After so many the next one ends the job: it may be what its holders die of."""
SOON_AGAIN = 2
"""So many times a job that lapsed is due at once: mostly its holder was killed, and another is there."""
LAPSED_WAIT_MS = 500
LAPSED_MAX_WAIT_MS = 15_000
"""Longest drawn wait after each further lapse, doubling between these."""
TRANSITIONS_KEPT = 400
"""The newest transitions of a job that are kept: more than 100 attempts make. Only long outages reach it."""
MESSAGE_CHARS = 2_000
"""Messages of failed attempts are cut here: a job stays small whatever a model says."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How often and how soon a job is tried again."""

    max_attempts: int = 5
    initial_backoff_ms: int = 200
    max_backoff_ms: int = 30_000
    codes: tuple[int, ...] = ()
    """The status codes that are worth another attempt; none: all but PERMANENT."""

    def is_permanent(self, code: int) -> bool:
        """Whether a failure with `code` ends the job at once.

        ABORTED never does: it is what an attempt ends with whose instance died, which says nothing about the request.
        """
        if code == Code.ABORTED:
            return False
        return code not in self.codes if self.codes else code in PERMANENT


DEFAULT_POLICY = Policy()


@dataclass(frozen=True, slots=True)
class Transition:
    """One step of a job's life."""

    state: State
    at: datetime
    attempt: int
    instance: str
    reason: str


@dataclass(frozen=True, slots=True)
class Lease:
    """Who works on a job, until when. `process` tells two processes of the same instance name apart."""

    id: str
    owner: str
    process: str
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class End:
    """Decision: the job has its outcome; record it."""

    outcome: Outcome
    code: int = 0
    message: str = ""
    generation: int = 1
    """The job's, that it is the end of."""


class Changes(TypedDict, total=False):
    """The fields of a job, for `Job.but`: mypy compares with these what is to change. A test keeps them in step."""

    id: str
    model_name: str
    submitted_at: datetime
    updated_at: datetime
    state: State
    model_version: str
    tenant: str
    key: str
    digest: bytes
    priority: int
    policy: Policy
    due_at: datetime | None
    deadline: datetime | None
    depends_on: tuple[str, ...]
    waits_for: tuple[str, ...]
    not_before: datetime | None
    fails_with_them: bool
    unmet: tuple[str, ...]
    generation: int
    began_at: datetime | None
    attempts: int
    lapses: int
    refusals: int
    last_code: int
    last_message: str
    labels: tuple[tuple[str, str], ...]
    transitions: tuple[Transition, ...]
    steps: int
    lease: Lease | None
    cancel_reason: str | None
    doom: End | None
    traceparent: str
    explains: bool
    is_apart: bool
    is_kept: bool
    request: bytes | None


@dataclass(frozen=True)
class Job:
    """A job as it is at one moment. Times are UTC, in whole milliseconds."""

    id: str
    model_name: str
    submitted_at: datetime
    updated_at: datetime
    state: State = State.QUEUED
    model_version: str = ""
    tenant: str = ""
    key: str = ""
    digest: bytes = b""
    """Of the submit request, when it has a key."""
    priority: int = 0
    """Higher goes first, among the tenant's own jobs (`lane.py`)."""
    policy: Policy = DEFAULT_POLICY
    due_at: datetime | None = None
    """Set while the job waits to be claimed: not before then."""
    deadline: datetime | None = None
    depends_on: tuple[str, ...] = ()
    """The jobs that must succeed first, as `dependencies/` writes them down."""
    waits_for: tuple[str, ...] = ()
    """Those of them that have not; while there are any it is not due, whoever has it."""
    not_before: datetime | None = None
    """With dependencies: not due before then, even when they have succeeded earlier."""
    fails_with_them: bool = False
    """It ends as FAILED when one of them does not succeed, and not as CANCELLED."""
    unmet: tuple[str, ...] = ()
    """Of a dead letter that has waited in vain: what had not succeeded, for which its requeue waits again."""
    generation: int = 1
    """How many lives it has begun: each requeue of a dead letter begins one."""
    began_at: datetime | None = None
    """When this one began, if it is not the first: its deadline counts from then."""
    attempts: int = 0
    """Of this generation."""
    lapses: int = 0
    """Those of the attempts whose holder died, or was cut off."""
    refusals: int = 0
    """Attempts in a row that never reached a model."""
    last_code: int = 0
    last_message: str = ""
    labels: tuple[tuple[str, str], ...] = ()
    transitions: tuple[Transition, ...] = ()
    steps: int = 1
    """Transitions that it has made; `transitions` holds the newest of them."""
    lease: Lease | None = None
    cancel_reason: str | None = None
    """Set when a client asked to cancel it."""
    doom: End | None = None
    """Set when it was decided that it ends so, whoever carries that out."""
    traceparent: str = ""
    """The trace of the submit (W3C), which each attempt continues."""
    explains: bool = False
    """The client asked infer to explain its answer."""
    is_apart: bool = False
    """The request is kept outside of the job's document."""
    is_kept: bool = False
    """The client asked that its request stay when it is done with."""
    request: bytes | None = None
    """The serialised ModelInferRequest; None where it was not loaded or is kept apart."""

    def but(self, **changes: Unpack[Changes]) -> Job:
        """The job with these fields changed: what `dataclasses.replace` gives, in an eighth of its time.

        A job is changed five times in its life, and has forty fields.
        """
        assert changes.keys() <= Job.__dataclass_fields__.keys()
        return Job.of({**vars(self), **changes})

    @staticmethod
    def of(values: Mapping[str, Any]) -> Job:
        """Return the job with these values, which are of every field: what `Job(**values)` gives, much sooner."""
        job = object.__new__(Job)
        vars(job).update(values)
        return job

    @property
    def lane(self) -> TenantQueueKey:
        """Where it waits."""
        return TenantQueueKey(self.tenant, self.model_name, self.priority)

    @property
    def is_final(self) -> bool:
        return self.state in FINAL

    @property
    def failures(self) -> int:
        """Its attempts that failed by themselves, with the one that is under way."""
        return self.attempts - self.lapses

    @property
    def keeps_request(self) -> bool:
        """Whether its request is still of use: to run it, to look into why it failed, or because a client said so."""
        return self.is_kept or self.state not in DONE_WITH


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an attempt gave no answer."""

    code: int
    message: str
    is_reached: bool = True
    """False when it is certain that no model ran it."""
    retry_after_ms: int = 0


@dataclass(frozen=True, slots=True)
class Again:
    """Decision: back to the queue."""

    due_at: datetime
    is_counted: bool
    reason: str
    code: int = 0
    message: str = ""
    is_lapse: bool = False


def acceptance(
    now: datetime, instance: str, due_at: datetime | None = None, dependencies: int = 0
) -> tuple[Transition, ...]:
    """The transitions of a job that `instance` has just accepted, and that is not to run before `due_at`, nor before
    so many others have succeeded.
    """
    reason = "submitted"
    if dependencies:
        reason += f", waits for {dependencies} jobs" if dependencies > 1 else ", waits for a job"
    if due_at is not None and due_at > now:
        reason += f", not to run before {due_at.isoformat(timespec='milliseconds')}"
    return (Transition(State.QUEUED, now, 0, instance, reason),)


def claim(job: Job, lease: Lease, now: datetime) -> Job:
    """A waiting job, claimed for its next attempt."""
    attempt = job.attempts + 1
    step = Transition(State.RUNNING, now, attempt, lease.owner, "claimed")
    return job.but(
        state=State.RUNNING,
        due_at=None,
        attempts=attempt,
        updated_at=now,
        lease=lease,
        transitions=_grown(job, step),
        steps=job.steps + 1,
    )


def take_over(job: Job, lease: Lease, cancel_reason: str | None = None) -> Job:
    """The job in the hands of `lease`, whoever had it before. Its state stays until it is known how it goes on."""
    return job.but(
        due_at=None, lease=lease, cancel_reason=job.cancel_reason if cancel_reason is None else cancel_reason
    )


def try_again(job: Job, again: Again, instance: str, now: datetime) -> Job:
    """The job back in the queue."""
    step = Transition(State.QUEUED, now, job.attempts, instance, again.reason)
    is_taken_back = not again.is_counted and job.state is State.RUNNING
    return job.but(
        state=State.QUEUED,
        due_at=None if job.waits_for else again.due_at,
        attempts=job.attempts - is_taken_back,
        lapses=job.lapses + again.is_lapse,
        refusals=0 if again.is_counted else job.refusals + bool(again.code),
        last_code=again.code or job.last_code,
        last_message=again.message[:MESSAGE_CHARS] if again.code else job.last_message,
        updated_at=now,
        lease=None,
        transitions=_grown(job, step),
        steps=job.steps + 1,
    )


def released_from_waiting(job: Job, instance: str, now: datetime) -> Job:
    """A job whose dependencies have succeeded: it is due, or will be at its own time."""
    many = len(job.depends_on)
    reason = f"its {many} dependencies have succeeded" if many > 1 else "its dependency has succeeded"
    return job.but(
        waits_for=(),
        not_before=None,
        due_at=now if job.not_before is None else max(now, job.not_before),
        updated_at=now,
        transitions=_grown(job, Transition(State.QUEUED, now, job.attempts, instance, reason)),
        steps=job.steps + 1,
    )


def end(job: Job, standing: End, instance: str, now: datetime) -> Job:
    """The job in its final state, by the result that stands in the store."""
    state = state_of(standing, job.policy)
    step = Transition(state, now, job.attempts, instance, standing.message[:MESSAGE_CHARS] or "answered")
    is_answered = standing.outcome is Outcome.SUCCEEDED
    return job.but(
        state=state,
        due_at=None,
        waits_for=(),
        unmet=job.waits_for if state in DEAD_LETTERS else (),
        refusals=0,
        last_code=job.last_code if is_answered else standing.code,
        last_message=job.last_message if is_answered else standing.message[:MESSAGE_CHARS],
        updated_at=now,
        lease=None,
        transitions=_grown(job, step),
        steps=job.steps + 1,
    )


def requeue(job: Job, reason: str, instance: str, now: datetime) -> Job:
    """A dead letter back in the queue as its next generation: with all its attempts, and its deadline anew."""
    assert job.state in DEAD_LETTERS
    step = Transition(State.QUEUED, now, 0, instance, f"requeued: {reason}" if reason else "requeued")
    # What has succeeded has, for good, though retention may have removed it since. Jobs of an earlier version have no
    # `unmet`.
    waits_for = () if job.attempts else job.unmet or job.depends_on
    return job.but(
        state=State.QUEUED,
        generation=job.generation + 1,
        began_at=now,
        attempts=0,
        lapses=0,
        refusals=0,
        due_at=None if waits_for else now,
        waits_for=waits_for,
        unmet=(),
        not_before=None,
        doom=None,
        deadline=None if job.deadline is None else now + (job.deadline - (job.began_at or job.submitted_at)),
        cancel_reason=None,
        updated_at=now,
        transitions=_grown(job, step),
        steps=job.steps + 1,
    )


def generations(job: Job) -> list[int]:
    """The generation of each of its transitions: one begins with each that follows an end."""
    found: list[int] = []
    generation = job.generation
    for step, before in zip(reversed(job.transitions), (*reversed(job.transitions[:-1]), None), strict=True):
        found.append(generation)
        if before is not None and before.state in FINAL and step.state is State.QUEUED:
            generation -= 1
    return found[::-1]


def state_of(standing: End, policy: Policy = DEFAULT_POLICY) -> State:
    """The final state that belongs to a result of a job with that policy."""
    if standing.outcome is Outcome.FAILED:
        return State.FAILED if policy.is_permanent(standing.code) else State.DEAD
    return State[standing.outcome.name]


def after_failure(job: Job, failure: Failure, now: datetime, draw: Callable[[], float]) -> Again | End:
    """What becomes of a running job whose attempt failed. `draw` gives a number in [0, 1)."""
    if (ended := ended_from_outside(job, now)) is not None:
        return ended
    if failure.is_reached and job.policy.is_permanent(failure.code):
        return End(Outcome.FAILED, failure.code, failure.message)
    name = name_of(failure.code)
    if not failure.is_reached:
        wait_ms = max(refused_wait_ms(job.refusals, draw()), failure.retry_after_ms * (1 + draw() / 4))
        reason = f"{name}, before any model ran it: this attempt is not counted"
        return Again(_later(now, wait_ms), False, reason, failure.code, failure.message)
    if job.failures >= job.policy.max_attempts:
        return End(Outcome.FAILED, failure.code, failure.message)
    wait_ms = max(backoff_ms(job.policy, job.failures, draw()), failure.retry_after_ms)
    if _seems_not_ready(job, failure):
        floor_ms = min(NOT_READY_MAX_WAIT_MS, NOT_READY_WAIT_MS * 2.0 ** min(job.failures - 1, 20))
        wait_ms = max(wait_ms, min(floor_ms, job.policy.max_backoff_ms))
    reason = f"{name}: attempt {job.failures} of {job.policy.max_attempts} failed"
    return Again(_later(now, wait_ms), True, reason, failure.code, failure.message)


def after_lapse(job: Job, lost: Lease, now: datetime, draw: Callable[[], float]) -> Again | End:
    """What becomes of a job whose lease `lost` lapsed: its holder died, or was cut off for too long.

    A job of one attempt ends: it may have run. Any other is tried again, `MAX_LAPSES` times. `draw` gives a number in
    [0, 1).
    """
    if (ended := ended_from_outside(job, now)) is not None:
        return ended
    if job.state is State.QUEUED:  # Somebody took it over and died before deciding anything.
        return Again(now, True, f"the lease of {lost.owner} lapsed")
    message = f"the lease of {lost.owner} lapsed during attempt {job.attempts}: it died or was cut off"
    if job.policy.max_attempts == 1 or job.lapses >= MAX_LAPSES:
        return End(Outcome.FAILED, Code.ABORTED, message)
    return Again(_later(now, _lapsed_wait_ms(job.lapses, draw())), True, message, Code.ABORTED, message, is_lapse=True)


def _lapsed_wait_ms(lapses: int, drawn: float) -> float:
    if lapses < SOON_AGAIN:
        return 0
    return drawn * min(LAPSED_MAX_WAIT_MS, LAPSED_WAIT_MS * 2.0 ** (lapses - SOON_AGAIN))


def released(now: datetime, owner: str) -> Again:
    """What becomes of a running job whose instance stops: another takes it at once, and nothing is counted."""
    return Again(now, False, f"{owner} stops: the attempt is not counted")


def backoff_ms(policy: Policy, attempts: int, drawn: float) -> float:
    """Wait after `attempts` counted attempts: full jitter under a doubling cap.

    Source: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
    """
    cap = min(policy.max_backoff_ms, policy.initial_backoff_ms * 2.0 ** min(attempts - 1, 100))
    return drawn * cap


def refused_wait_ms(refusals: int, drawn: float) -> float:
    """Wait after the (`refusals` + 1)-th refusal in a row: half fixed, half drawn, so that nobody hammers."""
    cap = min(REFUSED_MAX_WAIT_MS, REFUSED_WAIT_MS * 2.0 ** min(refusals, 20))
    return cap * (1 + drawn) / 2


def ended_from_outside(job: Job, now: datetime) -> End | None:
    """How a job ends whatever its attempts say: a client cancelled it, its deadline passed ... None: it does not."""
    if job.doom is not None:
        return job.doom
    if job.cancel_reason is not None:
        reason = f"cancelled: {job.cancel_reason}" if job.cancel_reason else "cancelled by a client"
        return End(Outcome.CANCELLED, Code.CANCELLED, reason)
    if job.deadline is None or now < job.deadline:
        return None
    message = f"no answer by its deadline, {job.deadline.isoformat(timespec='milliseconds')}"
    if job.last_message:
        message += f"; last attempt: {name_of(job.last_code)}: {job.last_message}"
    return End(Outcome.EXPIRED, Code.DEADLINE_EXCEEDED, message)


def _seems_not_ready(job: Job, failure: Failure) -> bool:
    # The first UNAVAILABLE is mostly an instance that died: another one is there at once.
    return failure.code == Code.NOT_FOUND or (failure.code == Code.UNAVAILABLE and job.failures > 1)


def name_of(code: int) -> str:
    """A status code by its name: what a model's server answers may be none."""
    try:
        return Code(code).name
    except ValueError:
        return f"code {code}"


def _later(now: datetime, wait_ms: float) -> datetime:
    return now + timedelta(milliseconds=int(wait_ms))


def _grown(job: Job, step: Transition) -> tuple[Transition, ...]:
    return (*job.transitions, step)[-TRANSITIONS_KEPT:]
