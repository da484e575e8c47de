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
# A model's code is not the operator's: it gets variables by an allow-list, and none with the server's secrets (database
# addresses with passwords, cloud credentials, tokens). docs/python-models.md has the same list.
_ALLOWED = frozenset(
    {
        *("PATH", "HOME", "LANG", "LANGUAGE", "TMPDIR", "TZ", "LD_LIBRARY_PATH"),
        # Numbers of threads.
        *("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS", "NUMEXPR_NUM_THREADS"),
        *("NUMEXPR_MAX_THREADS", "VECLIB_MAXIMUM_THREADS", "RAYON_NUM_THREADS", "TOKENIZERS_PARALLELISM"),
        # The backend of `kernels`, and the launcher's pid, by which an operator finds a server's processes.
        *("KERNELS_BACKEND", "SHOAL_PARENT_PID"),
    }
)
# SHOAL_MODEL_ is the operator's own way to pass values on. OMP_ to NUMBA_ tune threads; CUDA_ to MIOPEN_ choose GPUs.
_ALLOWED_PREFIXES = (
    *("LC_", "PYTHON", "SHOAL_MODEL_", "OMP_", "KMP_", "GOMP_", "MKL_", "NUMBA_"),
    *("CUDA_", "NVIDIA_", "NCCL_", "CUPY_", "ROCM_", "ROCR_", "HIP_", "HSA_", "MIOPEN_"),
)
# PYTHONHOME may be of another Python than the child's. The others are for a person's own sessions.
_DROPPED = ("PYTHONHOME", "PYTHONSTARTUP", "PYTHONINSPECT")


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
    """Return the environment of a model process: the allowed variables, and the server's packages in PYTHONPATH."""
    kept = {key: value for key, value in environ.items() if _is_allowed(key)}
    packages = [str(Path(entry).absolute()) for entry in sys.path if entry and os.path.exists(entry)]
    ours = str(Path(__file__).resolve().parents[3])
    kept["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([ours, *packages]))
    kept["PYTHONUNBUFFERED"] = "1"
    # A model's folder may be in the server's model cache, whose files must not change.
    kept["PYTHONDONTWRITEBYTECODE"] = "1"
    return kept


def _is_allowed(key: str) -> bool:
    return (key in _ALLOWED or key.startswith(_ALLOWED_PREFIXES)) and key not in _DROPPED
