"""When a job that waits may run, and how it ends when one of those that it waits for did not succeed."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from services.ingest.dependencies.references import by_key, references_of
from services.ingest.dependencies.waiting import decide, unmet
from services.ingest.job import (
    DEAD_LETTERS,
    FINAL,
    BackToQueue,
    End,
    Job,
    Lease,
    Outcome,
    State,
    claim,
    end,
    requeue,
    return_to_queue,
    state_of,
)
from services.ingest.job_store import DependencyState
from shoal.errors import Code, InvalidArgument
from shoal.ingest.v1 import ingest_pb2 as pb
from tests.ingest.faults import submit
from tests.ingest.making import START, job

A, B = "01ARZ3NDEKTSV4RRFFQ69G5FAV", "01BX5ZZKBKACTAV9WEVGEMMVRZ"
LATER = START + timedelta(minutes=1)


def waiting(*references: str, **fields: object) -> Job:
    return job(due_at=None, depends_on=references, waits_for=references, **fields)


def known(**states: State) -> dict[str, DependencyState]:
    return {name: DependencyState(name, state, "why") for name, state in states.items()}


def look(one: Job, **states: State) -> Job | End:
    return decide(one, known(**states), "i", LATER)


def test_it_is_due_when_all_have_succeeded() -> None:
    after = look(waiting(A, B), **{A: State.SUCCEEDED, B: State.SUCCEEDED})
    assert isinstance(after, Job)
    assert (after.due_at, after.waits_for, after.depends_on) == (LATER, (), (A, B))
    assert after.transitions[-1].reason == "its 2 dependencies have succeeded"
    assert after.transition_count == 2


def test_it_is_not_due_before_its_own_time() -> None:
    own = LATER + timedelta(hours=1)
    after = look(waiting(A, not_before=own), **{A: State.SUCCEEDED})
    assert isinstance(after, Job)
    assert after.due_at == own


@pytest.mark.parametrize("state", [State.QUEUED, State.RUNNING])
def test_while_one_goes_on_it_waits_for_that_one(state: State) -> None:
    one = waiting(A, by_key("k"))
    after = decide(one, {A: DependencyState(A, State.SUCCEEDED), by_key("k"): DependencyState(B, state)}, "i", LATER)
    assert isinstance(after, Job)
    assert after == replace(one, waits_for=(B,))  # By its id from now on.


@pytest.mark.parametrize("state", sorted(FINAL - {State.SUCCEEDED}))
def test_when_one_did_not_succeed_it_ends_by_its_own_choice(state: State) -> None:
    how = look(waiting(A, B), **{A: State.RUNNING, B: state})
    assert how == End(Outcome.CANCELLED, Code.CANCELLED, f"cancelled: it depends on job {B}, which is {state}: why")
    how = look(waiting(A, B, fails_on_dependency=True), **{A: State.RUNNING, B: state})
    assert isinstance(how, End)
    assert (how.outcome, how.code) == (Outcome.FAILED, Code.FAILED_PRECONDITION)
    assert state_of(how) is State.FAILED


def test_what_is_gone_did_not_succeed() -> None:
    for reference, words in ((A, A), (by_key("k"), "with the key 'k'")):
        how = look(waiting(reference))
        assert isinstance(how, End)
        assert how.message == f"cancelled: it depends on a job {words} that no longer exists"


def test_its_deadline_counts_while_it_waits() -> None:
    how = look(waiting(A, deadline=START), **{A: State.RUNNING})
    assert isinstance(how, End)
    assert how.outcome is Outcome.EXPIRED


def test_a_lapse_does_not_make_it_due() -> None:
    after = return_to_queue(waiting(A), BackToQueue(LATER, True, "lapsed"), "i", LATER)
    assert (after.due_at, after.waits_for) == (None, (A,))


def test_a_requeue_waits_again_for_those_that_have_not_succeeded() -> None:
    one, dependency = waiting(A, B, fails_on_dependency=True), known(**{A: State.SUCCEEDED, B: State.DEAD})
    how, left = decide(one, dependency, "i", LATER), unmet(one, dependency)
    assert isinstance(how, End)
    ended = end(replace(one, waits_for=left, decided_end=how), how, "i", LATER)
    assert (ended.state, ended.waits_for, ended.unmet) == (State.FAILED, (), (B,))
    assert ended.state in DEAD_LETTERS
    again = requeue(ended, "", "i", LATER)
    assert (again.due_at, again.waits_for, again.unmet, again.decided_end) == (None, (B,), (), None)
    before_there_was_such_a_thing = requeue(replace(ended, unmet=()), "", "i", LATER)
    assert before_there_was_such_a_thing.waits_for == (A, B)


def test_what_has_not_succeeded_goes_by_the_name_that_the_job_has_for_it() -> None:
    one = replace(waiting(by_key("a"), by_key("b"), B), waits_for=(A, by_key("b"), B))
    dependency = {A: DependencyState(A, State.DEAD, "", "a"), B: DependencyState(B, State.RUNNING, "", "c")}
    assert unmet(one, dependency) == (by_key("a"), by_key("b"), B)


def test_a_requeue_of_what_has_run_waits_for_nobody() -> None:
    released = look(waiting(A, B), **{A: State.SUCCEEDED, B: State.SUCCEEDED})
    assert isinstance(released, Job)
    lease = Lease("l", "i", "p", LATER)
    ended = end(claim(released, lease, LATER), End(Outcome.FAILED, Code.INTERNAL, "broken"), "i", LATER)
    again = requeue(ended, "", "i", LATER)  # By now retention may have removed both.
    assert (again.due_at, again.waits_for) == (LATER, ())


def test_references_are_checked() -> None:
    one, other = pb.Dependency(job_id=A), pb.Dependency(idempotency_key="k" * 128)
    assert references_of(submit(depends_on=[one, other, one]), 128) == (A, f"key:{'k' * 128}")
    for wrong, says in (
        ([pb.Dependency()], r"depends_on\[0\]: a job's id, or a key of 1 to 128 characters"),
        ([one, pb.Dependency(job_id="x" * 1_000_000)], r"depends_on\[1\].job_id: not a job's id: 'xxxx"),
        ([pb.Dependency(job_id="")], r"depends_on\[0\].job_id: not a job's id: ''"),
        ([pb.Dependency(idempotency_key="k" * 129)], r"depends_on\[0\]: a job's id, or a key"),
        ([one] * 101, "depends_on: at most 100, got 101"),
    ):
        with pytest.raises(InvalidArgument, match=says):
            references_of(submit(depends_on=wrong), 128)
    with pytest.raises(InvalidArgument, match="on_dependency_failure: there is no 9"):
        references_of(submit(depends_on=[one], on_dependency_failure=9), 128)
