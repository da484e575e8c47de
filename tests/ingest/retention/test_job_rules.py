"""How long jobs stay: the tenant's own word, else that of all, else the setting."""

from __future__ import annotations

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.ingest.job import FINAL, State
from services.ingest.retention.rules import BATCHES, LONGEST, SHORTEST, Keep, Rules, What, checked
from services.ingest.tenants.settings import EVERYONE
from shoal.errors import InvalidArgument
from tests.ingest.making import START, job

WEEK = timedelta(days=7)
DEFAULTS: dict[What, Keep] = {**dict.fromkeys(FINAL, WEEK), BATCHES: timedelta(days=30)}
tenants = st.sampled_from(["", "a", "b"])
states = st.sampled_from(sorted(FINAL))
keeps = st.none() | st.timedeltas(SHORTEST, LONGEST)
own = st.dictionaries(st.tuples(tenants | st.just(EVERYONE), states), keeps, max_size=6)


def test_whose_word_counts() -> None:
    rules = Rules(DEFAULTS, {("a", State.DEAD): None, (EVERYONE, State.DEAD): timedelta(days=1)})
    assert rules.keep("a", State.DEAD) is None
    assert rules.keep("b", State.DEAD) == timedelta(days=1)
    assert rules.keep("a", State.SUCCEEDED) == WEEK


def test_what_has_not_ended_stays() -> None:
    rules = Rules(DEFAULTS)
    long_after = START + timedelta(days=1_000)
    assert not rules.is_expired(job(), long_after)
    assert rules.is_expired(job(state=State.SUCCEEDED), long_after)
    assert not rules.is_expired(job(state=State.SUCCEEDED), START + WEEK)


def test_batches_have_their_own() -> None:
    rules = Rules(DEFAULTS, {("a", BATCHES): None, ("b", BATCHES): WEEK, ("b", State.DEAD): None})
    later = START + timedelta(days=8)
    assert [rules.is_past_retention(tenant, BATCHES, START, later) for tenant in ("a", "b", "c")] == [
        False,
        True,
        False,
    ]
    assert rules.is_past_retention("c", BATCHES, START, START + timedelta(days=31))
    assert rules.shortest(BATCHES) == WEEK


@given(own, tenants, states)
def test_nothing_goes_sooner_than_the_shortest(own: dict[tuple[str, What], Keep], tenant: str, state: State) -> None:
    rules = Rules(DEFAULTS, own)
    keep, shortest = rules.keep(tenant, state), rules.shortest(state)
    if keep is not None:
        assert shortest is not None
        assert shortest <= keep
        assert rules.is_expired(job(tenant=tenant, state=state), START + keep + timedelta(milliseconds=1))
    assert not rules.is_expired(job(tenant=tenant, state=state), START + (shortest or LONGEST))


@pytest.mark.parametrize(
    ("tenant", "state", "keep", "says"),
    [
        ("t" * 65, State.DEAD, WEEK, "tenant: at most 64"),
        ("", None, WEEK, "state: expected a final state"),
        ("", State.RUNNING, WEEK, "state: expected a final state .*, got running"),
        ("", State.DEAD, timedelta(seconds=59), "keep: from 0:01:00 to 36500 days"),
        ("", State.DEAD, timedelta(days=36_501), "keep: from"),
    ],
)
def test_what_makes_no_sense_is_refused(tenant: str, state: State | None, keep: Keep, says: str) -> None:
    with pytest.raises(InvalidArgument, match=says):
        checked(tenant, state, keep)
