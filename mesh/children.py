"""What a process does first that a service has started."""

from __future__ import annotations

import signal


def hear_signals() -> None:
    """Lets SIGTERM and SIGINT reach this process.

    Inside Envoy they are blocked in every thread of the service (a thread of its own takes them), and what a process
    blocks, its children block: they could not be asked to stop.
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})
