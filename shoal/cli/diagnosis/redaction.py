"""Redaction of secrets in text: known ones by their value, others by their form."""

from __future__ import annotations

import re
from collections.abc import Iterable

REDACTED = "[redacted]"
# Shorter values would redact ordinary words.
_SHORTEST = 8
_NAMES = (
    r"(?i)(?:password|passwd|secret|token|private[_-]key|api[_-]key|access[_-]key|credential)"
    r"[a-z0-9_]{0,64}"
)
# Repetitions have a bound where many places of a text may begin one: a log of 4 MiB takes seconds at most.
_FORMS = (
    # Keys of the cluster, and JSON Web Tokens.
    re.compile(r"\bshoal_eyJ[A-Za-z0-9_-]{8,1024}+(?:\.[A-Za-z0-9_-]+){1,2}"),
    re.compile(r"\beyJ[A-Za-z0-9_-]{8,1024}+\.[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]*)?"),
    re.compile(r"(?i)(?<=bearer )[^\s\"',]+"),
    re.compile(r"(?i)(?<=basic )[A-Za-z0-9+/=]{8,}"),
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.{0,16384}?-----END [A-Z ]*PRIVATE KEY-----", re.DOTALL),
    # The password of a URL.
    re.compile(r"(?<=://)[^\s/@\"':]{0,256}:[^\s/@\"']{1,1024}(?=@)"),
    # Fields by their name: in JSON, in JSON that is text of JSON, and in variables of the environment.
    re.compile(
        rf"{_NAMES}(?:\"\s*:\s*\"(?P<json>(?:[^\"\\]|\\.)+)"
        r"|\\+\"\s*:\s*\\+\"(?P<nested>[^\"\\]+)|=(?P<value>[^\s\",;]+))"
    ),
    # Headers for collectors, such as their keys.
    re.compile(r"(?m)(?<=_HEADERS=)[^\n]+"),
)
# Names of files, of settings and of kinds are no secrets.
_HARMLESS = re.compile(r"(?i)(_file|_prefix|_path|_source|_bytes|_ms|_name|_type)\\*(\"|=)")


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """Return `text` without the values of `secrets`, and without whatever has the form of a secret."""
    for secret in sorted({one.strip() for one in secrets}, key=len, reverse=True):
        if len(secret) >= _SHORTEST:
            text = text.replace(secret, REDACTED)
    for form in _FORMS:
        text = form.sub(_replaced, text)
    return text


def _replaced(match: re.Match[str]) -> str:
    if match.lastgroup is None:
        return REDACTED
    if _HARMLESS.search(match[0]) or match[match.lastgroup] == REDACTED:
        return match[0]
    return match[0][: match.start(match.lastgroup) - match.start()] + REDACTED
