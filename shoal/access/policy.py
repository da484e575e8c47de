"""The policy document: issuers, roles, grants, limits, objectives, host names, web pages and revoked keys. Nothing is
allowed by default.

    version: 1
    issuers:
      - {issuer: shoal, audiences: [shoal], token_prefix: shoal_, jwks_file: keys.jwks.json}
    grants:
      - {name: roles, models: ["*"]}                     # every caller: the groups of its role
      - {name: no-secrets, tenants: [acme], deny: [infer], models: ["secret*"]}

A document is read whole, and each error names its line. Its size, and the time to match its patterns, are bounded.
"""

from __future__ import annotations

import json
import re
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from shoal.access.rpc_groups import ADMINISTER, GRANTABLE, HEALTH, INFER, JOBS, MODELS, OPERATE, READ
from shoal.errors import InvalidArgument

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicNumbers

ANY = "*"
"""In a list of names or groups: all of them. In a list of models: the pattern that matches every name."""

BYTES = 1 << 20
"""Size of a document, and of a file of keys: parsing takes most of a second."""
GRANTS = 1_000
"""Grants of a document. A decision that is not cached evaluates each that applies to the caller."""
NAMES = 1_000
"""Names or patterns in one list of a grant."""
REVOKED = 10_000
"""Revoked keys. Envoy takes their list in a tenth of a second."""
LIMITS = 100
"""Limits of a document. A call is counted in each that applies to its caller."""
OBJECTIVES, OBJECTIVE_MODELS = 32, 16
"""Objectives of a document, and patterns of one. infer matches all with each of its models, which may be 500."""
ISSUERS = 16
KEYS = 8
"""Public keys of one issuer. A token without the id of its key is tried with each, at 0.1 ms."""

BUILTIN_ROLES: Mapping[str, tuple[str, ...]] = {
    "viewer": (HEALTH, READ),
    "user": (HEALTH, READ, INFER, JOBS),
    "publisher": (HEALTH, READ, INFER, MODELS),
    "operator": (HEALTH, READ, OPERATE),
    "admin": (HEALTH, READ, INFER, JOBS, MODELS, OPERATE, ADMINISTER),
}
"""Groups of the roles that every policy has. No role has `code`: a grant must name it."""

TENANT_CHARS = 64
"""Longest name of a tenant."""
NAME_CHARS = 128
"""Longest name of a role, a grant or a subject of a key."""
_NAME = rf"^[A-Za-z0-9][A-Za-z0-9._@:/+-]{{0,{NAME_CHARS - 1}}}$"
Name = Annotated[str, Field(pattern=_NAME)]
NameOrAny = Annotated[str, Field(pattern=r"^(\*|[A-Za-z0-9][A-Za-z0-9._@:/+|-]*)$", max_length=255)]
Pattern = Annotated[str, Field(min_length=1, max_length=255)]
Names = Annotated[tuple[NameOrAny, ...], Field(min_length=1, max_length=NAMES)]


def _checked_tenant(text: str, info: ValidationInfo) -> str:
    # Policies that were applied stay valid.
    if info.context and len(text) > TENANT_CHARS:
        raise ValueError(f"a tenant has at most {TENANT_CHARS} characters, not {len(text)}: give it a shorter name")
    return text


Tenant = Annotated[Name, AfterValidator(_checked_tenant)]
Tenants = Annotated[
    tuple[Annotated[NameOrAny, AfterValidator(_checked_tenant)], ...], Field(min_length=1, max_length=NAMES)
]
Group = Literal["health", "read", "infer", "jobs", "models", "code", "operate", "administer"]
GroupOrAny = Literal["*", "health", "read", "infer", "jobs", "models", "code", "operate", "administer"]
Host = Annotated[
    str, Field(pattern=r"^(\*|(\*\.)?[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9a-fA-F:]+\])$", max_length=253)
]
Origin = Annotated[
    str, Field(pattern=r"^https?://([a-z0-9]([a-z0-9.-]*[a-z0-9])?|\[[0-9a-f:]+\])(:[1-9][0-9]{0,4})?$", max_length=255)
]


