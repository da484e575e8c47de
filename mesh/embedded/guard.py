"""What keeps a process honest whose main thread is Envoy's: signals reach Python's loop, and a dead loop ends all.

Envoy would cut all connections at SIGTERM. So the process blocks the signals before it becomes Envoy (a mask survives
exec), and a thread of ours takes them. And Envoy would stay up, LIVE for whoever asks, with a loop that answers nobody.
"""

from __future__ import annotations

import asyncio
import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

STOP_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT})

_BEATS = 10


def on_signals(take: Callable[[int], None]) -> None:
    """Calls `take(number)` on the running loop for each stop signal. They must be blocked in every thread."""
    loop = asyncio.get_running_loop()

    def wait() -> None:
        while True:
            number = signal.sigwait(STOP_SIGNALS)
            loop.call_soon_threadsafe(take, int(number))

    threading.Thread(target=wait, name="signals", daemon=True).start()


async def beat(stall_s: float) -> None:
    """Ends the process with all its stacks on stderr when the loop stands still for `stall_s`. Until cancelled.

    The clock is faulthandler's own thread, which needs no GIL: even native code that keeps it is found out.
    """
    try:
        while True:
            faulthandler.dump_traceback_later(stall_s, exit=True, file=sys.__stderr__ or 2)
            await asyncio.sleep(stall_s / _BEATS)
    finally:
        faulthandler.cancel_dump_traceback_later()


def leave(status: int) -> NoReturn:
    """Ends the process: Envoy's threads have nothing left to do, and Python's destructors are not for its threads."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
