"""Table of a job's fields as MongoDB stores them, derived from the dataclass `Job`.

The type of a field determines its BSON form, and its default determines when the document omits it. `_STORED` has a row
for each field that needs more than that. A new field is declared in `Job` and `JobFieldValues` (`job.py`), and in
`messages.py` if clients see it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from datetime import datetime
from types import NoneType, UnionType
from typing import Any, Final, get_args, get_origin, get_type_hints

from services.ingest.job import End, Job, Lease, Outcome, Policy, State, Transition

BsonType = str | list[str]
REQUEST: Final = "request"
TRANSITIONS: Final = "transitions"


@dataclass(frozen=True, slots=True)
class Codec:
    """Conversion between a value and its BSON form; None where both are the same."""

    bson_type: BsonType
    encode: Callable[[Any], Any] | None = None
    decode: Callable[[Any], Any] | None = None


@dataclass(frozen=True, slots=True)
class FieldStorage:
    """Storage of one field beyond what its type and default determine."""

    name: str = ""
    """The name in the document; empty: the field's name."""
    codec: Codec | None = None
    """Replaces the codec of the field's type."""
    is_always_stored: bool = False
    """True: the document has the field also when its value is the default."""
    schema: Mapping[str, Any] | None = None
    """The validator's conditions beside the type. None: the validator does not check the field."""


@dataclass(frozen=True, slots=True)
class Field:
    """One row of the table."""

    name: str
    stored_name: str
    default: Any
    """MISSING: the field has no default."""
    is_always_stored: bool
    codec: Codec
    schema: Mapping[str, Any] | None


def encode_step(step: Transition) -> dict[str, Any]:
    """Return the document of a transition."""
    return {
        "state": str(step.state),
        "at": step.at,
        "attempt": step.attempt,
        "instance": step.instance,
        "reason": step.reason,
    }


def encode_lease(lease: Lease) -> dict[str, Any]:
    """Return the document of a lease."""
    return {"id": lease.id, "owner": lease.owner, "process": lease.process, "expires_at": lease.expires_at}


def encode_end(how: End) -> dict[str, Any]:
    """Return the document of a decided end."""
    return {"outcome": int(how.outcome), "code": how.code, "message": how.message}


def encode_policy(policy: Policy) -> dict[str, Any]:
    """Return the document of a retry policy."""
    document: dict[str, Any] = {
        "max_attempts": policy.max_attempts,
        "initial_backoff_ms": policy.initial_backoff_ms,
        "max_backoff_ms": policy.max_backoff_ms,
    }
    # Few jobs have their own codes; an empty list would cost bytes in every job.
    if policy.codes:
        document["codes"] = policy.codes
    if policy.attempt_timeout_ms:
        document["attempt_timeout_ms"] = policy.attempt_timeout_ms
    return document


def decode_policy(document: Mapping[str, Any]) -> Policy:
    """Return the retry policy of a document."""
    return Policy(**{**document, "codes": tuple(document.get("codes", ()))})


def _decode_step(step: Mapping[str, Any]) -> Transition:
    return Transition(State(step["state"]), step["at"], step["attempt"], step["instance"], step["reason"])


_CODECS: Mapping[Any, Codec] = {
    str: Codec("string"),
    bytes: Codec("binData"),
    bool: Codec("bool"),
    int: Codec(["int", "long"]),
    datetime: Codec("date"),
    State: Codec("string", str, State),
    Policy: Codec("object", encode_policy, decode_policy),
    Lease: Codec("object", encode_lease, lambda lease: Lease(**lease)),
    End: Codec("object", encode_end, lambda end: End(Outcome(end["outcome"]), end["code"], end["message"])),
    tuple[str, ...]: Codec("array", list, tuple),
    # Pairs rather than an object, because a label's key may be text that is no valid MongoDB field name.
    tuple[tuple[str, str], ...]: Codec(
        "array",
        lambda pairs: [list(pair) for pair in pairs],
        lambda pairs: tuple((key, value) for key, value in pairs),
    ),
    tuple[Transition, ...]: Codec(
        "array",
        lambda steps: [encode_step(step) for step in steps],
        lambda steps: tuple([_decode_step(step) for step in steps]),
    ),
}

_REFERENCES: Mapping[str, Any] = {"minItems": 1, "items": {"bsonType": "string"}}

_STORED: Mapping[str, FieldStorage] = {
    "id": FieldStorage("_id", schema={"minLength": 26, "maxLength": 26}),
    "model_name": FieldStorage(schema={"minLength": 1}),
    "submitted_at": FieldStorage(schema={}),
    "state": FieldStorage(is_always_stored=True, schema={"enum": [str(state) for state in State]}),
    "key": FieldStorage(schema={"minLength": 1}),
    "due_at": FieldStorage(schema={}),
    "deadline": FieldStorage(schema={}),
    "depends_on": FieldStorage(schema=_REFERENCES),
    "waits_for": FieldStorage(schema=_REFERENCES),
    "unmet": FieldStorage(schema=_REFERENCES),
    "began_at": FieldStorage(schema={}),
    "lapses": FieldStorage(schema={"minimum": 0}),
    "decided_end": FieldStorage("doom"),
    "fails_on_dependency": FieldStorage("fails_with_them"),
    "lease": FieldStorage(schema={"required": ["id", "owner", "expires_at"]}),
    "keep_request": FieldStorage("is_kept"),
    "cancel_reason": FieldStorage(
        "cancel", Codec("object", lambda reason: {"reason": reason}, lambda cancel: cancel["reason"])
    ),
    # Earlier versions require the following fields.
    "model_version": FieldStorage(is_always_stored=True),
    "tenant": FieldStorage(is_always_stored=True, schema={}),
    "policy": FieldStorage(is_always_stored=True),
    "generation": FieldStorage(is_always_stored=True, schema={"minimum": 1}),
    "attempts": FieldStorage(is_always_stored=True, schema={"minimum": 0}),
    "refusals": FieldStorage(is_always_stored=True),
    "labels": FieldStorage(is_always_stored=True),
    TRANSITIONS: FieldStorage(is_always_stored=True, schema={"minItems": 1}),
    "transition_count": FieldStorage("steps", is_always_stored=True, schema={"minimum": 1}),
    "traceparent": FieldStorage(is_always_stored=True),
}


def _codec_of(annotation: Any) -> Codec:
    """Return the codec of a type, or of the X in `X | None`."""
    if get_origin(annotation) is UnionType:
        [annotation] = [each for each in get_args(annotation) if each is not NoneType]
    if (codec := _CODECS.get(annotation)) is None:
        raise TypeError(f"a field of Job has type {annotation}, which has no codec: add one to job_fields._CODECS")
    return codec


def _table() -> tuple[Field, ...]:
    types = get_type_hints(Job)
    rows = []
    for field in fields(Job):
        stored = _STORED.get(field.name, FieldStorage())
        rows.append(
            Field(
                field.name,
                stored.name or field.name,
                field.default,
                stored.is_always_stored or field.default is MISSING,
                stored.codec or _codec_of(types[field.name]),
                stored.schema,
            )
        )
    return tuple(rows)


FIELDS = _table()


def properties() -> dict[str, Any]:
    """Return the validator's conditions of the fields that it checks."""
    return {
        field.stored_name: dict(field.schema)
        if "enum" in field.schema
        else {"bsonType": field.codec.bson_type, **field.schema}
        for field in FIELDS
        if field.schema is not None
    }