def _checked_path(text: str, info: ValidationInfo) -> str:
    # Envoy reads every dot as a step, and has no other way to name a claim. Policies that were applied stay valid.
    if info.context and "." in text and re.search("[:/]", text):
        raise ValueError(
            f"{text!r}: a claim with a dot in its name cannot be read: `a.b` is the claim b within the object a; have "
            "the issuer send the value in a claim without a dot, too"
        )
    return text


ClaimPath = Annotated[str, Field(pattern=r"^[^\s.]+(\.[^\s.]+)*$", max_length=255), AfterValidator(_checked_path)]
KEY_ID = r"^[!-~]{1,255}$"
"""Ids of keys and tokens: another one could not be revoked."""

assert set(GRANTABLE) == set(Group.__args__)  # type: ignore[attr-defined]

# Asymmetric algorithms that Envoy and PyJWT verify, by the type of the key. A symmetric key would be a secret here.
_ALGORITHMS = {
    "EC": {"P-256": "ES256", "P-384": "ES384", "P-521": "ES512"},
    "OKP": {"Ed25519": "EdDSA"},
}
_RSA = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
# Base64 characters of a modulus of 2,048 bits.
_RSA_CHARACTERS = 342
_LEAST_RSA_BITS = 2_048
# Limits of BoringSSL.
_RSA_BITS, _EXPONENT_BITS = 16_384, 33
_NUMBERS = frozenset({"x", "y", "n", "e"})
VERIFYING_FIELDS = ("kid", "kty", "alg", "crv", *sorted(_NUMBERS))
"""Fields of a key that a gateway needs; Envoy refuses a whole set for values of others."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Claims(_Part):
    """Claims of a token that describe its caller. `a.b` is the claim b within the object a."""

    tenant: ClaimPath | None = "tenant"
    subject: ClaimPath | None = "sub"
    role: ClaimPath | None = "role"
    """One plain role. A list is no role."""
    key: ClaimPath | None = "jti"
    """Id of the key, under which it is revoked."""
    models: ClaimPath | None = None
    """Patterns of models: a list, or one text with spaces between. When set, a token without the claim is for no model.
    Unset: tokens are not limited to models."""
    grants: ClaimPath | None = None
    """Names of grants with `by_name`, in the same form."""


KEY_CLAIMS = Claims(models="models", grants="grants")
"""Claims of the keys that `shoal keys create` makes."""


class Issuer(_Part):
    """An issuer of tokens, with its public keys."""

    issuer: Annotated[str, Field(pattern=r"^[!-~]+$", max_length=255)]
    """The claim `iss`."""
    audiences: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=255)], ...], Field(min_length=1, max_length=16)
    ]
    """A token is for one of them (claim `aud`)."""
    jwks: dict[str, Any] | None = None
    """Public keys, as a JSON Web Key Set."""
    jwks_file: Path | None = None
    """File with the set instead, relative to the policy."""
    jwks_url: Annotated[str | None, Field(max_length=1024)] = None
    """Address of the set instead: a node fetches it, and again every minute."""
    discovery: bool = False
    """The address is in the issuer's OpenID Connect document, `ISSUER/.well-known/openid-configuration`."""
    cluster: bool = False
    """The keys are those that a cluster signs: `shoal keys create` at one of its nodes."""
    clock_skew_s: Annotated[int, Field(ge=0, le=300)] = 30
    """Difference between the clocks of issuer and server, in seconds."""
    token_prefix: Literal["", "shoal_"] = ""
    """Prefix of the issuer's tokens after `Bearer `. `shoal_`: keys that `shoal keys create` made."""
    tenant: Tenant | None = None
    """Tenant of every caller of this issuer, instead of a claim."""
    role: Name | None = None
    """Role of every caller of this issuer, instead of a claim."""
    claims: Claims | None = None
    """Claims of foreign tokens. The claims of Shoal's own keys are fixed."""

    @property
    def claim_names(self) -> Claims:
        """Claims that describe the caller."""
        return KEY_CLAIMS if self.token_prefix else self.claims or Claims()

    @property
    def is_fetched(self) -> bool:
        """True when a node fetches the keys."""
        return self.jwks_url is not None or self.discovery

    @field_validator("jwks_url")
    @classmethod
    def _is_safe(cls, url: str | None) -> str | None:
        if url is not None:
            check_url(url)
        return url

    @field_validator("jwks")
    @classmethod
    def _public_keys(cls, jwks: dict[str, Any] | None) -> dict[str, Any] | None:
        if jwks is not None:
            check_jwks(jwks)
        return jwks

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        sources = (self.jwks is not None, self.jwks_file is not None, self.jwks_url is not None)
        if [*sources, self.discovery, self.cluster].count(True) != 1:
            raise ValueError(
                "give the public keys in one of jwks and jwks_file; on a node also jwks_url, discovery: true, or "
                "cluster: true for its own keys"
            )
        if self.discovery:
            check_url(self.issuer)
        if self.is_fetched and self.token_prefix:
            raise ValueError("keys that are fetched are for foreign tokens: leave out token_prefix")
        if self.cluster and (self.issuer, self.audiences, self.token_prefix) != ("shoal", ("shoal",), "shoal_"):
            raise ValueError("cluster: true needs issuer: shoal, audiences: [shoal] and token_prefix: shoal_")
        if self.token_prefix and self.claims is not None:
            raise ValueError("claims is only for foreign tokens: leave it out beside token_prefix")
        if self.tenant is None and self.claim_names.tenant is None:
            raise ValueError("tenant is missing: give a tenant, or the claim that names it in claims.tenant")
        return self


