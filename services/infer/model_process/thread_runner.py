"""A model that runs in the server's own process, on a thread, when its configuration asks for that.

It looks like a process to everybody else, and talks as one. But nothing protects the server from it: a crash is the
server's, a loop that does not end keeps its thread, and what it holds is given back as Python sees fit.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from typing import Any

from services.infer.model_process.channel import Channel, ChannelClosed
from services.infer.model_process.child.main import serve_one
from services.infer.model_process.model_runner import NotLoaded, OwnProcess

log = logging.getLogger(__name__)

_GRACE_S = 5.0


class ThreadRunner(OwnProcess):
    """A model on a thread; see `process.Process`."""

    def __init__(self, title: str) -> None:
        """Starts its thread. `title` names the model in the log."""
        super().__init__(title)
        self.pid = os.getpid()
        ours, theirs = socket.socketpair()
        self.channel = Channel(ours)
        self._thread = threading.Thread(target=self._work, args=(Channel(theirs),), name=title, daemon=True)
        self._thread.start()

    def _work(self, channel: Channel) -> None:
        try:
            serve_one(channel)
        except ChannelClosed:
            pass
        except BaseException:
            log.exception("model %s: its thread ended", self.title)
        finally:
            channel.shut()
            channel.close()

    def load(self, header: dict[str, Any], timeout_s: float) -> None:
        """Raises NotLoaded."""
        try:
            self.channel.send(header)
            message = self.channel.receive(timeout_s)
        except ChannelClosed:
            return
        if message is None:
            raise NotLoaded("loading took too long: see parameter load_timeout_ms")
        self.learn(message)

    def attend(self) -> None:
        """Waits for its end."""
        self._thread.join()
        self.reap()

    def kill(self, reason: str) -> None:
        """Talks to it no more. A thread cannot be ended."""
        self._killed_for = self._killed_for or reason
        self.channel.shut()

    def reap(self) -> None:
        """Waits a little for its end."""
        self.channel.shut()
        self._thread.join(_GRACE_S)
        if self._thread.is_alive():
            log.warning(
                "model %s: its thread goes on; it runs in the server's process, and cannot be ended", self.title
            )
        self.end = self._killed_for or "its thread ended"
        self.died.set()
