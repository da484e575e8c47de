"""Lists of jobs examine a bounded number of documents, whatever their filter, and together list every match once."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Literal, cast

import pytest
from pymongo import IndexModel
from pymongo.asynchronous.collection import AsyncCollection

from mesh.mongo import ensure_indexes
from services.ingest import job_scan
from services.ingest.documents import INDEXES, LATER_INDEXES, RETIRED_INDEXES, document_of
from services.ingest.intake.payloads import Payloads
from services.ingest.job import Job, State
from services.ingest.job_scan import scan
from services.ingest.job_store import DeadFilter
from services.ingest.queries.filters import checked
from services.ingest.queries.jobs import Filter, Jobs
from tests.ingest.making import START, job

Collection = AsyncCollection[dict[str, Any]]
SCANNED = 50
JOBS = 400
QUERIES: tuple[Mapping[str, Any], ...] = (
    {},
    Filter(state=State.DEAD).query(),
    Filter(tenant="t0").query(),
    Filter(model_name="m1").query(),
    Filter(tenant="t0", model_name="m1").query(),
    Filter(tenant="t0", model_name="m1", state=State.QUEUED).query(),
    Filter(tenant="t1", state=State.SUCCEEDED).query(),
    Filter(tenant="t2", model_name="m0").query(),
    Filter(tenant="nobody").query(),
    DeadFilter(code=13).query(),
    DeadFilter(tenant="t1", model_name="m0", code=13, before=START + timedelta(hours=1)).query(),
    DeadFilter(before=START).query(),
    checked((), frozenset({State.DEAD, State.QUEUED}), "m0", "", {"k": "v"}).query(),
)


def made(n: int) -> Job:
    """Two of three are of tenant t0; m1 is rare; every seventh is dead."""
    state = State.DEAD if n % 7 == 0 else State.SUCCEEDED if n % 5 else State.QUEUED
    return job(
        state=state,
        due_at=START if state is State.QUEUED else None,
        tenant="t0" if n % 3 else f"t{n % 4}",
        model_name="m1" if n > JOBS - 10 else "m0",
        last_code=13 if n % 2 else 14,
        labels=(("k", "v"),) if n % 11 == 0 else (),
    )


@pytest.fixture(autouse=True)
def small_scans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_scan, "SCANNED_MOST", SCANNED)


@pytest.fixture
async def full(jobs: Collection) -> Collection:
    await jobs.insert_many([document_of(made(n)) for n in range(JOBS)])
    return jobs


async def examined(jobs: Collection) -> int:
    """The most documents that one profiled read examined."""
    found = jobs.database["system.profile"].find(
        {"ns": f"{jobs.database.name}.jobs", "op": {"$in": ["query", "command"]}}
    )
    return max([one.get("docsExamined", 0) async for one in found])


@pytest.mark.parametrize("order", [1, -1])
async def test_the_pages_of_every_filter_have_every_match_once_in_order(
    full: Collection, order: Literal[1, -1]
) -> None:
    for query in QUERIES:
        expected = [one["_id"] async for one in full.find(query).sort("_id", order)]
        found: list[str] = []
        after: str | None = ""
        while after is not None:
            page = await scan(full, query, 7, after=after, order=order)
            assert len(page.documents) <= 7
            assert all("request" not in document for document in page.documents)
            found += [document["_id"] for document in page.documents]
            after = page.end
        assert found == expected, query


async def test_no_read_examines_more_than_its_bound(full: Collection) -> None:
    await full.database.command("profile", 2)
    for query in QUERIES:
        for order in (1, -1):
            await scan(full, query, 7, order=cast(Literal[1, -1], order))
    await full.database.command("profile", 0)
    # Of a tenant that has most of the jobs, MongoDB may read them all in the order of ids.
    assert await examined(full) <= 2 * SCANNED


@pytest.mark.parametrize(
    "requested",
    [
        Filter(tenant="t", state=State.DEAD),
        Filter(model_name="m", state=State.DEAD),
        Filter(tenant="t", state=State.QUEUED),
    ],
    ids=str,
)
async def test_a_list_by_state_reads_only_what_matches(jobs: Collection, requested: Filter) -> None:
    ended = [job(state=State.SUCCEEDED, due_at=None, tenant="t") for _ in range(200)]
    others = [job(state=requested.state, due_at=None, tenant="u", model_name="n") for _ in range(200)]
    await jobs.insert_many([document_of(one) for one in (*ended, *others)])
    await jobs.database.command("profile", 2)
    page = await Jobs(jobs, cast(Payloads, None)).page(requested, 100, "")
    await jobs.database.command("profile", 0)
    assert (page.jobs, page.next_token) == ([], "")
    assert await examined(jobs) == 0


async def test_a_list_of_few_among_very_many_has_empty_pages(full: Collection) -> None:
    reader = Jobs(full, cast(Payloads, None))
    requested = Filter(tenant="t0", model_name="m1")
    expected = [one["_id"] async for one in full.find(requested.query()).sort("_id", -1)]
    found: list[str] = []
    pages, token = 0, ""
    while not pages or token:
        page = await reader.page(requested, 100, token)
        found += [one.id for one in page.jobs]
        pages, token = pages + 1, page.next_token
    assert expected
    assert found == expected
    assert pages > 1


async def test_an_upgrade_builds_the_new_indexes_and_drops_the_old(jobs: Collection) -> None:
    await jobs.drop_indexes()
    old = [IndexModel([("tenant", 1), ("_id", -1)], name="by_tenant"), IndexModel("waits_for", name="dependents")]
    await jobs.create_indexes(old)
    await ensure_indexes(jobs, INDEXES, RETIRED_INDEXES)
    names = {index.document["name"] for index in INDEXES}
    assert set(await jobs.index_information()) == {"_id_", *names}
    assert not names & {*RETIRED_INDEXES}
    assert not any(index.document.get("unique") for index in LATER_INDEXES)