class Grant(_Part):
    """One rule: a caller in all of `tenants`, `roles` and `subjects` may, or with `deny` may not, call `groups`."""

    name: Name
    tenants: Tenants = (ANY,)
    roles: Names = (ANY,)
    subjects: Names = (ANY,)
    by_name: bool = False
    """True: the grant is only for keys that list its name."""
    allow: tuple[GroupOrAny, ...] | None = None
    """Groups of RPCs. Unset, without `deny`: the groups of the caller's role."""
    deny: Annotated[tuple[GroupOrAny, ...], Field(min_length=1)] | None = None
    """Groups that are refused, whatever other grants allow."""
    models: Annotated[tuple[Pattern, ...], Field(min_length=1, max_length=NAMES)]
    """Patterns of the models' names; `*` matches any characters."""

    @model_validator(mode="after")
    def _one_effect(self) -> Self:
        if self.allow is not None and self.deny is not None:
            raise ValueError("a grant either allows or denies: make two of it")
        return self


# A share of the largest rate of requests still fits into the 32 bits of Envoy's token buckets, which count thousandths.
_Requests = Annotated[float, Field(ge=0.001, le=1e6, allow_inf_nan=False)]
_Rate = Annotated[float, Field(ge=0.001, le=1e12, allow_inf_nan=False)]
_BurstRequests = Annotated[int, Field(ge=1, le=1_000_000)]
_Burst = Annotated[int, Field(ge=1, le=1_000_000_000_000)]


