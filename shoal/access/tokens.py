"""Keys: tokens that a signer of one's own signs, and the verification of tokens without a gateway.

A key is `shoal_` and a JWT (RFC 7519) signed with ES256. The prefix lets scanners find leaked keys. A key says who its
holder is; a policy says what the holder may do.
"""

from __future__ import annotations

import base64
import json
import os
import re
import secrets
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.access.policy import NAME_CHARS, TENANT_CHARS, Issuer, Policy, is_name
from shoal.errors import AlreadyExists, InvalidArgument, Unauthenticated

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

PREFIX = "shoal_"
ISSUER = "shoal"
AUDIENCE = "shoal"
_ALGORITHM = "ES256"
LIFE_S = 90 * 86_400
"""Life of a key, by default."""
_LONGEST_LIFE_S = 10 * 366 * 86_400


@dataclass(frozen=True)
class Signer:
    """A private key that signs keys. Its text form is JSON."""

    issuer: str
    kid: str
    private_key: EllipticCurvePrivateKey

    def as_text(self) -> str:
        """Return the text form: a secret."""
        from cryptography.hazmat.primitives import serialization

        pem = self.private_key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        document = {"issuer": self.issuer, "kid": self.kid, "private_key": pem.decode()}
        return json.dumps(document, indent=2)

    def public_jwk(self) -> dict[str, Any]:
        """Return the public key, as a JSON Web Key."""
        from jwt.algorithms import ECAlgorithm

        jwk: dict[str, Any] = ECAlgorithm.to_jwk(self.private_key.public_key(), as_dict=True)
        return {**jwk, "kid": self.kid, "alg": _ALGORITHM, "use": "sig"}

    def jwks(self) -> dict[str, Any]:
        """Return the JSON Web Key Set for a policy."""
        return {"keys": [self.public_jwk()]}


@dataclass(frozen=True)
class Key:
    """A new key."""

    id: str
    """Id under which the key is revoked."""
    text: str
    """The key itself: a secret."""
    expires_at: int
    """Unix time."""


def new_signer(issuer: str = ISSUER) -> Signer:
    """Return a new signer."""
    from cryptography.hazmat.primitives.asymmetric import ec

    return Signer(issuer, "k-" + secrets.token_hex(4), ec.generate_private_key(ec.SECP256R1()))


def create_signer(path: Path, issuer: str = ISSUER) -> Signer:
    """Make a signer, and write it to the new file `path`, which only its owner can read.

    Raises:
        AlreadyExists: the file exists.
        InvalidArgument: the file cannot be written.
    """
    signer = new_signer(issuer)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError as err:
        raise AlreadyExists(f"{path} exists already: give another file, or keep that signer") from err
    except OSError as err:
        raise InvalidArgument(f"cannot write {path}: {err.strerror}") from err
    with os.fdopen(descriptor, "w") as file:
        file.write(signer.as_text())
    return signer


def read_signer(path: Path) -> Signer:
    """Return the signer in a file.

    Raises:
        InvalidArgument: the file cannot be read, is no signer, or others than its owner can read it.
    """
    try:
        with path.open() as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & 0o077:
                raise InvalidArgument(f"{path} can be read by others (mode {mode:04o}): chmod 600 {path}")
            return signer_of(file.read(), str(path))
    except OSError as err:
        raise InvalidArgument(f"cannot read {path}: {err.strerror}: make a signer with `shoal keys init`") from err
    except UnicodeDecodeError:
        raise InvalidArgument(f"{path} is no signer: make one with `shoal keys init`") from None


