"""Forks: objects that a child process renews, because threads, event loops and connections stay with the parent.

    class Caller:
        def __init__(self) -> None:
            renew_in_child(self)            # held weakly
        def after_fork(self) -> None: ...   # runs in the child, before any other code

Preforking servers (gunicorn, Celery, `multiprocessing` with "fork") make a client, use it, and fork.
"""

from __future__ import annotations

import gc
import os
from typing import Protocol
from weakref import WeakSet


class Renewable(Protocol):
    """Object with state that works only in the process that made it."""

    def after_fork(self) -> None:
        """Drop that state, in the child. Locks may be held for ever by threads that the child does not have."""


_renewables: WeakSet[Renewable] = WeakSet()

# State of the parent is kept and never finalized: its coroutines, loops and connections share descriptors with the
# parent, and their clean-up would act on the parent's connections and on its epoll.
_kept: list[object] = []


def renew_in_child(renewable: Renewable) -> None:
    """Call `renewable.after_fork()` in each child that this process forks, while the object exists."""
    _renewables.add(renewable)


def keep(state: object) -> None:
    """Keep state of the parent, in the child, for as long as the child runs."""
    _kept.append(state)


def leave_garbage() -> None:
    """Exclude everything that exists from garbage collection, in the child, for the same reason as `keep`.

    A collection there finalizes grpc's calls and channels, too, which ends the child with SIGSEGV.
    """
    gc.freeze()


def _after_fork() -> None:
    if _renewables:
        leave_garbage()
    for renewable in list(_renewables):
        renewable.after_fork()


# Windows cannot fork.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
