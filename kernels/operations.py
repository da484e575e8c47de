"""The operations that have several versions: their folders, and how to compile them before the first request."""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent


@cache
def names() -> tuple[str, ...]:
    """Every operation's folder, sorted."""
    return tuple(sorted(path.parent.name for path in ROOT.glob("*/reference.py")))


def package(name: str) -> ModuleType:
    """The front of one operation.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in names():
        raise ValueError(f"no operation {name!r}; there are {', '.join(names())}")
    return importlib.import_module(f"kernels.{name}")


def warm_up(*wanted: str) -> None:
    """Compiles operations (all when none is named) for where `backend.choice` puts arrays: no request waits for it.

    The machine code is kept (numba's cache: beside the source, or in `NUMBA_CACHE_DIR`; CuPy's: `CUPY_CACHE_DIR`):
    seconds the first time on a machine, a fraction of one after.

    Raises:
        ValueError: an unknown name.
        BackendError: `KERNELS_BACKEND` asks for what is not there.
    """
    for name in wanted or names():
        package(name).warm_up()
