"""The Python interpreter that runs a model process, and the environment of that process.

Another program may embed the Python of the server. `sys.executable` is that program then, and must not be started
again. Candidates, in order:

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
# LD_PRELOAD names a library for the embedding program. PYTHONHOME may be of another Python than the child's.
_DROPPED = ("LD_PRELOAD", "PYTHONHOME", "PYTHONSTARTUP", "PYTHONINSPECT")


def find_interpreter(environ: Mapping[str, str]) -> str:
    """Return the path of a Python of the server's version. Raises FailedPrecondition when there is none."""
    if configured := environ.get(VARIABLE):
        if not os.access(configured, os.X_OK) or os.path.isdir(configured):
            raise FailedPrecondition(f"{VARIABLE} is '{configured}', which cannot be run: give the path of a Python")
        return configured
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
    # Another version cannot import the server's compiled packages, so PATH is searched for the server's version only.
    yield shutil.which(f"python{_version()}", path=environ.get("PATH")) or ""


def _version() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a model process: the server's own, with the server's packages in PYTHONPATH."""
    kept = {key: value for key, value in environ.items() if key not in _DROPPED}
    packages = [str(Path(entry).absolute()) for entry in sys.path if entry and os.path.exists(entry)]
    ours = str(Path(__file__).resolve().parents[3])
    kept["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([ours, *packages]))
    kept["PYTHONUNBUFFERED"] = "1"
    # A model's folder may be in the server's model cache, whose files must not change.
    kept["PYTHONDONTWRITEBYTECODE"] = "1"
    return kept
