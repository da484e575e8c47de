"""Redaction of secrets in text: known ones by their value, others by their form."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from urllib.parse import quote

from shoal.node import admin

# Pages of the admin address have this text already.
REDACTED = admin.REDACTED
# Shorter values would redact ordinary words.
_SHORTEST = 8
_WORDS = (
    r"(?:password|passwd|passphrase|secret|token|credential|signature|sasl[_.-]jaas[_.-]config"
    r"|(?:private|api|access|account|shared|signing|encryption)[_.-]?key)"
)
_NAMES = rf"(?i:{_WORDS}[a-z0-9_-]{{0,64}})"
_BASE64 = r"[A-Za-z0-9+/=\s\\]"
# Repetitions have a bound where many places of a text may begin one: a log of 4 MiB takes seconds at most.
_FORMS = (
    # Keys of the cluster, and JSON Web Tokens.
    re.compile(r"\bshoal_eyJ[A-Za-z0-9_-]{8,1024}+(?:\.[A-Za-z0-9_-]+){1,2}"),
    re.compile(r"\beyJ[A-Za-z0-9_-]{8,1024}+\.[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]*)?"),
    # Keys of well-known services: AWS, GitHub, GitLab, Google, Hugging Face, OpenAI, Slack.
    re.compile(
        r"\b(?:(?:AKIA|ASIA)[A-Z0-9]{16}|gh[opsur]_[A-Za-z0-9]{20,255}|github_pat_\w{20,255}|glpat-[\w-]{16,255}"
        r"|AIza[\w-]{30,40}|ya29\.[\w-]{8,1024}|hf_[A-Za-z0-9]{20,255}|sk-[\w-]{20,255}|xox[abpors]-[\w-]{10,255})"
    ),
    re.compile(r"(?i)(?<=bearer )[^\s\"',]+"),
    re.compile(r"(?i)(?<=bearer%20)[^\s\"',]+"),
    re.compile(r"(?i)(?<=basic )[A-Za-z0-9+/=]{8,}"),
    # Private keys, also those whose end or begin was cut off.
    re.compile(
        rf"-----BEGIN [A-Z ]{{0,32}}PRIVATE KEY(?: BLOCK)?-----"
        rf"(?:.{{0,16384}}?-----END [A-Z ]{{0,32}}PRIVATE KEY(?: BLOCK)?-----|{_BASE64}{{0,16384}})",
        re.DOTALL,
    ),
    re.compile(rf"\A{_BASE64}{{1,16384}}-----END [A-Z ]{{0,32}}PRIVATE KEY(?: BLOCK)?-----"),
    # User and password of a URL, and its signature.
    re.compile(r"(?<=://)[^\s/@\"']{1,1024}(?=@)"),
    # The same without a scheme, as libraries log an address.
    re.compile(r"(?<![\w.+-])[\w.+-]{1,64}:(?P<bare>[^\s/@\"',]{1,256})(?=@[A-Za-z0-9\[])"),
    re.compile(r"(?i)(?<=[?&])(?:sig|key|auth|code)=(?P<parameter>[^\s&\"'\\]{1,4096})"),
    # Headers by their name, as lines and as fields of JSON.
    re.compile(
        r"(?i)\b(?:proxy-)?(?:authorization|cookie)\\{0,4}[\"']?\s{0,4}[:=]\s{0,4}\\{0,4}[\"']?(?P<header>[^\"'\\\r\n]+)"
    ),
    # Fields by their name: in JSON, in JSON that is text of JSON, in TOML, YAML, arguments and the environment.
    re.compile(
        rf"{_NAMES}(?:[\"']\s{{0,4}}[:=]\s{{0,4}}(?:\"(?P<json>(?:[^\"\\]|\\.)+)|'(?P<quoted>(?:[^'\\]|\\.)+))"
        r"|\\+[\"']\s{0,4}:\s{0,4}\\+[\"'](?P<nested>(?:[^\"'\\]|\\+(?![\"'\\]))+)"
        r"|\s{0,4}=\s{0,4}(?:\\*[\"'](?P<assigned>(?:[^\"'\\]|\\+(?![\"'\\]))+)|(?P<value>[^\s\",;\\]+))"
        r"|:\s{1,4}(?P<line>[^\s\",;\\]{6,})"
        r"|:(?P<header_line>[^\s\",;:/\\]{6,}))"
    ),
    re.compile(rf"--[A-Za-z-]{{0,32}}{_NAMES} (?P<argument>[^\s\"']+)"),
    # Headers for collectors, such as their keys.
    re.compile(r"(?m)(?<=_HEADERS=)[^\n]+"),
)
# Names of files, of settings and of kinds are no secrets.
_HARMLESS = re.compile(r"(?i)(_file|_prefix|_path|_source|_bytes|_ms|_name|_type)\\*[\"']?\s*[=:]")
_NAMED = re.compile(rf"(?i){_WORDS}")


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """Return `text` without the values of `secrets`, and without whatever has the form of a secret."""
    for secret in sorted({one.strip() for one in secrets}, key=len, reverse=True):
        if len(secret) >= _SHORTEST:
            # As it is, as text of JSON, and as a part of a URL.
            for written in {
                secret,
                json.dumps(secret)[1:-1],
                json.dumps(secret, ensure_ascii=False)[1:-1],
                quote(secret, ""),
            }:
                text = text.replace(written, REDACTED)
    for form in _FORMS:
        text = form.sub(_replaced, text)
    return text


def is_secret_name(name: str) -> bool:
    """Return True for the name of a field, header or variable whose value is a secret."""
    return _NAMED.search(name) is not None and not _HARMLESS.search(f"{name}=")


def without_headers(value: object) -> object:
    """Return a document of Envoy's configuration without the values of the headers that Envoy adds to requests."""
    if isinstance(value, dict):
        return {key: _valueless(each) if key in _HEADER_LISTS else without_headers(each) for key, each in value.items()}
    return [without_headers(each) for each in value] if isinstance(value, list) else value


_HEADER_LISTS = frozenset({"initial_metadata", "request_headers_to_add", "response_headers_to_add"})


def _valueless(value: object) -> object:
    if isinstance(value, dict):
        return {
            key: _valueless(each) if isinstance(each, dict | list) else REDACTED if key.endswith("value") else each
            for key, each in value.items()
        }
    return [_valueless(each) for each in value] if isinstance(value, list) else value


def _replaced(match: re.Match[str]) -> str:
    if match.lastgroup is None:
        return REDACTED
    if _HARMLESS.search(match[0]) or match[match.lastgroup].startswith(REDACTED):
        return match[0]
    start, end = (place - match.start() for place in match.span(match.lastgroup))
    return match[0][:start] + REDACTED + match[0][end:]
