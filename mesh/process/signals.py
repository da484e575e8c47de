"""The end of a service process: SIGTERM, SIGINT, or the death of its launcher."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal

log = logging.getLogger(__name__)

# Time between two checks of the launcher.
_PARENT_CHECK_S = 1.0


async def until_stopped() -> None:
    """Wait for SIGTERM or SIGINT. A second signal ends the process immediately.

    Also returns when the launcher (the process SHOAL_PARENT_PID) has ended, so that no orphan keeps a socket or lease.
    """
    stop = asyncio.Event()

    def on_signal(number: int) -> None:
        if stop.is_set():
            os._exit(128 + number)
        log.info("stopping on %(signal)s", {"event": "service.stopping", "signal": signal.Signals(number).name})
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal, number)
    parent = os.environ.get("SHOAL_PARENT_PID")
    while not stop.is_set():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), _PARENT_CHECK_S)
        if parent and os.getppid() != int(parent) and not stop.is_set():
            log.warning(
                "the launcher (pid %(pid)d) has ended: stopping",
                {"event": "service.launcher_ended", "pid": int(parent)},
            )
            stop.set()
