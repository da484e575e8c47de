"""Imports of frameworks and exporters, which are optional dependencies in extras of Shoal."""

from __future__ import annotations

import importlib
from importlib import metadata
from types import ModuleType

from shoal.errors import FailedPrecondition

TORCH, SKLEARN, XGBOOST, LIGHTGBM = "convert-torch", "convert-sklearn", "convert-xgboost", "convert-lightgbm"
COMPRESS = "compress"


def needed(module: str, extra: str, doing: str) -> ModuleType:
    """Import and return `module`.

    Raises:
        FailedPrecondition: the module, or one that it needs, is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as err:
        name = (err.name or module).partition(".")[0]
        raise FailedPrecondition(f"{doing} needs the package {name}: pip install 'shoal[{extra}]'") from err
    except Exception as err:
        # Binary-incompatible extension modules raise various errors.
        raise FailedPrecondition(f"{doing}: {module} is installed but cannot be imported: {err}") from err


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of those `packages` that are installed, by name."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def first_line(error: Exception) -> str:
    """Return a framework's error as one line of at most 300 characters; the full text may have pages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
