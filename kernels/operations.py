"""List of the operations that have several versions, and their compilation before the first request."""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent


@cache
def names() -> tuple[str, ...]:
    """Return the name of every operation's folder, sorted."""
    return tuple(sorted(path.parent.name for path in ROOT.glob("*/reference.py")))


def package(name: str) -> ModuleType:
    """Return the package of one operation.

    Raises:
        ValueError: no operation has that name.
    """
    if name not in names():
        raise ValueError(f"no operation {name!r}; there are {', '.join(names())}")
    return importlib.import_module(f"kernels.{name}")


def warm_up(*operations: str) -> None:
    """Compile operations, or all of them, for the backend of `backend.choice`, so that no request waits for it.

    The machine code is cached on disk. numba's cache is beside the source or in `NUMBA_CACHE_DIR`, CuPy's in
    `CUPY_CACHE_DIR`. The first warm-up on a machine takes seconds, later ones a fraction of a second.

    Raises:
        ValueError: an unknown name.
        BackendError: `KERNELS_BACKEND` names a backend that cannot run on this machine.
    """
    for name in operations or names():
        package(name).warm_up()
