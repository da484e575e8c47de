"""A job and its states: immutable values, and pure functions from one state to the next. No clock, no database.

                      claim                       end (the store has the result)
    submit ──> QUEUED ──────────> RUNNING ──────────────────────> SUCCEEDED   the model answered
                 ^  │              │  │                           FAILED      the request is at fault
                 │  │              │  │                           DEAD        out of attempts
                 └──│─return_to_queue │                           CANCELLED   by a client
                    │   (backoff, lapse, release)                 EXPIRED     its deadline passed
                    └──── take_over ──┴── end ──────────────────>

    FAILED, DEAD ──requeue──> QUEUED, as the next generation

A claimed job carries a **lease**: an id that is never used twice, its owner, and an expiry time. Every write about the
job is fenced: it names the writer's lease and the attempt, so a worker whose lease has lapsed writes nothing.
`take_over` gives the job a new lease and so fences out the old holder. Cancellation, expiry and recovery begin with it.

A job ends in two steps. Its result is recorded in the store, which keeps the first result for ever; then the job's
state follows from the stored result (`state_of`). A process that dies between the steps leaves a lease that lapses. The
next holder records again, receives the stored result, and ends the job by it. So states and results cannot disagree.

A job with dependencies is QUEUED and has no due time until they have succeeded (`dependencies/`).

A **generation** is one life of a job. A dead letter (FAILED, DEAD) that is requeued begins the next generation, with
all its attempts. Its result carries the generation, and the store lets it replace the earlier failure. A holder of the
earlier generation can no longer write: the fence protects the job, the store protects the result.

`attempts` counts attempts that may have reached a model. An attempt that certainly did not (no instance, or shed before
it ran) is subtracted and counted in `refusals` instead: an outage costs no attempts, however long it lasts. `lapses`
counts attempts whose holder died, which is mostly not the job's fault; their own bound is `MAX_LAPSES`. After
`LAPSES_RETRIED_IMMEDIATELY` lapses a job is retried at a random time, apart from the jobs that it lapsed with. So
harmless jobs survive a holder that dies repeatedly, and a poison request ends.
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
    """State of a job."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    DEAD = "dead"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


DEAD_LETTERS = frozenset({State.FAILED, State.DEAD})
"""States in which a job has ended without an answer, keeps its request, and may be requeued."""
FINAL = frozenset({State.SUCCEEDED, State.FAILED, State.DEAD, State.CANCELLED, State.EXPIRED})
PAYLOAD_DROPPABLE = FINAL - DEAD_LETTERS
"""States in which a job's request is not needed any more, unless the client asked to keep it (`Job.keep_request`)."""


class Outcome(IntEnum):
    """Outcome of a job: the result or the error of its last attempt, or the reason why none followed.

    The numbers are those of shoal.store.v1.Result.Outcome.
    """

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
"""Status codes of a request that is at fault: no further attempt would help. Every other code is retried. NOT_FOUND is
too, because a model that was just pushed may not be on all nodes yet. `Policy.codes` replaces these codes for a job."""

NOT_READY_WAIT_MS = 1_000
NOT_READY_MAX_WAIT_MS = 4_000
"""Bounds of the doubling minimum backoff while a model seems not to be ready; the job's own maximum still applies. Five
attempts then last longer than the ten seconds that a restarted instance may take to load a model."""
REFUSED_WAIT_MS = 200
REFUSED_MAX_WAIT_MS = 5_000
"""Bounds of the doubling backoff of a job that reached no instance: an outage costs little, its end is noticed soon."""
MAX_LAPSES = 20
"""Number of lapses after which the next one ends the job: it may be a poison request."""
LAPSES_RETRIED_IMMEDIATELY = 2
"""Number of lapses after which a job is due immediately: mostly its holder was killed, and another instance runs."""
LAPSED_WAIT_MS = 500
LAPSED_MAX_WAIT_MS = 15_000
"""Bounds of the doubling maximum of the random wait after each further lapse."""
TRANSITIONS_KEPT = 400
"""Number of newest transitions that are kept: more than 100 attempts make. Only long outages reach it."""
HISTORY_CHARS = 32_000
"""Characters of the reasons of the transitions that are kept: those of 100 failed attempts take a sixth. Requeues with
long reasons would make a job of megabytes, of which lists, watches and the dead letters of one call have a thousand."""
MESSAGE_CHARS = 2_000
"""Maximum length of a failed attempt's message: a job stays small whatever a model returns."""


