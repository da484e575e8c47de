"""How a job refers to one that it depends on: by id, or by idempotency key, which is a job's second name.

    01KB0Q9V8N8J5M2Q4R6T8W0X2Z     an id
    key:invoice-7                  the job of the same tenant with that key

A reference by key is good as soon as the key's job is durable, whichever of two that raced it is. So a group of submits
can be written at once although some depend on others in it.
"""

from __future__ import annotations

from services.ingest.ulid import is_ulid
from shoal.errors import InvalidArgument
from shoal.ingest.v1 import ingest_pb2 as pb

MOST = 100
"""Jobs that one depends on: each is looked up when it is submitted, and again until it has ended."""
_KEY = "key:"
_ON_FAILURE = frozenset(pb.OnDependencyFailure.values())


def by_key(key: str) -> str:
    """The reference to the job with that key."""
    return _KEY + key


def key_of(reference: str) -> str | None:
    """The key that it refers by; None when it is an id."""
    return reference.removeprefix(_KEY) if reference.startswith(_KEY) else None


def words(reference: str) -> str:
    """As people read it."""
    key = key_of(reference)
    return reference if key is None else f"with the key {key!r}"


def references_of(submit: pb.SubmitRequest, key_chars: int) -> tuple[str, ...]:
    """What a submit depends on, each once.

    Raises:
        InvalidArgument: names the field.
    """
    if len(submit.depends_on) > MOST:
        raise InvalidArgument(f"depends_on: at most {MOST}, got {len(submit.depends_on)}")
    if submit.on_dependency_failure not in _ON_FAILURE:
        raise InvalidArgument(f"on_dependency_failure: there is no {submit.on_dependency_failure}")
    if not submit.depends_on:
        return ()
    return tuple(dict.fromkeys(_reference(each, at, key_chars) for at, each in enumerate(submit.depends_on)))


def message_of(reference: str) -> pb.Dependency:
    """As the contract has it."""
    key = key_of(reference)
    return pb.Dependency(job_id=reference) if key is None else pb.Dependency(idempotency_key=key)


def _reference(dependency: pb.Dependency, at: int, key_chars: int) -> str:
    if dependency.WhichOneof("of") == "job_id":
        if not is_ulid(dependency.job_id):
            raise InvalidArgument(f"depends_on[{at}].job_id: not a job's id: {dependency.job_id[:64]!r}")
        return dependency.job_id
    key = dependency.idempotency_key
    if not 1 <= len(key) <= key_chars:
        raise InvalidArgument(f"depends_on[{at}]: a job's id, or a key of 1 to {key_chars} characters")
    return by_key(key)
