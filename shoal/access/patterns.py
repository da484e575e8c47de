"""Patterns of names: `*` matches any characters, everything else itself. Matching takes linear time."""

from __future__ import annotations

from collections.abc import Iterable


def matches(pattern: str, name: str) -> bool:
    """Return True when `pattern` matches the whole of `name`. Each part is searched for once, from left to right."""
    if "*" not in pattern:
        return pattern == name
    first, *middle, last = pattern.split("*")
    if len(name) < len(first) + len(last) or not name.startswith(first) or not name.endswith(last):
        return False
    at, until = len(first), len(name) - len(last)
    for part in middle:
        found = name.find(part, at, until)
        if found < 0:
            return False
        at = found + len(part)
    return True


def matches_any(patterns: Iterable[str], name: str) -> bool:
    """Return True when one of `patterns` matches `name`."""
    return any(matches(pattern, name) for pattern in patterns)