@dataclass(frozen=True, slots=True)
class Policy:
    """Retry policy of a job."""

    max_attempts: int = 5
    initial_backoff_ms: int = 200
    max_backoff_ms: int = 30_000
    codes: tuple[int, ...] = ()
    """The status codes that are retried; empty: all but PERMANENT."""
    attempt_timeout_ms: int = 0
    """Longest time of one attempt; 0: the instance's setting."""

    def is_permanent(self, code: int) -> bool:
        """Return True when a failure with `code` ends the job without a retry.

        ABORTED never does: it means that the attempt's instance died, which proves nothing about the request.
        """
        if code == Code.ABORTED:
            return False
        return code not in self.codes if self.codes else code in PERMANENT


DEFAULT_POLICY = Policy()


@dataclass(frozen=True, slots=True)
class Transition:
    """One change of a job's state."""

    state: State
    at: datetime
    attempt: int
    instance: str
    reason: str


@dataclass(frozen=True, slots=True)
class Lease:
    """Claim of an instance on a job until `expires_at`. `process` distinguishes processes of one instance name."""

    id: str
    owner: str
    process: str
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class End:
    """Decision: the job has its outcome, which is to be recorded."""

    outcome: Outcome
    code: int = 0
    message: str = ""
    generation: int = 1
    """The generation of the job that this outcome ends."""


class JobFieldValues(TypedDict, total=False):
    """Types of a job's fields: mypy checks the arguments of `Job.replaced` against them. A test compares both lists."""

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
    fails_on_dependency: bool
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
    transition_count: int
    lease: Lease | None
    cancel_reason: str | None
    decided_end: End | None
    traceparent: str
    caller: bytes
    explains: bool
    is_apart: bool
    keep_request: bool
    request: bytes | None


@dataclass(frozen=True)
class Job:
    """Snapshot of a job. Times are UTC, in whole milliseconds."""

    id: str
    model_name: str
    submitted_at: datetime
    updated_at: datetime
    state: State = State.QUEUED
    model_version: str = ""
    tenant: str = ""
    key: str = ""
    digest: bytes = b""
    """Digest of the submit request, when it has an idempotency key."""
    priority: int = 0
    """Higher priorities run first, among the tenant's own jobs (`tenant_queue.py`)."""
    policy: Policy = DEFAULT_POLICY
    due_at: datetime | None = None
    """Earliest time at which the job may be claimed; set while it waits for a claim."""
    deadline: datetime | None = None
    depends_on: tuple[str, ...] = ()
    """References to the jobs that must succeed first (`dependencies/references.py`)."""
    waits_for: tuple[str, ...] = ()
    """The dependencies that have not succeeded yet; while there are any, the job is not due."""
    not_before: datetime | None = None
    """Earliest due time of a job with dependencies, also when the dependencies succeed before it."""
    fails_on_dependency: bool = False
    """True: the job ends as FAILED, rather than CANCELLED, when a dependency does not succeed."""
    unmet: tuple[str, ...] = ()
    """Dependencies of a dead letter that had not succeeded; the job waits for them again when it is requeued."""
    generation: int = 1
    """Number of the job's current life, from 1; each requeue of a dead letter begins the next."""
    began_at: datetime | None = None
    """Start of a later generation, from which its deadline counts; None in the first."""
    attempts: int = 0
    """Attempts of this generation."""
    lapses: int = 0
    """Attempts of this generation whose holder died or was cut off."""
    refusals: int = 0
    """Consecutive attempts that never reached a model."""
    last_code: int = 0
    last_message: str = ""
    labels: tuple[tuple[str, str], ...] = ()
    transitions: tuple[Transition, ...] = ()
    transition_count: int = 1
    """Number of all transitions; `transitions` holds the newest."""
    lease: Lease | None = None
    cancel_reason: str | None = None
    """Reason of a client's cancellation; None: not cancelled."""
    decided_end: End | None = None
    """An end that is decided and stored; every later holder of the job carries it out."""
    traceparent: str = ""
    """W3C trace context of the submit; each attempt continues the trace."""
    caller: bytes = b""
    """The verified caller that the job runs for (`job_access.py`); empty without a policy."""
    explains: bool = False
    """True: the client asked infer to explain its response."""
    is_apart: bool = False
    """True: the request is stored outside of the job's document (`intake/payloads.py`)."""
    keep_request: bool = False
    """True: the client wants the request to be kept after the end of the job."""
    request: bytes | None = None
    """The serialised ModelInferRequest; None where it was not loaded or is stored outside."""

    def replaced(self, **changes: Unpack[JobFieldValues]) -> Job:
        """Return the job with these fields changed, as `dataclasses.replace` does in eight times the time.

        A job changes five times in its life, and has forty fields.
        """
        assert changes.keys() <= Job.__dataclass_fields__.keys()
        return Job.of({**vars(self), **changes})

    @staticmethod
    def of(values: Mapping[str, Any]) -> Job:
        """Return the job with `values`, one for every field: a faster `Job(**values)`."""
        job = object.__new__(Job)
        vars(job).update(values)
        return job

    @property
    def tenant_queue(self) -> TenantQueueKey:
        """The tenant queue of the job."""
        return TenantQueueKey(self.tenant, self.model_name, self.priority)

    @property
    def is_final(self) -> bool:
        return self.state in FINAL

    @property
    def failures(self) -> int:
        """Number of attempts that did not lapse, including the running one."""
        return self.attempts - self.lapses

    @property
    def needs_request(self) -> bool:
        """True while the request is needed: to run the job, to diagnose its failure, or because a client keeps it."""
        return self.keep_request or self.state not in PAYLOAD_DROPPABLE


