"""The contract of a JobStore, which every implementation passes: what its writes change, and what they say of it."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any, cast

import pytest
from pymongo.asynchronous.collection import AsyncCollection
from pymongo.errors import AutoReconnect

from services.ingest.documents import WITHOUT_REQUEST, job_of
from services.ingest.job import (
    HISTORY_CHARS,
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
    take_over,
    unblocked,
)
from services.ingest.job_store import (
    Claimed,
    DeadFilter,
    DependencyState,
    Inserted,
    JobStore,
    KeyTaken,
    StatesWritten,
    UnknownOutcome,
)
from services.ingest.mongo_jobs import MongoJobs
from services.ingest.tenant_queue import TenantQueueKey
from shoal.errors import Code, Unavailable
from tests.ingest.making import START, job

LATER = START + timedelta(seconds=10)
DEAD = End(Outcome.FAILED, Code.INTERNAL, "broken")


def lease(name: str, owner: str = "local/ingest-0", process: str = "p") -> Lease:
    return Lease(name, owner, process, LATER)


@pytest.fixture(params=["mongo"])
async def store(request: pytest.FixtureRequest, jobs: AsyncCollection[dict[str, Any]]) -> JobStore:
    return {"mongo": MongoJobs(jobs)}[request.param]


async def insert(store: JobStore, *made: Job) -> None:
    assert isinstance(outcome := await store.insert(made), Inserted)
    assert not outcome.refused


async def held(store: JobStore, name: str, **fields: Any) -> Job:
    """Insert a job that is claimed under the lease `name`, as in the insert of its dispatcher."""
    made = claim(job(**fields), lease(name), START)
    await insert(store, made)
    return made


async def read(store: JobStore, *made: Job) -> list[Job]:
    stored = cast(MongoJobs, store)._jobs
    found = {document["_id"]: job_of(document) async for document in stored.find({}, WITHOUT_REQUEST)}
    return [found[one.id] for one in made]


def light(one: Job) -> Job:
    return one.replaced(request=None)


async def test_jobs_are_read_as_they_were_inserted_queued_or_claimed(store: JobStore) -> None:
    queued, claimed = job(labels=(("a", "b"),)), claim(job(), lease("l"), START)
    assert await store.insert([queued, claimed]) == Inserted([queued, claimed])
    assert await read(store, queued, claimed) == [light(queued), light(claimed)]
    assert await store.read(["nowhere"]) == {}


async def test_of_jobs_with_one_key_the_first_is_inserted_and_the_other_refused_alone(store: JobStore) -> None:
    first, second, other = job(tenant="t", key="k"), job(tenant="t", key="k"), job(tenant="u", key="k")
    outcome = await store.insert([first, second, other])
    assert isinstance(outcome, Inserted)
    assert [one.id for one in outcome.written] == [first.id, other.id]
    assert {job_id: type(error) for job_id, error in outcome.refused.items()} == {second.id: KeyTaken}
    found = await store.by_key({("t", "k"), ("u", "k"), ("t", "none")})
    assert {key: one.id for key, one in found.items()} == {("t", "k"): first.id, ("u", "k"): other.id}
    assert await store.by_key(set()) == {}


async def test_standings_are_by_id_and_by_key_of_one_tenant(store: JobStore) -> None:
    letter, foreign = await dead(store, "a", tenant="t", key="k"), job(tenant="u")
    await insert(store, foreign)
    [by_id] = await store.dependency_states("t", [letter.id, foreign.id], [])
    [by_key] = await store.dependency_states("t", [], ["k"])
    assert by_id == by_key == DependencyState(letter.id, State.DEAD, "broken", "k")
    assert await store.dependency_states("t", [], []) == []


async def test_the_queue_is_seen_by_lanes_in_the_order_of_due_times(store: JobStore) -> None:
    soon, late = job(tenant="a"), job(tenant="a", due_at=LATER)
    await insert(store, late, soon, job(tenant="b", due_at=LATER), await_one := job(tenant="b"), held_one := job())
    await store.claim([held_one.id], lease("l"), START)
    a, b = TenantQueueKey("a", "m", 0), TenantQueueKey("b", "m", 0)
    assert await store.tenant_queues("", 10) == [(a, START), (b, START)]
    assert await store.tenant_queues("", 1) == [(a, START)]
    assert await store.tenant_queues(a.text, 10) == [(b, START)]
    assert await store.heads([(a, 5), (b, 5)], START) == {a: [(START, soon.id)], b: [(START, await_one.id)]}
    assert await store.heads([(a, 5)], LATER) == {a: [(START, soon.id), (LATER, late.id)]}
    assert await store.heads([(a, 1)], LATER) == {a: [(START, soon.id)]}
    assert await store.count_waiting(10) == 4
    assert await store.count_waiting(3) == 3


async def test_a_claim_wins_what_waits_and_is_due_with_its_request(store: JobStore) -> None:
    due, early, taken = job(), job(due_at=LATER), await held(store, "other")
    await insert(store, due, early)
    outcome = await store.claim([due.id, early.id, taken.id], lease("l"), START)
    assert outcome == Claimed([claim(due, lease("l"), START)])
    assert await store.claim([due.id], lease("late"), START) == Claimed([])
    assert await store.claimed_under(lease("l"), [due.id, taken.id]) == [claim(due, lease("l"), START)]


async def test_claimers_never_share_a_job(store: JobStore) -> None:
    made = [job() for _ in range(50)]
    await insert(store, *made)
    ids = [one.id for one in made]
    outcomes = await asyncio.gather(*(store.claim(ids, lease(f"l{n}"), START) for n in range(4)))
    won = [one.id for outcome in outcomes if isinstance(outcome, Claimed) for one in outcome.jobs]
    assert sorted(won) == sorted(ids)


async def test_a_fresh_claim_wins_what_nobody_has_touched(store: JobStore) -> None:
    fresh, touched = job(), job()
    await insert(store, fresh, touched)
    mine = claim(touched, lease("other"), START)
    assert await store.claim([touched.id], lease("other"), START) == Claimed([mine])
    back = return_to_queue(mine, BackToQueue(START, True, "again"), "i", START)
    assert await store.write_states([(mine, back)]) == StatesWritten(1)
    assert await store.claim_accepted([fresh, touched], lease("l"), START) == Claimed([claim(fresh, lease("l"), START)])
    assert (await read(store, touched)) == [light(back)]


async def test_a_renewal_extends_the_leases_that_hold_and_names_the_lost(store: JobStore) -> None:
    one, lost = await held(store, "l"), await held(store, "other")
    longer = LATER + timedelta(seconds=5)
    assert await store.renew({one.id: lease("l"), lost.id: lease("l")}, longer) == {lost.id}
    [kept, same] = await read(store, one, lost)
    assert (kept.lease and kept.lease.expires_at, same.lease) == (longer, lease("other"))


async def test_lapsed_jobs_are_taken_but_not_the_excepted(store: JobStore) -> None:
    lapsed, mine, unclear = await held(store, "a"), await held(store, "b"), await held(store, "c")
    nobody: dict[str, Any] = {"but_ids": [], "but_leases": []}
    assert await store.take_lapsed(START, lease("n"), 10, **nobody) == []
    taken = await store.take_lapsed(LATER, lease("n"), 10, but_ids=[mine.id], but_leases=["c"])
    assert taken == [(light(take_over(lapsed, lease("n"))), lease("a"))]
    assert await read(store, mine, unclear) == [light(mine), light(unclear)]
    assert len(await store.take_lapsed(LATER, lease("m"), 1, **nobody)) == 1


async def test_expired_jobs_are_taken_from_the_queue_only(store: JobStore) -> None:
    queued, running = job(deadline=START), await held(store, "l", deadline=START)
    await insert(store, queued, job(deadline=LATER), job())
    assert await store.take_expired(START, lease("n"), 10) == [light(take_over(queued, lease("n")))]
    assert await read(store, running) == [light(running)]


async def test_a_live_job_is_taken_once_to_be_cancelled(store: JobStore) -> None:
    running, waiting = await held(store, "l"), job()
    await insert(store, waiting)
    for one in (running, waiting):
        taken = await store.take_to_cancel(one.id, "$why", lease("n"))
        assert taken == light(take_over(one, lease("n"), "$why"))
        assert await store.take_to_cancel(one.id, "again", lease("m")) is None
        assert await read(store, one) == [taken]
    assert await store.take_to_cancel("nowhere", "", lease("m")) is None


async def test_the_leases_of_an_owners_other_processes_lapse(store: JobStore) -> None:
    old = claim(job(), lease("a", process="old"), START)
    other = claim(job(), lease("b", owner="local/ingest-1", process="old"), START)
    new = claim(job(), lease("c", process="new"), START)
    await insert(store, old, other, new)
    assert await store.expire_leases("local/ingest-0", "new", START) == 1
    found = await read(store, old, other, new)
    assert [one.lease.expires_at for one in found if one.lease] == [START, LATER, LATER]


async def test_states_are_written_by_the_holder_in_its_attempt_only(store: JobStore) -> None:
    mine, other = await held(store, "l"), await held(store, "other")
    ended = end(mine, End(Outcome.SUCCEEDED), "i", LATER)
    not_mine = other.replaced(lease=lease("l"))
    assert await store.write_states([(mine, ended), (not_mine, end(not_mine, DEAD, "i", LATER))]) == StatesWritten(1)
    assert await read(store, mine, other) == [light(ended), light(other)]
    stale = other.replaced(attempts=9)
    assert await store.write_states([(stale, end(stale, DEAD, "i", LATER))]) == StatesWritten(0)


async def dead(store: JobStore, name: str, **fields: Any) -> Job:
    """Insert a dead letter."""
    mine = await held(store, name, **fields)
    letter = end(mine, DEAD, "i", START)
    assert await store.write_states([(mine, letter)]) == StatesWritten(1)
    return light(letter)


def newest(letter: Job) -> Job:
    return letter.replaced(labels=(), transitions=letter.transitions[-1:])


async def test_dead_letters_are_found_oldest_first(store: JobStore) -> None:
    first, second, other = await dead(store, "a"), await dead(store, "b", model_name="n"), await dead(store, "c")
    await insert(store, job())
    first, second, other = map(newest, (first, second, other))
    assert await store.dead_letters(DeadFilter(), 10) == ([first, second, other], "")
    assert await store.dead_letters(DeadFilter(), 2) == ([first, second], second.id)
    assert await store.dead_letters(DeadFilter(), 2, second.id) == ([other], "")
    assert await store.dead_letters(DeadFilter(model_name="m", code=Code.INTERNAL), 1) == ([first], first.id)
    assert await store.dead_letters(DeadFilter(before=START), 10) == ([], "")
    assert await store.dead_letters(DeadFilter(State.FAILED), 10) == ([], "")
    assert await store.dead_letters(DeadFilter(tenant="t"), 10) == ([], "")


async def test_dead_letters_are_read_for_changes_with_the_newest_transition_alone_and_lose_nothing(
    store: JobStore,
) -> None:
    letter = await dead(store, "a", labels=(("k", "v"),))
    found = await store.read([letter.id, "nowhere"])
    assert found == {letter.id: newest(letter)}
    await store.requeue([(found[letter.id], requeue(found[letter.id], "why", "i", LATER))])
    assert await read(store, letter) == [requeue(letter, "why", "i", LATER)]


async def test_of_two_that_requeue_or_purge_a_dead_letter_one_does(store: JobStore) -> None:
    letter, other = await dead(store, "a"), await dead(store, "b")
    again = requeue(letter, "first", "i", LATER)
    await store.requeue([(letter, again)])
    await store.requeue([(letter, requeue(letter, "second", "j", LATER)), (other, requeue(other, "", "j", LATER))])
    await store.purge([letter])
    assert await read(store, letter, other) == [again, light(requeue(other, "", "j", LATER))]
    third = await dead(store, "c")
    await store.purge([third])
    assert await store.read([third.id]) == {}


async def test_a_dead_letter_with_long_reasons_stays_small_however_often_it_is_requeued(store: JobStore) -> None:
    mine = await held(store, "0")
    most = 0
    for number in range(1, 60):
        letter = end(mine, End(Outcome.FAILED, Code.INTERNAL, "m" * 1_000), "i", LATER)
        assert await store.write_states([(mine, letter)]) == StatesWritten(1)
        assert await read(store, letter) == [light(letter)]
        most = max(most, sum(len(step.reason) for step in letter.transitions))
        [found] = (await store.read([letter.id])).values()
        await store.requeue([(found, requeue(found, "r" * 1_000, "i", LATER))])
        claimed = await store.claim([letter.id], lease(str(number)), LATER)
        assert isinstance(claimed, Claimed)
        [mine] = claimed.jobs
    assert HISTORY_CHARS - 1_000 < most <= HISTORY_CHARS
    assert (mine.generation, mine.transition_count) == (60, 2 + 59 * 3)


def dependent(*on: Job) -> Job:
    ids = tuple(one.id for one in on)
    return job(due_at=None, depends_on=ids, waits_for=ids)


async def test_dependents_are_found_by_what_they_wait_for_by_id_and_by_page(store: JobStore) -> None:
    a, b = job(), job()
    one, both = dependent(a), dependent(a, b)
    await insert(store, a, b, one, both)
    by_id = lambda found: [each.id for each in found]  # noqa: E731
    assert sorted(by_id(await store.dependents([a.id], 10))) == [one.id, both.id]
    assert by_id(await store.dependents([b.id], 10)) == [both.id]
    assert len(await store.dependents([a.id, b.id], 1)) == 1
    assert by_id(await store.dependents_of(a.id, "", 1)) == [one.id]
    assert by_id(await store.dependents_of(a.id, one.id, 10)) == [both.id]
    assert by_id(await store.dependents_of(b.id, both.id, 10)) == []
    assert await store.count_waiting(10) == 4
    assert await store.count_waiting(3) == 3
    assert by_id(await store.dependents_among([one.id, a.id])) == [one.id]
    assert by_id(await store.dependents_page("", 1)) == [one.id]
    assert by_id(await store.dependents_page(one.id, 10)) == [both.id]
    assert await store.take_to_cancel(one.id, "", lease("n")) is not None
    assert by_id(await store.dependents_page("", 10)) == [both.id]


async def test_a_dependent_is_released_or_doomed_unless_it_has_changed_since_it_was_read(store: JobStore) -> None:
    a = job()
    released, doomed, changed = dependent(a), dependent(a), dependent(a)
    await insert(store, a, released, doomed, changed)
    after = unblocked(released, "i", LATER)
    await store.release_dependents([(light(released), light(after))])
    assert await read(store, released) == [light(after)]
    taken = await store.take_to_cancel(changed.id, "", lease("other"))
    await store.release_dependents([(light(changed), unblocked(light(changed), "i", LATER))])
    mine = await store.take_to_end([(doomed, DEAD, (a.id,)), (changed, DEAD, ()), (released, DEAD, ())], lease("n"))
    assert mine == [light(doomed).replaced(lease=lease("n"), decided_end=DEAD)]
    assert await read(store, changed) == [taken]


class Unanswered:
    """A collection that does its writes and answers none of them."""

    def __init__(self, jobs: AsyncCollection[dict[str, Any]]) -> None:
        self._jobs = jobs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._jobs, name)

    async def insert_many(self, *args: Any, **options: Any) -> None:
        await self._jobs.insert_many(*args, **options)
        raise AutoReconnect("the connection broke")

    async def update_many(self, *args: Any) -> None:
        await self._jobs.update_many(*args)
        raise AutoReconnect("the connection broke")

    async def bulk_write(self, *args: Any, **options: Any) -> None:
        await self._jobs.bulk_write(*args, **options)
        raise AutoReconnect("the connection broke")


async def test_the_outcome_of_a_write_that_is_not_answered_is_unknown(jobs: AsyncCollection[dict[str, Any]]) -> None:
    sure, unsure = MongoJobs(jobs), MongoJobs(cast(Any, Unanswered(jobs)))
    made = job()
    outcomes: list[object] = [
        await unsure.insert([made]),
        await unsure.claim_accepted([made], lease("l"), START),
        await unsure.claim([made.id], lease("m"), START),
    ]
    mine = claim(made, lease("l"), START)
    assert await sure.claimed_under(lease("l"), [made.id]) == [mine], "the first two writes were made"
    outcomes.append(await unsure.write_states([(mine, end(mine, DEAD, "i", START))]))
    for outcome in outcomes:
        assert isinstance(outcome, UnknownOutcome)
        assert isinstance(outcome.error, Unavailable)
