"""Processes that a model has started: they end with the model's process, also those that have left its process group.

A process inherits its parent's environment, with a mark of the model process, and its session. `end_all` finds both in
/proc. A process escapes only when it has a session and an environment of its own, and its parent has ended.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress

VARIABLE = "SHOAL_MODEL_PROCESS"
"""Variable with the mark of a model process."""

# Processes may start others while they are searched. One round finds all, unless a model starts them without end.
_MAX_ROUNDS = 20
# A process that replaces its program has no environment for a moment: it is looked at again after this time.
_AGAIN_S = 0.01
# Parent of the kernel's threads, which have no environment.
_KERNEL = 2


def end_all(mark: str, session: int) -> int:
    """Kill all processes that a model process has started, and return their number.

    Args:
        mark: value of VARIABLE of the model process.
        session: id of its session, which is that of the process. It must not be reaped yet, so that no other process
            has its id.
    """
    ended: set[int] = set()
    for _ in range(_MAX_ROUNDS):
        search = _Search(mark, session)
        found = [(pid, began) for pid, began in search.started() if pid not in ended]
        for pid, began in found:
            _kill(pid, began)
            ended.add(pid)
        if not found and not search.is_uncertain:
            break
        if not found:
            time.sleep(_AGAIN_S)
    return len(ended)


class _Search:
    """One look at all processes."""

    def __init__(self, mark: str, session: int) -> None:
        self._marked = f"{VARIABLE}={mark}".encode()
        self._session = session
        self.is_uncertain = False
        """True when there was a process without an environment that is younger than the model process."""

    def started(self) -> Iterator[tuple[int, int]]:
        """Yield the processes with the mark or the session, and their descendants, each with its start time."""
        model = _stat(self._session)
        began: dict[int, int] = {}
        children: dict[int, list[int]] = {}
        found: set[int] = set()
        for name in os.listdir("/proc"):
            if not name.isdigit() or (pid := int(name)) == self._session or (seen := _stat(pid)) is None:
                continue
            state, parent, of_session, began[pid] = seen
            # An ended process that is not reaped has no environment.
            if state == "Z":
                continue
            children.setdefault(parent, []).append(pid)
            environment = _environment(pid)
            if of_session == self._session or self._marked in environment.split(b"\0"):
                found.add(pid)
            elif not environment and parent != _KERNEL and model is not None and began[pid] >= model[3]:
                self.is_uncertain = True
        todo = list(found)
        while todo:
            pid = todo.pop()
            yield pid, began[pid]
            todo += (more := [child for child in children.get(pid, ()) if child not in found])
            found.update(more)


def _kill(pid: int, began: int) -> None:
    """Kill a process, unless it has ended and another one has its id."""
    with suppress(OSError):
        fd = os.pidfd_open(pid)
        try:
            if (seen := _stat(pid)) is not None and seen[3] == began:
                signal.pidfd_send_signal(fd, signal.SIGKILL)
        finally:
            os.close(fd)


def _environment(pid: int) -> bytes:
    """Return the environment of a process; empty without one."""
    with suppress(OSError), open(f"/proc/{pid}/environ", "rb") as file:
        return file.read()
    return b""


def _stat(pid: int) -> tuple[str, int, int, int] | None:
    """Return state, parent, session and start time of a process; None when it has ended."""
    with suppress(OSError), open(f"/proc/{pid}/stat", "rb") as file:
        # The name is in parentheses, and may have any character.
        fields = file.read().rpartition(b")")[2].split()
        return fields[0].decode(), int(fields[1]), int(fields[3]), int(fields[19])
    return None
