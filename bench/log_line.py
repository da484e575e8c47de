"""Processor time of one log line: of a plain one, of an event with its values, and of one whose level is not logged.

python bench/log_line.py
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable

from mesh.process import logs

log = logging.getLogger(__name__)
LINES = 5_000
ROUNDS = 9


def plain() -> None:
    log.warning("model %s version %d is unavailable: %s", "digits", 3, "no such file")


def event() -> None:
    log.warning(
        "model %(model)s version %(version)d is unavailable: %(reason)s",
        {"event": "model.unavailable", "model": "digits", "version": 3, "reason": "no such file"},
    )


def not_logged() -> None:
    log.debug(
        "%(method)s refused with %(code)s: %(reason)s",
        {"event": "call.refused", "method": "/a/B", "code": "NOT_FOUND", "reason": "no such model"},
    )


def us_per_line(write: Callable[[], None]) -> float:
    """Return the processor time of a line in microseconds, the least of ROUNDS rounds."""
    rounds = []
    for _ in range(ROUNDS):
        began = time.process_time()
        for _ in range(LINES):
            write()
        rounds.append((time.process_time() - began) / LINES * 1e6)
    return min(rounds)


if __name__ == "__main__":
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        logs.configure("node-a/infer-0", "INFO")
        for write in (plain, event, not_logged):
            print(f"{write.__name__}: {us_per_line(write):.2f} us")
