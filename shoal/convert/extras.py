"""Frameworks and exporters come with extras of Shoal: only who converts a format needs its packages."""

from __future__ import annotations

import importlib
from importlib import metadata
from types import ModuleType

from shoal.errors import FailedPrecondition

TORCH, SKLEARN, XGBOOST, LIGHTGBM = "convert-torch", "convert-sklearn", "convert-xgboost", "convert-lightgbm"
COMPRESS = "compress"


def needed(module: str, extra: str, doing: str) -> ModuleType:
    """Imports `module`.

    Raises:
        FailedPrecondition: it, or what it needs, is not installed; the message says which extra has it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as err:
        name = (err.name or module).partition(".")[0]
        raise FailedPrecondition(f"{doing} needs the package {name}: pip install 'shoal[{extra}]'") from err
    except Exception as err:  # Extensions that do not fit each other raise what they like.
        raise FailedPrecondition(f"{doing}: {module} is installed, and cannot be imported: {err}") from err


def versions(*packages: str) -> dict[str, str]:
    """Installed versions by package name; those that are not installed are left out."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def first_line(error: Exception) -> str:
    """What a framework raised, in a line of 300 characters at most: theirs may go on for pages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
