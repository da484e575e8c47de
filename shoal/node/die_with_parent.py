"""Ties a process to the one that starts it: when the launcher dies, however it dies, the kernel signals the process.

    python -I -S leash.py LAUNCHER_PID SIGNAL COMMAND [ARGUMENT...]

becomes COMMAND, with the same pid. A script of its own, not a function that runs between fork and exec: that is unsafe
in a process with threads. It imports little, so that it costs some ten milliseconds.

The kernel sends the signal when the *thread* that started the process ends (prctl(2), PR_SET_PDEATHSIG): the launcher
starts everything from its main thread.
"""

import ctypes
import os
import sys

PR_SET_PDEATHSIG = 1


def main(launcher: int, number: int, command: list[str]) -> None:
    """Becomes `command`. Exits 127 when there is no such command."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0) != 0:
        print(f"leash: prctl: {os.strerror(ctypes.get_errno())}: {command[0]} outlives its launcher", file=sys.stderr)
    if os.getppid() != launcher:
        sys.exit(0)  # It died before the leash was on.
    try:
        os.execv(command[0], command)
    except OSError as err:
        print(f"leash: cannot run {command[0]}: {err.strerror}", file=sys.stderr)
        sys.exit(127)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
