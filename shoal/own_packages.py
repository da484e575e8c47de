"""Check that `kernels`, `mesh` and `services` are Shoal's own packages, before any of them is used.

These names are not Shoal's alone: another distribution, or a folder on PYTHONPATH, may have a package of the same name.
Python imports the first that it finds, and the failure would be an ImportError or AttributeError of some inner module.

The command line and each service process call `exit_when_foreign` first. The check finds three packages without
importing one and reads the start of each `__init__.py`: 0.3 ms.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("kernels", "mesh", "services")
MARK = b'__distribution__ = "shoal"'
"""A line of each own package's `__init__.py`: the place alone does not tell a package that was installed over ours."""

_ROOT = Path(__file__).resolve().parent.parent


def exit_when_foreign() -> None:
    """Exit with status 1 and an explanation when one of Shoal's packages is foreign or missing."""
    if text := problem():
        sys.exit(f"shoal: {text}")


def problem(packages: Sequence[str] = PACKAGES, root: Path = _ROOT) -> str:
    """Return what is wrong with the first foreign or missing package and what to do; empty when all are Shoal's.

    `root` is the folder that holds Shoal's own packages.
    """
    for name in packages:
        spec = find_spec(name)
        if not _is_own(spec):
            return _explained(name, spec, root / name)
    return ""


def _is_own(spec: ModuleSpec | None) -> bool:
    if spec is None or spec.origin is None or not spec.submodule_search_locations:
        return False
    try:
        return MARK in Path(spec.origin).read_bytes()
    except OSError:
        return False


def _explained(name: str, spec: ModuleSpec | None, own: Path) -> str:
    found = _place(spec)
    if found is None:
        return f"its package {name!r} is missing: there is no {own}. Install Shoal again (distribution shoal)."
    owner = _distribution(found)
    of_whom = f", of the distribution {owner}" if owner else ""
    if found.resolve() == own.resolve():
        first = f"uninstall {owner}" if owner else "remove it"
        return (
            f"another package {name!r} was installed over Shoal's own, at {found}{of_whom}. "
            f"Either {first} and install Shoal again (distribution shoal), "
            "or install Shoal in an environment of its own."
        )
    own_text = f"Shoal's own is at {own}" if own.is_dir() else f"Shoal's own is missing at {own}"
    if owner:
        remedy = f"uninstall {owner}"
    elif str(found.parent) in map(os.path.abspath, os.environ.get("PYTHONPATH", "").split(os.pathsep)):
        remedy = f"start with a PYTHONPATH without {found.parent}"
    else:
        remedy = f"rename {found} or remove it from Python's path"
    return (
        f"Python finds another package {name!r}, at {found}{of_whom}, before Shoal's. {own_text}. "
        f"Either {remedy}, or install Shoal in an environment of its own."
    )


def _place(spec: ModuleSpec | None) -> Path | None:
    """Return the package's folder, or the file of a plain module; None when nothing is found."""
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(os.path.abspath(next(iter(spec.submodule_search_locations))))
    return None if spec.origin is None else Path(os.path.abspath(spec.origin))


def _distribution(found: Path) -> str:
    """Return the name of the installed distribution, other than Shoal, that `found` belongs to; empty when none."""
    from importlib import metadata

    entry = f"{found.name}/__init__.py" if found.suffix != ".py" else found.name
    for each in metadata.distributions(path=[str(found.parent)]):
        if each.name != "shoal" and any(str(file) == entry for file in each.files or ()):
            return each.name
    return ""
