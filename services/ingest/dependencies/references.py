"""References from a job to its dependencies: by id or by idempotency key.

    01KB0Q9V8N8J5M2Q4R6T8W0X2Z     an id
    key:invoice-7                  the job of the same tenant with that idempotency key

A reference by key is valid as soon as a job with the key is durable, whichever of two concurrent submits wins. So a
group of submits can be written together although some depend on others in the group.
"""

from __future__ import annotations

from services.ingest.ulid import is_ulid
from shoal.errors import InvalidArgument
from shoal.ingest.v1 import ingest_pb2 as pb

MOST = 100
"""Maximum dependencies of a job: their states are read at the submit, and again until they have ended."""
_KEY = "key:"
_ON_FAILURE = frozenset(pb.OnDependencyFailure.values())


def by_key(key: str) -> str:
    """Return the reference to the job with idempotency key `key`."""
    return _KEY + key


def key_of(reference: str) -> str | None:
    """Return the idempotency key in a reference; None when the reference is an id."""
    return reference.removeprefix(_KEY) if reference.startswith(_KEY) else None


def words(reference: str) -> str:
    """Return the reference as text for messages."""
    key = key_of(reference)
    return reference if key is None else f"with the key {key!r}"


def references_of(submit: pb.SubmitRequest, key_chars: int) -> tuple[str, ...]:
    """Return the references in a submit's `depends_on`, without repetitions.

    Raises:
        InvalidArgument: a field is invalid; the message names it.
    """
    if len(submit.depends_on) > MOST:
        raise InvalidArgument(f"depends_on: at most {MOST}, got {len(submit.depends_on)}")
    if submit.on_dependency_failure not in _ON_FAILURE:
        raise InvalidArgument(f"on_dependency_failure: there is no {submit.on_dependency_failure}")
    if not submit.depends_on:
        return ()
    return tuple(dict.fromkeys(_reference(each, at, key_chars) for at, each in enumerate(submit.depends_on)))


def message_of(reference: str) -> pb.Dependency:
    """Return the message of a reference."""
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
