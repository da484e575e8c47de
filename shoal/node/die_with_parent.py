"""Script that ties a process to its launcher: when the launcher dies for any reason, the kernel signals the process.

    python -I -S die_with_parent.py LAUNCHER_PID SIGNAL NICE COMMAND [ARGUMENT...]

The script becomes COMMAND, with the same pid. A function that runs between fork and exec would be unsafe in a process
with threads. The script imports little, so it takes about ten milliseconds.

The kernel sends the signal when the *thread* that started the process ends (prctl(2), PR_SET_PDEATHSIG): the launcher
starts everything from its main thread.

NICE is the nice value of the process and of its session: with a positive one, other processes of the launcher get more
time when the processors are busy.
"""

import ctypes
import os
import sys
import time

PR_SET_PDEATHSIG = 1

# The nice value of this process's session, for kernels that share the processors between sessions (sched(7), "The
# autogroup feature"): there, the nice value of a process counts only beside others of the same session.
_AUTOGROUP = "/proc/self/autogroup"
# Without privileges, the whole machine may write there once each 0.1 s.
_TRIES, _PAUSE_S = 40, 0.05


def main(launcher: int, number: int, nice: int, command: list[str]) -> None:
    """Become `command`, with the signal and the nice value set. Exits with 127 when it cannot be executed."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0) != 0:
        why = os.strerror(ctypes.get_errno())
        print(f"die_with_parent: prctl: {why}: {command[0]} outlives its launcher", file=sys.stderr)
    # The launcher died before the signal was set.
    if os.getppid() != launcher:
        sys.exit(0)
    if nice:
        try:
            os.nice(nice)
            set_session_nice(nice)
        except OSError as err:
            print(f"die_with_parent: nice {nice}: {err}: {command[0]} runs at the usual priority", file=sys.stderr)
    try:
        os.execv(command[0], command)
    except OSError as err:
        print(f"die_with_parent: cannot run {command[0]}: {err.strerror}", file=sys.stderr)
        sys.exit(127)


def set_session_nice(nice: int) -> None:
    """Set the nice value of this session, where the kernel has one. The process must have a session of its own.

    Raises OSError when it cannot be set; BlockingIOError when others set theirs all the time.
    """
    for at in range(_TRIES):
        try:
            with open(_AUTOGROUP, "w") as file:
                file.write(str(nice))
            return
        except FileNotFoundError:
            return
        except BlockingIOError:
            if at == _TRIES - 1:
                raise
            # Not in step with others that wait.
            time.sleep(_PAUSE_S * (1 + os.getpid() % 8 / 8))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