class Limit(_Part):
    """One limit: callers in all of `tenants`, `roles` and `subjects` get at most the given numbers, and each tenant,
    key or model (`per`) has numbers of its own."""

    name: Name
    tenants: Tenants = (ANY,)
    except_tenants: Annotated[tuple[Tenant, ...], Field(max_length=NAMES)] = ()
    """Tenants of `tenants` for which the limit does not hold."""
    roles: Names = (ANY,)
    subjects: Names = (ANY,)
    models: Annotated[tuple[Pattern, ...], Field(min_length=1, max_length=NAMES)] = (ANY,)
    """Patterns of the models' names: only calls of these models count."""
    per: Literal["tenant", "key", "model"] = "tenant"
    """Unit that has the numbers for itself. With `model`, all callers of the limit share those of a model."""
    requests_per_second: _Requests | None = None
    burst_requests: _BurstRequests | None = None
    """Requests at once after a pause. Unset: those of one second, at least one."""
    requests_in_flight: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    bytes_per_second: _Rate | None = None
    """Bytes of requests."""
    burst_bytes: _Burst | None = None
    """Bytes at once after a pause. Unset: those of one second."""
    rows_per_second: _Rate | None = None
    burst_rows: _Burst | None = None
    """Rows at once after a pause. Unset: those of one second, at least one."""
    unrenewed: Literal["keep", "deny", "open"] = "keep"
    """For a gateway or service whose share coord does not renew: keep the last share, deny all, or no limit."""

    @model_validator(mode="after")
    def _has_numbers(self) -> Self:
        rates = {
            "requests_per_second": (self.requests_per_second, "burst_requests", self.burst_requests),
            "bytes_per_second": (self.bytes_per_second, "burst_bytes", self.burst_bytes),
            "rows_per_second": (self.rows_per_second, "burst_rows", self.burst_rows),
        }
        if self.requests_in_flight is None and all(rate is None for rate, _, _ in rates.values()):
            raise ValueError(f"a limit needs a number: {', '.join(rates)} or requests_in_flight")
        for name, (rate, burst_name, burst) in rates.items():
            if rate is None and burst is not None:
                raise ValueError(f"{burst_name} is only with {name}")
        return self


# Below a half, more requests may miss an objective than meet it.
_Percent = Annotated[float, Field(ge=50, lt=100, allow_inf_nan=False)]


class Objective(_Part):
    """One service level objective of models, in 30 days. Alerts go by it; it refuses no call, and shapes no batch."""

    name: Name
    models: Annotated[tuple[Pattern, ...], Field(min_length=1, max_length=OBJECTIVE_MODELS)] = (ANY,)
    """Patterns of the models' names. Of several objectives for a model, the first that states a number decides it."""
    availability_percent: _Percent | None = None
    """Requests that must succeed. Nothing stated for a model: 99.9."""
    latency_ms: Annotated[float, Field(gt=0, le=3_600_000, allow_inf_nan=False)] | None = None
    """Latency goal, in place of a model's own `slo_ms`."""
    latency_percent: _Percent | None = None
    """Successful requests that must meet the latency goal. Nothing stated for a model: 99."""

    @model_validator(mode="after")
    def _has_numbers(self) -> Self:
        if self.availability_percent is None and self.latency_ms is None and self.latency_percent is None:
            raise ValueError("an objective needs a number: availability_percent, latency_ms or latency_percent")
        return self


