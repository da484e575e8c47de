"""A signer, policies and tokens for tests."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jwt
import yaml

from shoal.access import policy as policies
from shoal.access import tokens
from shoal.access.caller_header import CALLER_HEADER
from shoal.access.policy import Policy
from shoal.access.tokens import Key, Signer


def issuer(signer: Signer, **changes: Any) -> dict[str, Any]:
    """Return the issuer of a signer's keys, as a policy has it."""
    made = {"issuer": signer.issuer, "audiences": ["shoal"], "token_prefix": "shoal_", "jwks": signer.jwks()}
    return {**made, **changes}


def document(signer: Signer, **parts: Any) -> dict[str, Any]:
    """Return a policy in which every caller has the groups of its role, with `parts` replaced."""
    grants = [{"name": "roles", "models": ["*"]}]
    return {"version": 1, "issuers": [issuer(signer)], "grants": grants, **parts}


def policy(signer: Signer, **parts: Any) -> Policy:
    return policies.parse(yaml.safe_dump(document(signer, **parts)))


def key(signer: Signer, tenant: str = "acme", role: str = "user", **options: Any) -> Key:
    return tokens.create_key(signer, tenant=tenant, role=role, now=time.time(), **options)


def signed(signer: Signer, kid: str | None = "", **changes: Any) -> str:
    """Return a key with other claims (None removes one), or with another key id (None: without)."""
    claims = {**claims_of(key(signer)), **changes}
    claims = {name: value for name, value in claims.items() if value is not None}
    header = {} if kid is None else {"kid": kid or signer.kid}
    return tokens.PREFIX + jwt.encode(claims, signer.private_key, "ES256", header)


def claims_of(key: Key) -> dict[str, Any]:
    return dict(jwt.decode(key.text.removeprefix(tokens.PREFIX), options={"verify_signature": False}))


def passed(claims: Mapping[str, Any]) -> tuple[str, str]:
    """Return the header in which a gateway passes a token with `claims`."""
    return CALLER_HEADER, base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")


def write(path: Path, document: Mapping[str, Any]) -> None:
    """Replace a file as a whole, as an editor or a deployment does."""
    written = path.with_suffix(".written")
    written.write_text(yaml.safe_dump(document))
    written.replace(path)