@dataclass(frozen=True, slots=True)
class Failure:
    """Failure of an attempt."""

    code: int
    message: str
    is_reached: bool = True
    """False when it is certain that no model ran the request."""
    retry_after_ms: int = 0
    is_limited: bool = False
    """True when a limit of the policy refused the request: the model may have room for other tenants."""
    trace_id: str = ""
    """Trace of infer's failed call; empty: infer has named none."""


@dataclass(frozen=True, slots=True)
class BackToQueue:
    """Decision: the job returns to the queue."""

    due_at: datetime
    is_counted: bool
    reason: str
    code: int = 0
    message: str = ""
    is_lapse: bool = False


def acceptance(
    now: datetime, instance: str, due_at: datetime | None = None, dependencies: int = 0
) -> tuple[Transition, ...]:
    """Return the first transitions of a job that `instance` accepts.

    `due_at` is its earliest start; `dependencies` is the number of jobs that must succeed first.
    """
    reason = "submitted"
    if dependencies:
        reason += f", waits for {dependencies} jobs" if dependencies > 1 else ", waits for a job"
    if due_at is not None and due_at > now:
        reason += f", not to run before {due_at.isoformat(timespec='milliseconds')}"
    return (Transition(State.QUEUED, now, 0, instance, reason),)


def claim(job: Job, lease: Lease, now: datetime) -> Job:
    """Return a queued job as claimed for its next attempt."""
    attempt = job.attempts + 1
    transition = Transition(State.RUNNING, now, attempt, lease.owner, "claimed")
    return job.replaced(
        state=State.RUNNING,
        due_at=None,
        attempts=attempt,
        updated_at=now,
        lease=lease,
        transitions=_appended(job, transition),
        transition_count=job.transition_count + 1,
    )


def take_over(job: Job, lease: Lease, cancel_reason: str | None = None) -> Job:
    """Return the job under `lease` instead of its former lease. Its state stays until its next step is decided."""
    return job.replaced(
        due_at=None, lease=lease, cancel_reason=job.cancel_reason if cancel_reason is None else cancel_reason
    )


def return_to_queue(job: Job, decision: BackToQueue, instance: str, now: datetime) -> Job:
    """Return the job as put back into the queue."""
    transition = Transition(State.QUEUED, now, job.attempts, instance, decision.reason)
    is_subtracted = not decision.is_counted and job.state is State.RUNNING
    return job.replaced(
        state=State.QUEUED,
        due_at=None if job.waits_for else decision.due_at,
        attempts=job.attempts - is_subtracted,
        lapses=job.lapses + decision.is_lapse,
        refusals=0 if decision.is_counted else job.refusals + bool(decision.code),
        last_code=decision.code or job.last_code,
        last_message=decision.message[:MESSAGE_CHARS] if decision.code else job.last_message,
        updated_at=now,
        lease=None,
        transitions=_appended(job, transition),
        transition_count=job.transition_count + 1,
    )