class Cors(_Part):
    """Web pages that may call. Without it, no page may."""

    origins: Annotated[tuple[Origin, ...], Field(max_length=100)] = ()
    """Origins of pages as browsers send them: scheme and host in lower case, and a port that is not the scheme's own.
    No path, and no `*`."""

    @field_validator("origins")
    @classmethod
    def _as_browsers_send_them(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        _check_distinct([*origins], "origin")
        for origin in origins:
            if re.fullmatch(r"http://.*:80|https://.*:443", origin):
                raise ValueError(f"{origin}: browsers leave the port out: use {origin.rpartition(':')[0]}")
        return origins


class Audit(_Part):
    """Calls in the audit log of a node beside acts and refusals."""

    reads: Annotated[tuple[Annotated[NameOrAny, AfterValidator(_checked_tenant)], ...], Field(max_length=NAMES)] = ()
    """Tenants whose reads of payloads and results are written; `*`: all."""

    def is_of(self, tenant: str) -> bool:
        """Return True when the reads of a tenant are written."""
        return ANY in self.reads or tenant in self.reads


class Policy(_Part):
    """A policy of access. Every call that it does not allow is refused."""

    version: Literal[1]
    issuers: Annotated[tuple[Issuer, ...], Field(min_length=1, max_length=ISSUERS)]
    roles: Annotated[dict[Name, tuple[Group, ...]], Field(max_length=100)] = {}
    """Further roles, as names of groups; a built-in role may be given other groups."""
    grants: Annotated[tuple[Grant, ...], Field(max_length=GRANTS)] = ()
    limits: Annotated[tuple[Limit, ...], Field(max_length=LIMITS)] = ()
    """Several may apply to a caller: each holds."""
    objectives: Annotated[tuple[Objective, ...], Field(max_length=OBJECTIVES)] = ()
    hosts: Annotated[tuple[Host, ...], Field(min_length=1, max_length=100)] = (ANY,)
    """Names by which clients reach the server, without ports; `*.` may begin one. Other names are refused."""
    cors: Cors = Cors()
    audit: Audit = Audit()
    open: tuple[Literal["health"], ...] = ()
    """Groups that need no token."""
    revoked: Annotated[tuple[Annotated[str, Field(pattern=KEY_ID)], ...], Field(max_length=REVOKED)] = ()
    """Ids of revoked keys."""

    @field_validator("issuers")
    @classmethod
    def _distinct_issuers(cls, issuers: tuple[Issuer, ...]) -> tuple[Issuer, ...]:
        _check_distinct([issuer.issuer for issuer in issuers], "issuer")
        # Each signer of a cluster is an issuer of its own, with such a name.
        for own in (issuer.issuer for issuer in issuers if issuer.cluster):
            for other in issuers:
                if other.issuer.startswith(f"{own}:"):
                    raise ValueError(f"issuer '{other.issuer}': names that begin with '{own}:' are the cluster's own")
        return issuers

    @field_validator("grants")
    @classmethod
    def _distinct_grants(cls, grants: tuple[Grant, ...]) -> tuple[Grant, ...]:
        _check_distinct([grant.name for grant in grants], "grant")
        return grants

    @field_validator("limits")
    @classmethod
    def _distinct_limits(cls, limits: tuple[Limit, ...]) -> tuple[Limit, ...]:
        _check_distinct([limit.name for limit in limits], "limit")
        return limits

    @field_validator("objectives")
    @classmethod
    def _distinct_objectives(cls, objectives: tuple[Objective, ...]) -> tuple[Objective, ...]:
        _check_distinct([objective.name for objective in objectives], "objective")
        return objectives

    @field_validator("hosts")
    @classmethod
    def _distinct_hosts(cls, hosts: tuple[Host, ...]) -> tuple[Host, ...]:
        _check_distinct([host.lower() for host in hosts], "host")
        return hosts

    @model_validator(mode="after")
    def _known_roles(self) -> Self:
        known = {*BUILTIN_ROLES, *self.roles}
        named = [(f"grant {grant.name!r}", grant.roles) for grant in self.grants]
        named += [(f"limit {limit.name!r}", limit.roles) for limit in self.limits]
        for part, roles in named:
            for role in roles:
                if role != ANY and role not in known:
                    raise ValueError(f"{part}: no role {role!r}: there are {', '.join(sorted(known))}")
        return self

    @cached_property
    def revoked_ids(self) -> frozenset[str]:
        return frozenset(self.revoked)

    def groups_of(self, role: str) -> tuple[str, ...]:
        """Return the groups of a role; none for an unknown one."""
        return self.roles[role] if role in self.roles else BUILTIN_ROLES.get(role, ())

    def issuer_of(self, name: object) -> Issuer | None:
        """Return the issuer that tokens name `name`."""
        return next((issuer for issuer in self.issuers if issuer.issuer == name), None)


def check_url(url: str) -> None:
    """Raise ValueError for an address from which keys must not be fetched: they would not be protected on the way."""
    try:
        parts = urllib.parse.urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError as err:
        raise ValueError(f"{url!r} is no address: {err}") from None
    if not host or parts.username or parts.fragment or not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError(f"{url!r}: expected https://HOST/PATH")
    is_here = host == "localhost" or host == "::1" or re.fullmatch(r"127(\.\d{1,3}){3}", host) is not None
    if parts.scheme != "https" and not (parts.scheme == "http" and is_here):
        raise ValueError(f"{url!r}: keys are fetched by https only (http from this machine alone)")


def is_name(text: str) -> bool:
    """Return True when `text` can be the name of a role or a grant."""
    return re.match(_NAME, text) is not None and not text.endswith("\n")


def is_tenant(text: str) -> bool:
    """Return True when `text` can be the name of a tenant."""
    return is_name(text) and len(text) <= TENANT_CHARS


def _check_distinct(names: list[str], what: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"the {what} {name!r} occurs twice")
        seen.add(name)


def check_jwks(jwks: object) -> None:
    """Raise ValueError when `jwks` is no set of public keys with ids, of the algorithms that a gateway verifies."""
    keys = jwks.get("keys") if isinstance(jwks, dict) else None
    if not isinstance(keys, list) or not 1 <= len(keys) <= KEYS:
        raise ValueError(f"expected a JSON Web Key Set with 1 to {KEYS} keys in 'keys'")
    try:
        json.dumps(jwks, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, TypeError) as err:
        raise ValueError(f"a value of the JSON Web Key Set is no JSON ({err}): export the set again") from err
    ids = []
    for at, key in enumerate(keys):
        what = f"keys[{at}]"
        if not isinstance(key, dict) or not isinstance(key.get("kid"), str) or not key["kid"]:
            raise ValueError(f"{what}: expected an object with a 'kid'")
        what += f" ({key['kid']!r})"
        if "d" in key or "k" in key:
            raise ValueError(f"{what}: this is a secret key: give the public key only, and replace the key")
        if not key.get("alg"):
            raise ValueError(f"{what}: 'alg' is missing: name the algorithm, such as ES256")
        if key["alg"] not in _algorithms(key):
            raise ValueError(f"{what}: kty {key.get('kty')!r} with alg {key['alg']!r} is not supported: use ES256")
        ids.append(key["kid"])
    _check_distinct(ids, "kid")


def _algorithms(key: Mapping[str, Any]) -> tuple[str, ...]:
    if key.get("kty") == "RSA":
        return _RSA if len(str(key.get("n", ""))) >= _RSA_CHARACTERS else ()
    algorithm = _ALGORITHMS.get(str(key.get("kty")), {}).get(str(key.get("crv")))
    return () if algorithm is None else (algorithm,)


def load(path: Path, *, is_cluster: bool = False) -> Policy:
    """Read a policy and the files of keys that it names. The keys are in the result, not the names of files.

    With `is_cluster`, issuers may have the keys of a cluster.

    Raises:
        InvalidArgument: a file cannot be read, or is no valid policy. The message names file, line and remedy.
    """
    policy = parse(_read(path), str(path))
    for issuer in policy.issuers:
        if (issuer.cluster or issuer.is_fetched) and not is_cluster:
            what = "cluster" if issuer.cluster else "discovery" if issuer.discovery else "jwks_url"
            raise InvalidArgument(
                f"{path}: issuer {issuer.issuer}: {what} is for the policy of a node (`shoal policy apply`): give "
                "jwks_file here"
            )
    if policy.audit.reads and not is_cluster:
        raise InvalidArgument(f"{path}: audit.reads is for the policy of a node: `shoal serve` has no audit log")
    return resolved(policy, lambda name: _read(path.parent / name), str(path))


def resolved(policy: Policy, read: Callable[[Path], str], source: str = "policy") -> Policy:
    """Return a policy with the keys of its issuers, where the document names files. `read` returns a file's content.

    Raises:
        InvalidArgument: a file cannot be read, or a key is not valid.
    """
    issuers = [_with_keys(issuer, read, source) for issuer in policy.issuers]
    for issuer in issuers:
        if issuer.jwks is not None:
            _check_numbers(issuer.jwks, f"{source}: issuer {issuer.issuer}")
    return policy.model_copy(update={"issuers": tuple(issuers)})


def read_files(path: Path) -> tuple[str, dict[str, str]]:
    """Return a policy's document and the files of keys that it names, by name. Raises as `load`."""
    document = _read(path)
    names = [issuer.jwks_file for issuer in parse(document, str(path)).issuers if issuer.jwks_file is not None]
    return document, {str(name): _read(path.parent / name) for name in names}


def files(policy: Path) -> list[Path]:
    """Return the files that make up a policy: the document, and the files of keys that it names. Raises as `load`."""
    named = [issuer.jwks_file for issuer in parse(_read(policy), str(policy)).issuers]
    return [policy, *(policy.parent / name for name in named if name is not None)]


def _with_keys(issuer: Issuer, read: Callable[[Path], str], source: str) -> Issuer:
    if issuer.jwks_file is None:
        return issuer
    text = read(issuer.jwks_file)
    try:
        jwks = json.loads(text)
        check_jwks(jwks)
    except (ValueError, RecursionError) as err:
        raise InvalidArgument(f"{Path(source).parent / issuer.jwks_file}: {err}") from err
    return issuer.model_copy(update={"jwks": jwks, "jwks_file": None})


def usable_keys(keys: Sequence[object]) -> tuple[list[Any], list[str]]:
    """Return the keys that a gateway can use, at most KEYS, and for each other one the reason why it is left out."""
    usable: dict[str, Any] = {}
    skipped = []
    for at, key in enumerate(keys):
        try:
            check_jwks({"keys": [key]})
            assert isinstance(key, dict)
            _check_numbers({"keys": [key]}, "keys[0]")
            if key["kid"] in usable:
                raise ValueError(f"keys[0] ({key['kid']!r}): an earlier key has the same 'kid'")
            if len(usable) == KEYS:
                raise ValueError(f"keys[0] ({key['kid']!r}): {KEYS} keys of an issuer are used")
            usable[key["kid"]] = key
        except (ValueError, InvalidArgument) as err:
            # Each key was checked as the only one of a set.
            skipped.append(str(err).replace("keys[0]", f"keys[{at}]", 1)[:200])
    return [*usable.values()], skipped


def _check_numbers(jwks: Mapping[str, Any], source: str) -> None:
    """Raise InvalidArgument for a key whose numbers are no key. Envoy would refuse the whole policy for it."""
    import jwt

    for key in jwks["keys"]:
        try:
            for name in _NUMBERS & set(key):
                if re.fullmatch(r"[A-Za-z0-9_-]+=*", key[name]) is None:
                    raise ValueError(f"{name} is not in base64url")
            numbers = jwt.PyJWK(key).key
            if key["kty"] == "RSA":
                _check_rsa(numbers.public_numbers())
        except (jwt.PyJWTError, ValueError, TypeError) as err:
            raise InvalidArgument(f"{source}: the key {key['kid']!r} is no key: {err}") from err


def _check_rsa(numbers: RSAPublicNumbers) -> None:
    """Raise ValueError for an RSA key that is too short, or that Envoy's BoringSSL refuses."""
    # Zeros before the modulus make a short one look long.
    if numbers.n.bit_length() < _LEAST_RSA_BITS:
        raise ValueError(f"n has {numbers.n.bit_length()} bits: use a key of {_LEAST_RSA_BITS} bits or more")
    if numbers.n.bit_length() > _RSA_BITS or numbers.n % 2 == 0:
        raise ValueError(f"n is even, or has more than {_RSA_BITS} bits")
    if numbers.e.bit_length() > _EXPONENT_BITS:
        raise ValueError(f"e has more than {_EXPONENT_BITS} bits: use 65537")


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(BYTES + 1)
    except OSError as err:
        raise InvalidArgument(f"cannot read {path}: {err.strerror}") from err
    if len(data) > BYTES:
        raise InvalidArgument(f"{path} has more than {BYTES} bytes: a policy may not be larger")
    try:
        return data.decode()
    except UnicodeDecodeError as err:
        raise InvalidArgument(f"{path}: byte {err.start} is no UTF-8") from err


def parse(text: str, source: str = "policy", *, is_new: bool = True) -> Policy:
    """Return the policy of a YAML document.

    Args:
        is_new: False: the document was applied before, and may have names that are refused today.

    Raises:
        InvalidArgument: each line of the message names one error: source, line, path in the document, and remedy.
    """
    import yaml

    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)
        root = loader.get_single_node()
        if root is None:
            raise InvalidArgument(f"{source}: the document is empty")
        _check_nodes(root, source)
        document = loader.construct_document(root)
    except yaml.MarkedYAMLError as err:
        line = err.problem_mark.line + 1 if err.problem_mark else 1
        raise InvalidArgument(f"{source}:{line}: not YAML: {err.problem}") from err
    except (yaml.YAMLError, ValueError, RecursionError) as err:
        raise InvalidArgument(f"{source}: not YAML: {err}") from err
    # The library's own errors for a value that its tag does not fit, such as `!!bool maybe`.
    except (AttributeError, LookupError, TypeError) as err:
        raise InvalidArgument(f"{source}: not YAML: a value does not fit its tag: leave out tags (!!...)") from err
    try:
        return Policy.model_validate(document, context={"is_new": True} if is_new else None)
    except ValidationError as err:
        raise InvalidArgument("\n".join(_lines(err, root, source))) from err


