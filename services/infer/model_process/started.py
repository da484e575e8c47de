"""Processes that a model has started: they end with the model's process, also those that have left its process group.

A process inherits its parent's environment, with a mark of the model process, and its session. `end_all` finds both in
/proc. A process escapes only when it has a session and an environment of its own, and its parent has ended.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress

VARIABLE = "SHOAL_MODEL_PROCESS"
"""Variable with the mark of a model process."""

# Processes may start others while they are searched. One round finds all, unless a model starts them without end.
_MAX_ROUNDS = 20


def end_all(mark: str, session: int) -> int:
    """Kill all processes that a model process has started, and return their number.

    Args:
        mark: value of VARIABLE of the model process.
        session: id of its session, which is that of the process. It must not be reaped yet, so that no other process
            has its id.
    """
    ended: set[int] = set()
    for _ in range(_MAX_ROUNDS):
        found = [(pid, began) for pid, began in _started(mark, session) if pid not in ended]
        if not found:
            break
        for pid, began in found:
            _kill(pid, began)
            ended.add(pid)
    return len(ended)


def _started(mark: str, session: int) -> Iterator[tuple[int, int]]:
    """Yield the processes with the mark or the session, and their descendants, each with its start time."""
    began: dict[int, int] = {}
    children: dict[int, list[int]] = {}
    found: set[int] = set()
    for name in os.listdir("/proc"):
        if not name.isdigit() or (pid := int(name)) == session or (seen := _stat(pid)) is None:
            continue
        state, parent, of_session, began[pid] = seen
        # An ended process that is not reaped has no environment.
        if state == "Z":
            continue
        children.setdefault(parent, []).append(pid)
        if of_session == session or _has_mark(pid, mark):
            found.add(pid)
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


def _has_mark(pid: int, mark: str) -> bool:
    with suppress(OSError), open(f"/proc/{pid}/environ", "rb") as file:
        return f"{VARIABLE}={mark}".encode() in file.read().split(b"\0")
    return False


def _stat(pid: int) -> tuple[str, int, int, int] | None:
    """Return state, parent, session and start time of a process; None when it has ended."""
    with suppress(OSError), open(f"/proc/{pid}/stat", "rb") as file:
        # The name is in parentheses, and may have any character.
        fields = file.read().rpartition(b")")[2].split()
        return fields[0].decode(), int(fields[1]), int(fields[3]), int(fields[19])
    return None
