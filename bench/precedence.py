"""Precedence of benchmarked processes over other work of the machine. Needs root, and a kernel with autogroups."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def take_precedence(pids: Iterable[int]) -> None:
    """Lower the nice value of each process's session to 15 below the nice value of the process.

    The kernel shares the processors between sessions (sched(7), autogroup). Processes that Shoal runs at a lower
    priority keep it beside the others.
    """
    for pid in pids:
        nice = os.getpriority(os.PRIO_PROCESS, pid) - 15
        Path(f"/proc/{pid}/autogroup").write_text(str(nice))