def unblocked(job: Job, instance: str, now: datetime) -> Job:
    """Return a job whose dependencies have all succeeded: due immediately, or at its own `not_before`."""
    many = len(job.depends_on)
    reason = f"its {many} dependencies have succeeded" if many > 1 else "its dependency has succeeded"
    return job.replaced(
        waits_for=(),
        not_before=None,
        due_at=now if job.not_before is None else max(now, job.not_before),
        updated_at=now,
        transitions=_appended(job, Transition(State.QUEUED, now, job.attempts, instance, reason)),
        transition_count=job.transition_count + 1,
    )


def end(job: Job, recorded: End, instance: str, now: datetime) -> Job:
    """Return the job in the final state that follows from `recorded`, the outcome in the store."""
    state = state_of(recorded, job.policy)
    transition = Transition(state, now, job.attempts, instance, recorded.message[:MESSAGE_CHARS] or "answered")
    is_success = recorded.outcome is Outcome.SUCCEEDED
    return job.replaced(
        state=state,
        due_at=None,
        waits_for=(),
        unmet=job.waits_for if state in DEAD_LETTERS else (),
        refusals=0,
        last_code=job.last_code if is_success else recorded.code,
        last_message=job.last_message if is_success else recorded.message[:MESSAGE_CHARS],
        updated_at=now,
        lease=None,
        transitions=_appended(job, transition),
        transition_count=job.transition_count + 1,
    )


def requeue(job: Job, reason: str, instance: str, now: datetime, caller: bytes = b"") -> Job:
    """Return a dead letter as queued in its next generation, with all its attempts and a new deadline.

    It then runs for `caller`; empty: for the same caller as before.
    """
    assert job.state in DEAD_LETTERS
    transition = Transition(State.QUEUED, now, 0, instance, f"requeued: {reason}" if reason else "requeued")
    # A dependency that has succeeded counts for ever, although retention may have removed it. Jobs of an earlier
    # version have no `unmet`.
    waits_for = () if job.attempts else job.unmet or job.depends_on
    return job.replaced(
        state=State.QUEUED,
        generation=job.generation + 1,
        began_at=now,
        attempts=0,
        lapses=0,
        refusals=0,
        due_at=None if waits_for else now,
        waits_for=waits_for,
        unmet=(),
        caller=caller or job.caller,
        not_before=None,
        decided_end=None,
        deadline=None if job.deadline is None else now + (job.deadline - (job.began_at or job.submitted_at)),
        cancel_reason=None,
        updated_at=now,
        transitions=_appended(job, transition),
        transition_count=job.transition_count + 1,
    )


def generations(job: Job) -> list[int]:
    """Return the generation of each transition; a transition after an end begins the next generation."""
    found: list[int] = []
    generation = job.generation
    for step, before in zip(reversed(job.transitions), (*reversed(job.transitions[:-1]), None), strict=True):
        found.append(generation)
        if before is not None and before.state in FINAL and step.state is State.QUEUED:
            generation -= 1
    return found[::-1]


def state_of(recorded: End, policy: Policy = DEFAULT_POLICY) -> State:
    """Return the final state of a job with `policy` whose outcome in the store is `recorded`."""
    if recorded.outcome is Outcome.FAILED:
        return State.FAILED if policy.is_permanent(recorded.code) else State.DEAD
    return State[recorded.outcome.name]


def after_failure(job: Job, failure: Failure, now: datetime, draw: Callable[[], float]) -> BackToQueue | End:
    """Decide on a running job whose attempt failed. `draw` returns a random number in [0, 1)."""
    if (ended := imposed_end(job, now)) is not None:
        return ended
    if failure.is_reached and job.policy.is_permanent(failure.code):
        return End(Outcome.FAILED, failure.code, failure.message)
    name = name_of(failure.code)
    if not failure.is_reached:
        # A limit of the policy may be raised meanwhile.
        after_ms = min(failure.retry_after_ms, REFUSED_MAX_WAIT_MS) if failure.is_limited else failure.retry_after_ms
        wait_ms = max(refused_wait_ms(job.refusals, draw()), after_ms * (1 + draw() / 4))
        reason = f"{name}, before any model ran it: this attempt is not counted"
        return BackToQueue(_later(now, wait_ms), False, reason, failure.code, failure.message)
    if job.failures >= job.policy.max_attempts:
        return End(Outcome.FAILED, failure.code, failure.message)
    wait_ms = max(backoff_ms(job.policy, job.failures, draw()), failure.retry_after_ms)
    if _seems_not_ready(job, failure):
        floor_ms = min(NOT_READY_MAX_WAIT_MS, NOT_READY_WAIT_MS * 2.0 ** min(job.failures - 1, 20))
        wait_ms = max(wait_ms, min(floor_ms, job.policy.max_backoff_ms))
    reason = f"{name}: attempt {job.failures} of {job.policy.max_attempts} failed"
    return BackToQueue(_later(now, wait_ms), True, reason, failure.code, failure.message)


