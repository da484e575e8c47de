"""Script that ties a process to its launcher: when the launcher dies for any reason, the kernel signals the process.

    python -I -S die_with_parent.py LAUNCHER_PID SIGNAL COMMAND [ARGUMENT...]

The script becomes COMMAND, with the same pid. A function that runs between fork and exec would be unsafe in a process
with threads. The script imports little, so it takes about ten milliseconds.

The kernel sends the signal when the *thread* that started the process ends (prctl(2), PR_SET_PDEATHSIG): the launcher
starts everything from its main thread.
"""

import ctypes
import os
import sys

PR_SET_PDEATHSIG = 1


def main(launcher: int, number: int, command: list[str]) -> None:
    """Become `command`, with the signal set. Exits with 127 when the command cannot be executed."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0) != 0:
        why = os.strerror(ctypes.get_errno())
        print(f"die_with_parent: prctl: {why}: {command[0]} outlives its launcher", file=sys.stderr)
    # The launcher died before the signal was set.
    if os.getppid() != launcher:
        sys.exit(0)
    try:
        os.execv(command[0], command)
    except OSError as err:
        print(f"die_with_parent: cannot run {command[0]}: {err.strerror}", file=sys.stderr)
        sys.exit(127)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
