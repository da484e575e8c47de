"""Which Python runs a model process, and with what environment.

The server may itself run inside another program that embeds Python: then `sys.executable` is that program, and to start
that again would be wrong. Ways that are tried, in order:

    SHOAL_PYTHON   ──>  sys.executable, sys._base_executable  ──>  bin/ of sys.prefix, sys.base_prefix  ──>  PATH
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from shoal.errors import FailedPrecondition

VARIABLE = "SHOAL_PYTHON"

_NAME = re.compile(r"python(3(\.\d+)?)?")
_DROPPED = ("LD_PRELOAD", "PYTHONHOME", "PYTHONSTARTUP", "PYTHONINSPECT")
# LD_PRELOAD: the library that an embedding program needs. PYTHONHOME: its Python's, which may not be the child's.


def interpreter(environ: Mapping[str, str]) -> str:
    """The path of a Python of our own version. Raises FailedPrecondition when there is none."""
    if said := environ.get(VARIABLE):
        if not os.access(said, os.X_OK) or os.path.isdir(said):
            raise FailedPrecondition(f"{VARIABLE} is '{said}', which cannot be run: give the path of a Python")
        return said
    for path in _candidates(environ):
        if path and _NAME.fullmatch(Path(path).name) and os.access(path, os.X_OK):
            return path
    raise FailedPrecondition(
        f"found no Python {_version()} to run Python models with: set {VARIABLE} to the path of one"
    )


def _candidates(environ: Mapping[str, str]) -> Iterator[str]:
    yield sys.executable
    yield getattr(sys, "_base_executable", "")
    for prefix in (sys.prefix, sys.base_prefix):
        for name in (f"python{_version()}", "python3", "python"):
            yield str(Path(prefix, "bin", name))
    # Another version could not import the compiled packages that it is to be shown: only our own is taken from PATH.
    yield shutil.which(f"python{_version()}", path=environ.get("PATH")) or ""


def _version() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What a model process gets to see: our environment, and our packages wherever its Python was found."""
    kept = {key: value for key, value in environ.items() if key not in _DROPPED}
    packages = [str(Path(entry).absolute()) for entry in sys.path if entry and os.path.exists(entry)]
    ours = str(Path(__file__).resolve().parents[3])
    kept["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([ours, *packages]))
    kept["PYTHONUNBUFFERED"] = "1"
    kept["PYTHONDONTWRITEBYTECODE"] = "1"  # A model's folder may be a cache of ours, whose files are what they are.
    return kept
