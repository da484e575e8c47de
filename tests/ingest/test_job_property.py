"""Whatever workers do and however they die, each acknowledged job ends with exactly one result, in each generation.

A simulated world on a simulated clock: jobs lie in a table whose writes are fenced as MongoDB's are, results in a store
where the first of a generation stands, and workers are slow, forgetful, cut off or killed at any point between any two
steps.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.ingest.dependencies.waiting import decide
from services.ingest.job import (
    DEAD_LETTERS,
    FINAL,
    MAX_LAPSES,
    BackToQueue,
    End,
    Failure,
    Job,
    Lease,
    Outcome,
    Policy,
    State,
    acceptance,
    after_failure,
    after_lapse,
    after_stop,
    claim,
    end,
    generations,
    imposed_end,
    requeue,
    return_to_queue,
    state_of,
    take_over,
)
from services.ingest.job_store import DependencyState
from shoal.errors import Code
from tests.long_form import by_form

LEASE = timedelta(seconds=5)
WORKERS = 2
FAILURES = [
    Failure(Code.UNAVAILABLE, "reset"),
    Failure(Code.UNAVAILABLE, "nobody there", is_reached=False),
    Failure(Code.RESOURCE_EXHAUSTED, "shed", is_reached=False, retry_after_ms=700),
    Failure(Code.INTERNAL, "broken"),
    Failure(Code.NOT_FOUND, "no such model"),
    Failure(Code.INVALID_ARGUMENT, "wrong tensor"),
]


@dataclass
class Task:
    """What a worker has in memory about a job."""

    job: Job
    how: End | None = None
    """Its outcome, not yet recorded."""
    after: Job | None = None
    """Its next state, not yet written."""


@dataclass
class Worker:
    name: str
    tasks: dict[str, Task] = field(default_factory=dict)


class World(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = datetime(2026, 1, 1, tzinfo=UTC)
        self.ids = itertools.count()
        self.jobs: dict[str, Job] = {}
        self.store: dict[str, End] = {}
        self.seen_results: dict[tuple[str, int], End] = {}
        self.seen_final: dict[tuple[str, int], Job] = {}
        self.workers = [Worker(f"local/ingest-{n}") for n in range(WORKERS)]

    # What MongoDB and the store do.

    def write(self, before: Job, after: Job) -> None:
        """A fenced write: only for the holder of the lease that `before` carries, in that attempt."""
        there = self.jobs[before.id]
        assert before.lease is not None
        if there.lease is not None and (there.lease.id, there.attempts) == (before.lease.id, before.attempts):
            self.jobs[before.id] = after

    def record(self, job: Job, how: End) -> End:
        """What services/store/results/generations.py says."""
        how = replace(how, generation=job.generation)
        standing = self.store.setdefault(job.id, how)
        if standing.outcome is Outcome.FAILED and standing.generation < how.generation:
            self.store[job.id] = how
        return self.store[job.id]

    def lease(self, worker: Worker) -> Lease:
        return Lease(f"lease-{next(self.ids)}", worker.name, worker.name, self.now + LEASE)

    # What may happen.

    @rule(
        attempts=st.integers(1, 4),
        deadline_s=st.none() | st.integers(1, 60),
        backoff_ms=st.integers(0, 5_000),
        codes=st.sampled_from([(), (Code.INTERNAL,), (Code.INVALID_ARGUMENT, Code.UNAVAILABLE)]),
        delay_s=st.sampled_from([0, 0, 30]),
        dependencies=st.integers(0, 2),
        fails_on_dependency=st.booleans(),
        data=st.data(),
    )
    def submit(
        self,
        attempts: int,
        deadline_s: int | None,
        backoff_ms: int,
        codes: tuple[int, ...],
        delay_s: int,
        dependencies: int,
        fails_on_dependency: bool,
        data: st.DataObject,
    ) -> None:
        due_at = self.now + timedelta(seconds=delay_s)
        ids = st.lists(st.sampled_from([*self.jobs]), max_size=dependencies, unique=True) if self.jobs else st.just([])
        depends_on = tuple(data.draw(ids))
        job = Job(
            id=f"job-{next(self.ids)}",
            model_name="m",
            submitted_at=self.now,
            updated_at=self.now,
            due_at=None if depends_on else due_at,
            depends_on=depends_on,
            waits_for=depends_on,
            not_before=due_at if depends_on else None,
            fails_on_dependency=fails_on_dependency,
            policy=Policy(attempts, backoff_ms, 30_000, codes),
            deadline=None if deadline_s is None else due_at + timedelta(seconds=deadline_s),
            transitions=acceptance(self.now, "local/ingest-0", due_at),
        )
        self.jobs[job.id] = job

    @rule(seconds=st.sampled_from([0.5, 6, 40]))
    def time_passes(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    @precondition(lambda self: any(job.due_at is not None and job.due_at <= self.now for job in self.jobs.values()))
    @rule(n=st.integers(0, WORKERS - 1), most=st.integers(1, 3))
    def claims(self, n: int, most: int) -> None:
        worker = self.workers[n]
        lease = self.lease(worker)
        due = [job for job in self.jobs.values() if job.due_at is not None and job.due_at <= self.now]
        for job in due[:most]:
            assert all(self.jobs[one].state is State.SUCCEEDED for one in job.depends_on), "it did not wait"
            self.jobs[job.id] = claim(job, lease, self.now)
            worker.tasks[job.id] = Task(self.jobs[job.id])

    @precondition(lambda self: self.some(lambda task: task.how is None and task.after is None))
    @rule(data=st.data(), failure=st.none() | st.sampled_from(FAILURES), drawn=st.floats(0, 0.99))
    def a_call_returns(self, data: st.DataObject, failure: Failure | None, drawn: float) -> None:
        task = data.draw(self.tasks(lambda task: task.how is None and task.after is None))
        if failure is None:
            task.how = End(Outcome.SUCCEEDED)
        else:
            self.decide(task, after_failure(task.job, failure, self.now, lambda: drawn))

    @precondition(lambda self: self.some(lambda task: task.how is not None))
    @rule(data=st.data(), is_heard=st.booleans())
    def a_result_reaches_the_store(self, data: st.DataObject, is_heard: bool) -> None:
        task = data.draw(self.tasks(lambda task: task.how is not None))
        assert task.how is not None
        standing = self.record(task.job, task.how)
        if is_heard:  # Else the answer was lost on its way, and the put is repeated.
            task.how = None
            task.after = end(task.job, standing, "i", self.now)

    @precondition(lambda self: self.some(lambda task: task.after is not None))
    @rule(data=st.data(), is_heard=st.booleans())
    def a_state_is_written(self, data: st.DataObject, is_heard: bool) -> None:
        task = data.draw(self.tasks(lambda task: task.after is not None))
        assert task.after is not None
        self.write(task.job, task.after)
        if is_heard:
            self.drop(task)

    @precondition(lambda self: self.some(lambda task: True))
    @rule(n=st.integers(0, WORKERS - 1))
    def renews(self, n: int) -> None:
        for task in list(self.workers[n].tasks.values()):
            there, lease = self.jobs[task.job.id], task.job.lease
            assert lease is not None
            if there.lease is not None and there.lease.id == lease.id:
                self.jobs[there.id] = replace(there, lease=replace(there.lease, expires_at=self.now + LEASE))
            elif task.how is None and task.after is None:
                self.drop(task)

    @precondition(lambda self: self.some(lambda task: True))
    @rule(n=st.integers(0, WORKERS - 1))
    def is_killed(self, n: int) -> None:
        self.workers[n].tasks.clear()

    @precondition(lambda self: self.some(lambda task: task.how is None and task.after is None))
    @rule(n=st.integers(0, WORKERS - 1))
    def releases(self, n: int) -> None:
        for task in self.workers[n].tasks.values():
            if task.how is None and task.after is None:
                self.decide(task, after_stop(self.now, "i"))

    @precondition(lambda self: any(job.lease and job.lease.expires_at <= self.now for job in self.jobs.values()))
    @rule(n=st.integers(0, WORKERS - 1), asks=st.booleans())
    def recovers(self, n: int, asks: bool) -> None:
        worker = self.workers[n]
        lease = self.lease(worker)
        for before in list(self.jobs.values()):
            if before.lease is not None and before.lease.expires_at <= self.now:
                job = take_over(before, lease)
                task = self.take(worker, job)
                standing = self.store.get(job.id) if asks else None
                if standing is not None and standing.generation == job.generation:
                    task.after = end(job, standing, "i", self.now)
                else:
                    self.decide(task, after_lapse(job, before.lease, self.now, lambda: 0.5))

    @precondition(lambda self: any(job.due_at and imposed_end(job, self.now) for job in self.jobs.values()))
    @rule(n=st.integers(0, WORKERS - 1))
    def expires(self, n: int) -> None:
        worker = self.workers[n]
        lease = self.lease(worker)
        for before in list(self.jobs.values()):
            if before.due_at is not None and before.deadline is not None and before.deadline <= self.now:
                how = imposed_end(before, self.now)
                assert how is not None
                self.decide(self.take(worker, take_over(before, lease)), how)

    @precondition(lambda self: any(job.waits_for and job.lease is None for job in self.jobs.values()))
    @rule(n=st.integers(0, WORKERS - 1))
    def looks_after_those_that_wait(self, n: int) -> None:
        worker = self.workers[n]
        lease = self.lease(worker)
        known = {job.id: DependencyState(job.id, job.state) for job in self.jobs.values()}
        for before in list(self.jobs.values()):
            if before.waits_for and before.lease is None:
                after = decide(before, known, "i", self.now)
                if isinstance(after, Job):
                    self.jobs[before.id] = after
                else:
                    self.decide(self.take(worker, replace(take_over(before, lease), decided_end=after)), after)

    @precondition(lambda self: any(not job.is_final for job in self.jobs.values()))
    @rule(data=st.data(), n=st.integers(0, WORKERS - 1))
    def cancels(self, data: st.DataObject, n: int) -> None:
        before = data.draw(st.sampled_from([job for job in self.jobs.values() if not job.is_final]))
        if before.cancel_reason is None:
            job = take_over(before, self.lease(self.workers[n]), "not wanted")
            how = imposed_end(job, self.now)
            assert how is not None
            self.decide(self.take(self.workers[n], job), how)

    @precondition(lambda self: any(job.state in DEAD_LETTERS for job in self.jobs.values()))
    @rule(data=st.data())
    def is_requeued(self, data: st.DataObject) -> None:
        before = data.draw(st.sampled_from([job for job in self.jobs.values() if job.state in DEAD_LETTERS]))
        self.jobs[before.id] = requeue(before, "", "i", self.now)

    # What must hold.

    @invariant()
    def a_job_has_ended_exactly_when_its_result_says_so(self) -> None:
        for job in self.jobs.values():
            if job.is_final:
                assert job.state is state_of(self.store[job.id], job.policy)
                assert self.store[job.id].generation == job.generation
                assert job.lease is None
                assert job.due_at is None

    @invariant()
    def what_has_ended_never_changes(self) -> None:
        for (job_id, generation), result in self.seen_results.items():
            assert self.store[job_id].generation >= generation, "an old result took the place of a new one"
            if self.store[job_id].generation == generation:
                assert self.store[job_id] == result, "a result was overwritten"
            else:
                assert result.outcome is Outcome.FAILED, "a result that stands for ever was replaced"
        for (job_id, generation), job in self.seen_final.items():
            assert self.jobs[job_id].generation >= generation
            if self.jobs[job_id].generation == generation:
                assert self.jobs[job_id] == job, "an ended job was changed"
        self.seen_results |= {(job_id, result.generation): result for job_id, result in self.store.items()}
        self.seen_final |= {(job.id, job.generation): job for job in self.jobs.values() if job.is_final}

    @invariant()
    def somebody_is_responsible_for_every_other(self) -> None:
        for job in self.jobs.values():
            waits = bool(job.waits_for) and job.lease is None
            assert [job.due_at is not None, job.lease is not None, waits].count(True) == (not job.is_final)

    @invariant()
    def attempts_stay_within_the_policy(self) -> None:
        for job in self.jobs.values():
            assert 0 <= job.failures <= job.policy.max_attempts
            assert job.lapses <= MAX_LAPSES

    @invariant()
    def the_last_transition_is_the_state(self) -> None:
        for job in self.jobs.values():
            assert job.transitions[-1].state is job.state
            assert job.transition_count == len(job.transitions)
            ends = [step for step in job.transitions[:-1] if step.state in FINAL]
            assert len(ends) == job.generation - 1
            assert all(step.state in DEAD_LETTERS for step in ends)
            assert generations(job) == sorted(generations(job))
            assert generations(job)[0] == 1

    def teardown(self) -> None:
        """However things stand: one worker that lives is enough to end every job."""
        for worker in self.workers:
            worker.tasks.clear()
        for _ in range(60):  # More than the longest chain of dependencies.
            self.now += timedelta(minutes=1)
            self.recovers(0, True)
            self.expires(0)
            self.looks_after_those_that_wait(0)
            self.claims(0, 1_000)
            for task in list(self.workers[0].tasks.values()):
                if task.after is None:
                    standing = self.record(task.job, task.how or End(Outcome.SUCCEEDED))
                    task.after = end(task.job, standing, "i", self.now)
                self.write(task.job, task.after)
                self.drop(task)
        assert all(job.is_final for job in self.jobs.values()), "a job is lost"
        assert self.store.keys() == self.jobs.keys(), "a job has no result"
        self.a_job_has_ended_exactly_when_its_result_says_so()

    # Shorthands.

    def take(self, worker: Worker, job: Job) -> Task:
        self.jobs[job.id] = job
        worker.tasks[job.id] = task = Task(job)
        return task

    def decide(self, task: Task, decision: BackToQueue | End) -> None:
        if isinstance(decision, End):
            task.how = decision
        else:
            task.after = return_to_queue(task.job, decision, "i", self.now)

    def all_tasks(self) -> list[Task]:
        return [task for worker in self.workers for task in worker.tasks.values()]

    def some(self, is_so) -> bool:
        return any(map(is_so, self.all_tasks()))

    def tasks(self, is_so) -> st.SearchStrategy[Task]:
        return st.sampled_from([task for task in self.all_tasks() if is_so(task)])

    def drop(self, task: Task) -> None:
        for worker in self.workers:
            if worker.tasks.get(task.job.id) is task:
                del worker.tasks[task.job.id]


TestWorld = World.TestCase
TestWorld.settings = settings(max_examples=by_form(75, 150), stateful_step_count=50, deadline=None)


def test_the_states_are_those_of_the_contract() -> None:
    assert {state.name for state in State} - {state.name for state in FINAL} == {"QUEUED", "RUNNING"}
