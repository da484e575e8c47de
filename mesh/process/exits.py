"""The end of a process: exit statuses that services and their launcher share, and the time and way of a stop.

SIGTERM ──calls finish──> cut_s ──cancelled calls, models, connections end──> the drain is over ──> exit_now
"""

from __future__ import annotations

import logging
import os
import sys
from typing import NoReturn

WRONG_SETTINGS = 2
"""The configuration of a service is invalid: a restart would fail in the same way."""

# Part of a drain, and its most seconds, in which the process ends what has not finished, and itself.
_END_SHARE, _END_S = 0.2, 2.0


def cut_s(drain_s: float) -> float:
    """Return the seconds of a drain of `drain_s` that calls have to finish; the process ends in the rest."""
    return drain_s - min(_END_SHARE * drain_s, _END_S)


def exit_now(status: int) -> NoReturn:
    """End the process after its logs are written, without waiting for threads and without freeing memory.

    A model's run cannot be interrupted, and a gigabyte of objects takes seconds to free.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
