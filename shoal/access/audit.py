"""Events of the audit log, and the RPCs whose calls are acts to audit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

from shoal.access.rpc_groups import (
    ADMINISTER,
    APPLY_POLICY,
    CODE,
    CREATE_KEY,
    GROUP_OF,
    MODELS,
    OPERATE,
    ROLL_BACK,
    ROTATE_SIGNER,
)
from shoal.errors import InvalidArgument

ACT: Final = "act"
OUTCOME: Final = "outcome"
REFUSAL: Final = "refusal"
READ: Final = "read"
SIGN_IN: Final = "sign-in"
CHAIN: Final = "chain"

KINDS: Mapping[str, str] = {
    ACT: "an administrative act, before it is done",
    OUTCOME: "the end of an administrative act",
    REFUSAL: "calls that were refused",
    READ: "reads of payloads and results",
    SIGN_IN: "first calls of a key or token from an address",
    CHAIN: "begin or end of a chain",
}

MAX_CHARACTERS: Mapping[str, int] = {
    "kind": 16,
    "tenant": 256,
    "subject": 256,
    "key": 128,
    "role": 64,
    "address": 64,
    "rpc": 256,
    "target": 512,
    "reason": 512,
    "trace_id": 32,
    "origin": 128,
    "of": 128,
}
"""Longest texts of an event; longer ones are cut."""
_MAX_COUNT = 1 << 40

_READS = """
    GetArtifact StatArtifact PutArtifact
    ListJobRetention GetTenant ListTenants ListConnectors
    ListRetention ListUsage VerifyStore GetHistory
    StreamAudit VerifyAudit
    GetPolicy ListPolicies ListKeys
"""
READS = frozenset(_READS.split())
"""Methods of audited groups that change nothing. An upload alone changes nothing either: its registration does."""

AUDITED: frozenset[str] = frozenset(
    rpc
    for rpc, group in GROUP_OF.items()
    if group in (MODELS, CODE, OPERATE, ADMINISTER) and rpc.rpartition("/")[2] not in READS and "#" not in rpc
)
"""Paths of the RPCs that are acts: they change models, settings, keys or policy."""

AUDITED_AFTER: frozenset[str] = frozenset({"/shoal.coord.v1.CoordService/UndrainInstance"})
"""Acts that are done where the audit log cannot be written, as while all stores are drained; the outcome is written."""

_INGEST = "/shoal.ingest.v1.IngestService/"
_STORE = "/shoal.store.v1.StoreService/"
CONTENT_READS: frozenset[str] = frozenset(
    {
        _INGEST + "GetPayload",
        *(_STORE + name for name in ("GetResult", "QueryResults", "WatchResults", "StreamResults", "ExportResults")),
    }
)
"""Paths of the RPCs that return payloads and results. A policy says whose calls are written."""

# Fields that name what a request is about, by priority.
_TARGETS = ("model_name", "name", "model", "id", "job_id", "key_id", "tenant", "kept", "instance", "to", "source")


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One thing to audit. It holds names and ids, never a payload or a token. Empty texts are unknown."""

    kind: str
    tenant: str = ""
    subject: str = ""
    key: str = ""
    """Id of the key or token with which the caller came."""
    role: str = ""
    address: str = ""
    rpc: str = ""
    """Path of the RPC, `/package.Service/Method`."""
    target: str = ""
    """Model, job, tenant or key that the act is about; of an outcome, the key, signer or policy that was made."""
    code: int = 0
    """gRPC status code, for `outcome` and `refusal`."""
    reason: str = ""
    """Rule that decided, or message of the error; of an act on keys or policy, what it asks for."""
    count: int = 1
    """Equal events within one second that this one stands for."""
    trace_id: str = ""
    origin: str = ""
    """Instance that reports the event."""
    of: str = ""
    """For `outcome`: the id of the act's entry."""

    def checked(self) -> Event:
        """Return the event with texts cut to their bounds.

        Raises:
            InvalidArgument: the kind is unknown, or a number is out of range.
        """
        if self.kind not in KINDS or self.kind == CHAIN:
            raise InvalidArgument(f"kind: expected one of {', '.join(kind for kind in KINDS if kind != CHAIN)}")
        if not 0 <= self.code <= 16 or not 1 <= self.count <= _MAX_COUNT:
            raise InvalidArgument(f"code: expected 0 to 16, and count: 1 to {_MAX_COUNT}")
        texts = {name: _cut(getattr(self, name), most) for name, most in MAX_CHARACTERS.items()}
        return Event(**texts, code=self.code, count=self.count)


EVENT_FIELDS: Sequence[str] = tuple(field.name for field in fields(Event))


def target_of(request: Any) -> str:
    """Return the name of what a request is about, such as `digits`; empty when it has none."""
    known = request.DESCRIPTOR.fields_by_name if hasattr(request, "DESCRIPTOR") else {}
    for name in _TARGETS:
        if name in known:
            value = getattr(request, name)
            found = value if isinstance(value, str) else target_of(value)
            if found:
                return found
    return ""


def made_by(rpc: str, response: Any) -> str:
    """Return the id of the key or signer, or the version of the policy, that an act has made; empty for other acts."""
    if rpc == CREATE_KEY:
        return str(response.info.id)
    if rpc == ROTATE_SIGNER:
        return str(response.signer)
    return f"version {response.policy.version}" if rpc in (APPLY_POLICY, ROLL_BACK) else ""


def asked_for(rpc: str, request: Any) -> str:
    """Return in a few words what an act on keys or policy asks for, such as `forced`; empty for other acts."""
    if rpc == CREATE_KEY:
        named = {
            "role": request.role,
            "tenant": request.tenant,
            "subject": request.subject,
            "models": " ".join(request.models),
            "grants": " ".join(request.grants),
        }
        return ", ".join(f"{name} {value}" for name, value in named.items() if value)
    if rpc == ROTATE_SIGNER:
        return "stolen: the former keys end" if request.stolen else "the former keys stay valid"
    if rpc in (APPLY_POLICY, ROLL_BACK):
        back = f"back to version {request.version}" if rpc == ROLL_BACK else ""
        return ", ".join(filter(None, (back, "forced" if request.force else "")))
    return ""


def delivered(response: Any) -> int:
    """Return the number of payloads or results in a response; a part of an export counts as one."""
    known = response.DESCRIPTOR.fields_by_name
    if "results" in known:
        return len(response.results)
    return int("result" not in known or response.HasField("result"))


def _cut(text: str, most: int) -> str:
    # Neither lone surrogates nor NUL can be stored.
    plain = text.encode(errors="replace").decode().replace("\0", "?")
    return plain if len(plain) <= most else plain[: most - 1] + "…"
