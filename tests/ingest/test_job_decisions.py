"""What becomes of a job after a failure, a lapse, a stop: by the table."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta

import pytest

from services.ingest.job import (
    FINAL,
    HISTORY_CHARS,
    LAPSED_MAX_WAIT_MS,
    LAPSES_RETRIED_IMMEDIATELY,
    MAX_LAPSES,
    PERMANENT,
    TRANSITIONS_KEPT,
    BackToQueue,
    End,
    Failure,
    Job,
    Lease,
    Outcome,
    Policy,
    State,
    after_failure,
    after_lapse,
    after_stop,
    backoff_ms,
    claim,
    end,
    generations,
    refused_wait_ms,
    requeue,
    return_to_queue,
    state_of,
    take_over,
)
from shoal.errors import Code
from tests.ingest.making import START, job

LEASE = Lease("lease-1", "local/ingest-0", "process-1", START + timedelta(seconds=5))


def running(attempts: int = 1, **fields: object) -> Job:
    return replace(claim(job(**fields), LEASE, START), attempts=attempts)


def wait_ms(again: BackToQueue | End) -> float:
    assert isinstance(again, BackToQueue)
    return (again.due_at - START) / timedelta(milliseconds=1)


@pytest.mark.parametrize("code", sorted(PERMANENT))
def test_a_request_at_fault_fails_at_once(code: Code) -> None:
    how = after_failure(running(), Failure(code, "why"), START, lambda: 0.5)
    assert how == End(Outcome.FAILED, code, "why")
    assert state_of(how) is State.FAILED


@pytest.mark.parametrize("code", sorted(set(Code) - PERMANENT - {Code.OK}))
def test_every_other_code_is_tried_again_until_attempts_run_out(code: Code) -> None:
    first = after_failure(running(), Failure(code, "why"), START, lambda: 0.5)
    assert isinstance(first, BackToQueue)
    assert first.is_counted
    last = after_failure(running(attempts=5), Failure(code, "why"), START, lambda: 0.5)
    assert last == End(Outcome.FAILED, code, "why")
    assert state_of(last) is State.DEAD


def test_waits_double_under_full_jitter_up_to_the_longest() -> None:
    policy = Policy(max_attempts=10, initial_backoff_ms=200, max_backoff_ms=1_000)
    assert [backoff_ms(policy, attempts, 1.0) for attempts in (1, 2, 3, 4, 100)] == [200, 400, 800, 1_000, 1_000]
    assert backoff_ms(policy, 3, 0.0) == 0
    assert backoff_ms(policy, 3, 0.25) == 200


def test_a_model_that_is_not_ready_is_given_time() -> None:
    def waits(code: Code, policy: Policy) -> list[float]:
        failure = Failure(code, "")
        jobs = [replace(running(attempts=n), policy=policy) for n in range(1, 5)]
        return [wait_ms(after_failure(one, failure, START, lambda: 0.0)) for one in jobs]

    assert waits(Code.NOT_FOUND, Policy()) == [1_000, 2_000, 4_000, 4_000]
    assert waits(Code.UNAVAILABLE, Policy()) == [0, 2_000, 4_000, 4_000]
    assert waits(Code.NOT_FOUND, Policy(max_backoff_ms=50)) == [50, 50, 50, 50]
    assert waits(Code.INTERNAL, Policy()) == [0, 0, 0, 0]


def test_retry_after_is_honoured() -> None:
    shed = Failure(Code.RESOURCE_EXHAUSTED, "", is_reached=False, retry_after_ms=3_000)
    assert wait_ms(after_failure(running(), shed, START, lambda: 0.0)) == 3_000


def test_an_attempt_that_reached_nobody_costs_none_however_often() -> None:
    nobody = Failure(Code.UNAVAILABLE, "no healthy upstream", is_reached=False)
    there = job(policy=Policy(max_attempts=2))
    now = START
    for refusals in range(500):
        there = claim(there, LEASE, now)
        assert (there.attempts, there.refusals) == (1, refusals)
        again = after_failure(there, nobody, now, lambda: 0.5)
        assert isinstance(again, BackToQueue)
        there = return_to_queue(there, again, "i", now)
        now = again.due_at
    assert there.attempts == 0
    assert there.last_code == Code.UNAVAILABLE
    assert len(there.transitions) == TRANSITIONS_KEPT
    assert refused_wait_ms(0, 0.0) == 100
    assert refused_wait_ms(500, 1.0) == 5_000


def test_a_deadline_that_passed_ends_it_whatever_the_failure_was() -> None:
    late = replace(running(), deadline=START, last_code=int(Code.INTERNAL), last_message="broken")
    how = after_failure(late, Failure(Code.UNAVAILABLE, ""), START, lambda: 0.5)
    assert isinstance(how, End)
    assert state_of(how) is State.EXPIRED
    assert how.message == "no answer by its deadline, 2026-01-02T03:04:05.678+00:00; last attempt: INTERNAL: broken"


def lapse(job: Job, now: datetime = START, drawn: float = 0.5) -> BackToQueue | End:
    return after_lapse(job, LEASE, now, lambda: drawn)


def test_holders_that_die_do_not_use_up_the_attempts_of_a_job() -> None:
    there, now = job(), START
    for time in range(1, MAX_LAPSES + 1):
        there = claim(there, LEASE, now)
        again = lapse(there, now)
        assert isinstance(again, BackToQueue)
        assert again.reason == f"the lease of local/ingest-0 lapsed during attempt {time}: it died or was cut off"
        there = return_to_queue(there, again, "i", now)
        assert (there.attempts, there.lapses, there.failures, there.last_code) == (time, time, 0, Code.ABORTED)
        assert there.due_at is not None
        assert (there.due_at > now) == (time > LAPSES_RETRIED_IMMEDIATELY), (
            "the first ones come back at once, later ones apart"
        )
        now = there.due_at
    for failed in range(1, 5):
        there = claim(there, LEASE, now)
        again = after_failure(there, Failure(Code.INTERNAL, "broken"), now, lambda: 0.5)
        assert isinstance(again, BackToQueue)
        assert again.reason == f"INTERNAL: attempt {failed} of 5 failed"
        there = return_to_queue(there, again, "i", now)
        assert there.due_at is not None
        now = there.due_at
    how = after_failure(claim(there, LEASE, now), Failure(Code.INTERNAL, "broken"), now, lambda: 0.5)
    assert isinstance(how, End)
    assert state_of(how) is State.DEAD


def test_a_job_that_kills_each_of_its_holders_ends() -> None:
    how = lapse(running(attempts=MAX_LAPSES + 1, lapses=MAX_LAPSES))
    assert isinstance(how, End)
    assert state_of(how) is State.DEAD


def test_a_job_of_one_attempt_does_not_run_twice() -> None:
    how = lapse(running(policy=Policy(max_attempts=1)))
    assert isinstance(how, End)
    assert (state_of(how), how.code) == (State.DEAD, Code.ABORTED)


def test_what_lapsed_together_does_not_come_back_together() -> None:
    waits = [wait_ms(lapse(running(attempts=4, lapses=3), drawn=drawn)) for drawn in (0.0, 0.25, 0.999)]
    assert waits == [0, 250, 999]
    assert wait_ms(lapse(running(attempts=20, lapses=19), drawn=1.0)) == LAPSED_MAX_WAIT_MS


def test_a_take_over_that_lapses_goes_on_where_it_was() -> None:
    taken = take_over(job(), LEASE)
    again = lapse(taken)
    assert isinstance(again, BackToQueue)
    assert return_to_queue(taken, again, "i", START).attempts == 0
    cancelled = lapse(take_over(job(), LEASE, "not wanted"))
    assert cancelled == End(Outcome.CANCELLED, Code.CANCELLED, "cancelled: not wanted")


def test_what_is_released_is_not_counted() -> None:
    back = return_to_queue(running(), after_stop(START, "local/ingest-0"), "local/ingest-0", START)
    assert (back.state, back.attempts, back.refusals, back.due_at, back.lease) == (State.QUEUED, 0, 0, START, None)


@pytest.mark.parametrize(
    ("standing", "state"),
    [
        (End(Outcome.SUCCEEDED), State.SUCCEEDED),
        (End(Outcome.FAILED, Code.INVALID_ARGUMENT), State.FAILED),
        (End(Outcome.FAILED, Code.UNAVAILABLE), State.DEAD),
        (End(Outcome.CANCELLED, Code.CANCELLED), State.CANCELLED),
        (End(Outcome.EXPIRED, Code.DEADLINE_EXCEEDED), State.EXPIRED),
    ],
)
def test_the_state_follows_from_the_result(standing: End, state: State) -> None:
    ended = end(running(), standing, "i", START)
    assert ended.state is state
    assert ended.state in FINAL
    assert (ended.lease, ended.due_at) == (None, None)
    assert ended.transitions[-1].state is state


def test_the_reasons_of_a_jobs_transitions_have_a_limit_together_and_the_newest_stays() -> None:
    letter = job()
    for number in range(100):
        failed = End(Outcome.FAILED, Code.INTERNAL, "m" * 2_000)
        letter = requeue(end(claim(letter, LEASE, START), failed, "i", START), f"{number} {'r' * 900}", "i", START)
    assert HISTORY_CHARS - 3_000 < sum(len(step.reason) for step in letter.transitions) <= HISTORY_CHARS
    assert letter.transitions[-1].reason.startswith("requeued: 99 ")
    assert (letter.transition_count, generations(letter)[-1]) == (301, 101)


def test_each_requeue_counts_the_same_deadline_anew() -> None:
    letter, now = job(deadline=START + timedelta(seconds=60)), START
    for _ in range(3):
        now += timedelta(hours=1)
        ended = end(claim(letter, LEASE, now), End(Outcome.FAILED, Code.INTERNAL, "why"), "i", now)
        now += timedelta(hours=1)
        letter = requeue(ended, "", "i", now)
        assert letter.deadline == now + timedelta(seconds=60)


def test_a_deadline_is_counted_anew_also_when_the_beginning_of_its_time_is_in_no_transition_any_more() -> None:
    later, why = START + timedelta(hours=1), End(Outcome.FAILED, Code.INTERNAL, "why")
    ended = end(claim(job(deadline=START + timedelta(seconds=60)), LEASE, START), why, "i", START)
    again = requeue(ended, "", "i", later)
    for _ in range(TRANSITIONS_KEPT):  # An outage: nobody was there to run it.
        again = return_to_queue(
            claim(again, LEASE, later), BackToQueue(later, False, "nobody there", 14, "m"), "i", later
        )
    ended = end(claim(again, LEASE, later), why, "i", later)
    assert requeue(ended, "", "i", later).deadline == later + timedelta(seconds=60)
