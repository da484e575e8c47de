"""A field of a job is declared in `Job`, `Changes`, and `messages` if clients see it; forgetting one fails here."""

from __future__ import annotations

from dataclasses import MISSING, fields
from datetime import UTC, timedelta
from typing import Any, get_args, get_type_hints

import bson
import pytest
from bson.codec_options import CodecOptions
from pymongo.asynchronous.collection import AsyncCollection

from services.ingest.documents import difference, document_of, job_of
from services.ingest.job import DEFAULT_POLICY, End, Job, Lease, Outcome, Policy, State, Transition
from services.ingest.job_fields import FIELDS
from services.ingest.messages import message_of
from tests.ingest.making import START, job

LATER = START + timedelta(seconds=9)

# Values that no field has by default, by the field's type.
SAMPLES: dict[Any, Any] = {
    str: "other",
    bytes: b"\0other",
    bool: True,
    int: 7,
    type(START): LATER,
    State: State.RUNNING,
    Policy: Policy(max_attempts=7, codes=(4, 14)),
    Lease: Lease("id", "owner", "process", LATER),
    End: End(Outcome.FAILED, 13, "why"),
    tuple[str, ...]: ("01KB0Q9V8N8J5M2Q4R6T8W0X2Z", "key:k"),
    tuple[tuple[str, str], ...]: (("a.$b", "\0"), ("", "ü")),
    tuple[Transition, ...]: (Transition(State.RUNNING, LATER, 7, "i", "$why"),),
}

# Fields that clients do not see.
HIDDEN = {
    "began_at",
    "caller",
    "cancel_reason",
    "digest",
    "decided_end",
    "explains",
    "fails_on_dependency",
    "is_apart",
    "lapses",
    "lease",
    "policy",
    "refusals",
    "request",
    "transition_count",
    "traceparent",
    "unmet",
}

NAMES = [field.name for field in fields(Job)]


def sample(name: str) -> Any:
    """Return a value of the field's type that is not its default."""
    annotation = get_type_hints(Job)[name]
    kinds = [annotation, *get_args(annotation)]
    return next(SAMPLES[kind] for kind in kinds if kind in SAMPLES)


def stored(document: dict[str, Any]) -> dict[str, Any]:
    """Return what MongoDB gives back for a document."""
    return bson.decode(bson.encode(document), CodecOptions(tz_aware=True, tzinfo=UTC))


def plain(**changed: Any) -> Job:
    return job(due_at=None, request=None, transitions=(), **changed)


def updated(document: dict[str, Any], update: dict[str, Any]) -> dict[str, Any]:
    """Return the document after an update of the operators that `difference` uses."""
    after = {name: value for name, value in document.items() if name not in update.get("$unset", {})}
    after |= update["$set"]
    for name, pushed in update.get("$push", {}).items():
        after[name] = (after[name] + pushed["$each"])[pushed["$slice"] :]
    return after


@pytest.mark.parametrize("name", NAMES)
def test_each_field_is_read_back_as_it_was_stored(name: str) -> None:
    one = plain(**({} if name in ("request", "due_at", "transitions") else {name: sample(name)}))
    if name in ("request", "due_at", "transitions"):
        one = one.replaced(**{name: sample(name)})  # type: ignore[misc]
    assert job_of(stored(document_of(one))) == one


@pytest.mark.parametrize("name", [name for name in NAMES if name != "request"])
def test_an_update_changes_each_field_and_changes_it_back(name: str) -> None:
    before = plain(id="01KB0Q9V8N8J5M2Q4R6T8W0X2Y")
    after = before.replaced(**{name: sample(name)})  # type: ignore[misc]
    there = updated(stored(document_of(before)), stored(difference(before, after)))
    assert job_of(there) == after
    if name != "transitions":
        assert job_of(updated(there, stored(difference(after, before)))) == before


@pytest.mark.parametrize("name", NAMES)
def test_clients_see_each_field_that_is_not_hidden(name: str) -> None:
    one = job(due_at=None)
    other = one.replaced(**{name: sample(name)})  # type: ignore[misc]
    assert (message_of(one) == message_of(other)) == (name in HIDDEN)


@pytest.mark.parametrize(
    "name", [field.name for field in FIELDS if field.is_always_stored and field.default is not MISSING]
)
def test_a_field_that_earlier_versions_read_without_a_default_is_always_stored(name: str) -> None:
    stored_name = next(field.stored_name for field in FIELDS if field.name == name)
    assert stored_name in document_of(job(policy=DEFAULT_POLICY))


async def test_the_validator_takes_every_field(jobs: AsyncCollection[dict[str, Any]]) -> None:
    full = Job.of({name: sample(name) for name in NAMES}).replaced(id="01KB0Q9V8N8J5M2Q4R6T8W0X2Y", is_apart=False)
    await jobs.insert_one(document_of(full))
    found = await jobs.find_one({"_id": full.id})
    assert found is not None
    assert job_of(found) == full
