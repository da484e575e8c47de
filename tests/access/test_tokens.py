"""Keys and their signer; the verification that `shoal policy explain` does."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import jwt
import pytest

from shoal.access import tokens
from shoal.access.decision import caller_of
from shoal.access.policy import Policy
from shoal.access.tokens import PREFIX, Signer
from shoal.errors import AlreadyExists, InvalidArgument, Unauthenticated
from tests.access.policies import claims_of, key, policy, signed


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    return tokens.create_signer(tmp_path_factory.mktemp("signer") / "signer.json")


@pytest.fixture(scope="module")
def trusted(signer: Signer) -> Policy:
    return policy(signer)


def refusal(trusted: Policy, text: str, now: float | None = None) -> str:
    with pytest.raises(Unauthenticated) as caught:
        tokens.verified_claims(trusted, text, time.time() if now is None else now)
    assert text not in caught.value.message
    return caught.value.message


def test_a_key_says_who_its_holder_is(signer: Signer, trusted: Policy) -> None:
    made = key(signer, "acme", "user", subject="ann", models=["ocr*", "det"], grants=["night"])
    caller = caller_of(trusted, tokens.verified_claims(trusted, made.text, time.time()))
    assert (caller.tenant, caller.role, caller.subject, caller.key) == ("acme", "user", "ann", made.id)
    assert (caller.models, caller.grants) == (("ocr*", "det"), {"night"})
    assert made.text.startswith("shoal_eyJ")
    assert made.expires_at == pytest.approx(time.time() + 90 * 86_400, abs=60)
    assert caller_of(trusted, tokens.verified_claims(trusted, f"Bearer {made.text}\n", time.time())) == caller


def test_the_first_part_of_a_key_is_known(signer: Signer) -> None:
    assert key(signer).text.split(".")[0] == tokens.PREFIX + tokens.jose_header(signer.kid)


@pytest.mark.parametrize("claim", ["exp", "nbf"])
def test_times_that_are_no_numbers_are_refused(signer: Signer, trusted: Policy, claim: str) -> None:
    assert f"its claim '{claim}' is no number" in refusal(trusted, signed(signer, **{claim: "tomorrow"}))


def test_the_signer_is_a_secret_of_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "signer.json"
    made = tokens.create_signer(path, "mine")
    assert path.stat().st_mode & 0o777 == 0o600
    read = tokens.read_signer(path)
    assert (read.issuer, read.kid, read.jwks()) == ("mine", made.kid, made.jwks())
    assert "d" not in made.public_jwk()
    with pytest.raises(AlreadyExists):
        tokens.create_signer(path)
    path.chmod(0o640)
    with pytest.raises(InvalidArgument, match="can be read by others"):
        tokens.read_signer(path)


def test_a_file_that_is_no_signer_is_refused_without_its_content(tmp_path: Path) -> None:
    path = tmp_path / "signer.json"
    with pytest.raises(InvalidArgument, match="shoal keys init"):
        tokens.read_signer(path)
    for text in ("", "[]", '{"private_key": "c2VjcmV0"}', json.dumps({"private_key": "-----BEGIN c2VjcmV0"})):
        path.write_text(text)
        path.chmod(0o600)
        with pytest.raises(InvalidArgument, match="is no signer") as caught:
            tokens.read_signer(path)
        assert "c2VjcmV0" not in caught.value.message


@pytest.mark.parametrize(
    "options",
    [
        {"tenant": "a b"},
        {"tenant": ""},
        {"tenant": "a\r\nx-shoal-role: admin"},
        {"role": "*"},
        {"subject": "\n"},
        {"grants": ["a,b"]},
        {"models": []},
        {"models": ["a b"]},
        {"models": ["x" * 256]},
        {"life_s": 0},
        {"life_s": 10**10},
    ],
)
def test_a_key_that_no_policy_could_name_is_not_made(signer: Signer, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        key(signer, **options)


def test_invalid_tokens_are_refused_with_a_cause(signer: Signer, trusted: Policy, tmp_path: Path) -> None:
    now = time.time()
    other = tokens.create_signer(tmp_path / "other.json")
    good = key(signer).text
    assert "expired" in refusal(trusted, good, now + 91 * 86_400)
    assert "not valid yet" in refusal(trusted, signed(signer, nbf=now + 600))
    assert "Audience" in refusal(trusted, signed(signer, aud="other"))
    assert "no issuer" in refusal(trusted, signed(signer, iss="other"))
    assert "no issuer" in refusal(trusted, good.removeprefix(PREFIX))
    assert "exp" in refusal(trusted, signed(signer, exp=None))
    assert "no key for the token's kid" in refusal(trusted, key(other).text)
    assert "Signature" in refusal(trusted, signed(Signer("shoal", signer.kid, other.private_key)))
    assert "no key for the token's kid" in refusal(trusted, signed(signer, kid=None))
    assert "no JWT" in refusal(trusted, "shoal_x.y")
    unsigned = PREFIX + jwt.encode(claims_of(key(signer)), None, "none", {"kid": signer.kid})
    assert "no key for the token's kid" in refusal(trusted, unsigned)
