"""Secrets of the connector file, which refers to environment variables or files instead of containing them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

_ENV, _FILE = "env:", "file:"


def resolve_secret(value: str, environ: Mapping[str, str] = os.environ) -> str:
    """Return `value`, or for `env:NAME` the variable's value, for `file:PATH` the file's text without its last newline.

    Raises:
        ValueError: the variable is not set, or the file cannot be read.
    """
    if value.startswith(_ENV):
        name = value.removeprefix(_ENV)
        if name not in environ:
            raise ValueError(f"{value}: this variable is not set where ingest runs")
        return environ[name]
    if value.startswith(_FILE):
        try:
            return Path(value.removeprefix(_FILE)).read_text().removesuffix("\n")
        except (OSError, UnicodeDecodeError) as err:
            raise ValueError(f"{value}: cannot be read: {err}") from None
    return value