def after_lapse(job: Job, lost: Lease, now: datetime, draw: Callable[[], float]) -> BackToQueue | End:
    """Decide on a job whose lease `lost` lapsed because its holder died or was cut off.

    A job of one attempt ends: it may have run. Any other job is retried, up to `MAX_LAPSES` times. `draw` returns a
    random number in [0, 1).
    """
    if (ended := imposed_end(job, now)) is not None:
        return ended
    # A former holder took the job over and died before it decided anything.
    if job.state is State.QUEUED:
        return BackToQueue(now, True, f"the lease of {lost.owner} lapsed")
    message = f"the lease of {lost.owner} lapsed during attempt {job.attempts}: it died or was cut off"
    if job.policy.max_attempts == 1 or job.lapses >= MAX_LAPSES:
        return End(Outcome.FAILED, Code.ABORTED, message)
    return BackToQueue(
        _later(now, _lapsed_wait_ms(job.lapses, draw())), True, message, Code.ABORTED, message, is_lapse=True
    )


def _lapsed_wait_ms(lapses: int, drawn: float) -> float:
    if lapses < LAPSES_RETRIED_IMMEDIATELY:
        return 0
    return drawn * min(LAPSED_MAX_WAIT_MS, LAPSED_WAIT_MS * 2.0 ** (lapses - LAPSES_RETRIED_IMMEDIATELY))


def after_stop(now: datetime, owner: str) -> BackToQueue:
    """Decide on a running job whose instance stops: it is due immediately, and the attempt is not counted."""
    return BackToQueue(now, False, f"{owner} stops: the attempt is not counted")


def after_stop_in_call(job: Job, now: datetime, owner: str) -> BackToQueue | End:
    """Decide on a running job whose call has not ended when its instance stops: a model may have begun it.

    A job of one attempt ends, as after a lapse. Any other job is due immediately, and the attempt is not counted.
    """
    if job.policy.max_attempts > 1:
        return after_stop(now, owner)
    message = f"{owner} stopped during attempt {job.attempts}, the only one, which a model may have begun"
    return imposed_end(job, now) or End(Outcome.FAILED, Code.ABORTED, message)


def backoff_ms(policy: Policy, attempts: int, drawn: float) -> float:
    """Return the wait after `attempts` counted attempts: full jitter under a doubling cap.

    Source: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
    """
    cap = min(policy.max_backoff_ms, policy.initial_backoff_ms * 2.0 ** min(attempts - 1, 100))
    return drawn * cap


def refused_wait_ms(refusals: int, drawn: float) -> float:
    """Return the wait after the (`refusals` + 1)-th consecutive refusal: half fixed, half random, to spread retries."""
    cap = min(REFUSED_MAX_WAIT_MS, REFUSED_WAIT_MS * 2.0 ** min(refusals, 20))
    return cap * (1 + drawn) / 2


def imposed_end(job: Job, now: datetime) -> End | None:
    """Return the end that a decision, a cancellation or the deadline imposes on a job; None when there is none."""
    if job.decided_end is not None:
        return job.decided_end
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
    # The first UNAVAILABLE is mostly an instance that died while another one runs.
    return failure.code == Code.NOT_FOUND or (failure.code == Code.UNAVAILABLE and job.failures > 1)


def name_of(code: int) -> str:
    """Return the name of a status code; a model's server may also return an unknown number."""
    try:
        return Code(code).name
    except ValueError:
        return f"code {code}"


def _later(now: datetime, wait_ms: float) -> datetime:
    return now + timedelta(milliseconds=int(wait_ms))


def _appended(job: Job, transition: Transition) -> tuple[Transition, ...]:
    """Return the newest transitions with `transition` as the last one, as far as the limits allow."""
    kept = (*job.transitions, transition)[-TRANSITIONS_KEPT:]
    chars = 0
    for number, step in enumerate(reversed(kept)):
        chars += len(step.reason)
        if number and chars > HISTORY_CHARS:
            return kept[-number:]
    return kept