def _check_nodes(root: Any, source: str) -> None:
    """Raise InvalidArgument for an alias, which could make a small document large, and for a repeated key."""
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        node = waiting.pop()
        where = f"{source}:{node.start_mark.line + 1}"
        if id(node) in seen:
            raise InvalidArgument(f"{where}: anchors and aliases are not supported: write the value twice")
        seen.add(id(node))
        if node.id == "sequence":
            waiting += node.value
        elif node.id == "mapping":
            keys: set[str] = set()
            for key, value in node.value:
                if key.id != "scalar" or key.value in keys:
                    raise InvalidArgument(f"{source}:{key.start_mark.line + 1}: the key {key.value!r} occurs twice")
                keys.add(key.value)
                waiting.append(value)


# Errors that a message lists.
_LISTED = 20


def _lines(error: ValidationError, root: Any, source: str) -> list[str]:
    errors = error.errors(include_url=False)
    places = [item["loc"] for item in errors]
    found = []
    for item in errors[:_LISTED]:
        # A list is too short because its only items are wrong.
        if item["type"] == "too_short" and any(
            len(place) > len(item["loc"]) and place[: len(item["loc"])] == item["loc"] for place in places
        ):
            continue
        line, path = _place(root, item["loc"])
        message = "there is no such key" if item["type"] == "extra_forbidden" else item["msg"]
        found.append(f"{source}:{line}: {path or 'policy'}: {message.removeprefix('Value error, ')}")
    return found


def _place(root: Any, location: tuple[int | str, ...]) -> tuple[int, str]:
    """Return the line and the path of a location in the document; of its nearest parent when it is missing."""
    node, line, path = root, root.start_mark.line + 1, ""
    for step in location:
        child = None
        if node.id == "sequence" and isinstance(step, int) and step < len(node.value):
            child = node.value[step]
        elif node.id == "mapping":
            pairs = [(key, value) for key, value in node.value if key.value == str(step)]
            if pairs:
                child, line = pairs[0][1], pairs[0][0].start_mark.line + 1
        path += f"[{step}]" if isinstance(step, int) else ("." if path else "") + str(step)
        if child is None:
            break
        node = child
        if isinstance(step, int):
            line = node.start_mark.line + 1
    return line, path


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of the document, for editors."""
    schema = Policy.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return schema