def signer_of(text: str, source: str) -> Signer:
    """Return the signer of a text form. Raises InvalidArgument, with `source` as the subject, for another text."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        document = json.loads(text)
        private = serialization.load_pem_private_key(document["private_key"].encode(), None)
        if not isinstance(private, ec.EllipticCurvePrivateKey):
            raise InvalidArgument(f"{source}: the private key is not for {_ALGORITHM}")
        return Signer(str(document["issuer"]), str(document["kid"]), private)
    # The cause could show the private key.
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InvalidArgument(f"{source} is no signer: make one with `shoal keys init`") from None


def create_key(
    signer: Signer,
    *,
    tenant: str,
    role: str,
    now: float,
    subject: str = "",
    models: Sequence[str] = ("*",),
    grants: Sequence[str] = (),
    life_s: int = LIFE_S,
) -> Key:
    """Return a new key. Its text is nowhere else: it cannot be shown again.

    Args:
        now: Unix time.
        subject: the holder's name. Empty: the id of the key.
        models: patterns of the models that the key is for.
        grants: names of grants with `by_name`.

    Raises:
        InvalidArgument: a name does not fit into a policy, or the life is not positive or too long.
    """
    import jwt

    if not 1 <= life_s <= _LONGEST_LIFE_S:
        raise InvalidArgument("a key lives 1 second to 10 years")
    if not models:
        raise InvalidArgument("models: name at least one pattern; '*': all models")
    for what, names, most in (
        ("tenant", [tenant], TENANT_CHARS),
        ("role", [role], NAME_CHARS),
        ("subject", [subject] if subject else [], NAME_CHARS),
        ("grant", grants, NAME_CHARS),
    ):
        for name in names:
            _check_name(what, name, most)
    for pattern in models:
        if not pattern or len(pattern) > 255 or any(char.isspace() or char == "," for char in pattern):
            raise InvalidArgument(f"models: {pattern!r} is no pattern: at most 255 characters, no spaces or commas")
    id = "k-" + secrets.token_hex(8)
    issued = int(now)
    claims = {
        "iss": signer.issuer,
        "aud": AUDIENCE,
        "jti": id,
        "sub": subject or id,
        "tenant": tenant,
        "role": role,
        "models": list(models),
        "grants": list(grants),
        "iat": issued,
        "exp": issued + life_s,
    }
    text = PREFIX + jwt.encode(claims, signer.private_key, _ALGORITHM, {"kid": signer.kid})
    return Key(id, text, issued + life_s)


def jose_header(kid: str) -> str:
    """Return the first part of the keys of a signer, as `create_key` writes it."""
    header = json.dumps({"alg": _ALGORITHM, "kid": kid, "typ": "JWT"}, separators=(",", ":"))
    return base64.urlsafe_b64encode(header.encode()).rstrip(b"=").decode()


def _check_name(what: str, name: str, most: int) -> None:
    if not is_name(name) or len(name) > most:
        raise InvalidArgument(
            f"{what}: {name!r}: at most {most} of letters, digits and . _ @ : / + -, a letter or digit first"
        )


def verified_claims(policy: Policy, text: str, now: float) -> Mapping[str, Any]:
    """Return the claims of a token or key that the policy's gateway would accept at the Unix time `now`.

    Raises:
        Unauthenticated: the gateway would refuse the token. The message says why, without the token.
    """
    import jwt

    token = re.sub(r"(?i)^bearer ", "", text.strip()).strip()
    prefix = PREFIX if token.startswith(PREFIX) else ""
    token = token.removeprefix(PREFIX)
    try:
        header = jwt.get_unverified_header(token)
        named = jwt.decode(token, options={"verify_signature": False}).get("iss")
    except jwt.PyJWTError:
        raise Unauthenticated("the token is no JWT") from None
    issuer = policy.issuer_of(named)
    if issuer is None or issuer.token_prefix != prefix:
        raise Unauthenticated(f"the policy has no issuer {named!r} of tokens with the prefix {prefix!r}")
    return _verified(issuer, token, header, now)


def _verified(issuer: Issuer, token: str, header: Mapping[str, Any], now: float) -> Mapping[str, Any]:
    import jwt

    keys = (issuer.jwks or {}).get("keys", ())
    key = next((key for key in keys if key["kid"] == header.get("kid") and key["alg"] == header.get("alg")), None)
    if key is None:
        raise Unauthenticated(f"the issuer {issuer.issuer} has no key for the token's kid and alg")
    try:
        claims: Mapping[str, Any] = jwt.decode(
            token,
            jwt.PyJWK(dict(key)).key,
            [key["alg"]],
            audience=list(issuer.audiences),
            options={"require": ["exp"], "verify_exp": False, "verify_nbf": False, "verify_iat": False},
        )
    except jwt.PyJWTError as err:
        raise Unauthenticated(f"the token is not valid: {err}") from None
    for name in ("exp", "nbf"):
        if name in claims and not isinstance(claims[name], int | float):
            raise Unauthenticated(f"the token is not valid: its claim {name!r} is no number")
    if now > claims["exp"] + issuer.clock_skew_s:
        raise Unauthenticated("the token has expired")
    if now < claims.get("nbf", 0) - issuer.clock_skew_s:
        raise Unauthenticated("the token is not valid yet")
    return claims
