"""A model that runs on a thread of the server's own process (parameter `isolation` is `none`).

The thread speaks the protocol of a model process, so callers see no difference. But nothing protects the server: the
model's crash is the server's crash, an endless loop keeps its thread, and Python alone decides when memory is freed.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from typing import Any

from services.infer.model_process.channel import Channel, ChannelClosed
from services.infer.model_process.child.main import serve_one
from services.infer.model_process.model_runner import ExclusiveRunner, NotLoaded

log = logging.getLogger(__name__)

_GRACE_S = 5.0


class ThreadRunner(ExclusiveRunner):
    """A model on a thread; see `process.Process`."""

    def __init__(self, title: str) -> None:
        """Start the thread. `title` names the model in the log."""
        super().__init__(title)
        self.pid = os.getpid()
        ours, theirs = socket.socketpair()
        self.channel = Channel(ours)
        self._thread = threading.Thread(target=self._serve, args=(Channel(theirs),), name=title, daemon=True)
        self._thread.start()

    def _serve(self, channel: Channel) -> None:
        try:
            serve_one(channel)
        except ChannelClosed:
            pass
        except BaseException:
            log.exception(
                "model %(model_process)s: its thread ended",
                {"event": "model.thread_ended", "model_process": self.title},
            )
        finally:
            channel.shut()
            channel.close()

    def load(self, header: dict[str, Any], timeout_s: float) -> None:
        """Send the load request and wait until the model is loaded. Raises NotLoaded."""
        try:
            self.channel.send(header)
            message = self.channel.receive(timeout_s)
        except ChannelClosed:
            return
        if message is None:
            raise NotLoaded("loading took too long: see parameter load_timeout_ms")
        self.accept_loaded(message)

    def watch(self) -> None:
        """Wait for the end of the thread."""
        self._thread.join()
        self.reap()

    def kill(self, reason: str) -> None:
        """Shut the channel: Python cannot kill a thread."""
        self._killed_for = self._killed_for or reason
        self.channel.shut()

    def reap(self) -> None:
        """Wait for the end of the thread, for a few seconds at most."""
        self.channel.shut()
        self._thread.join(_GRACE_S)
        if self._thread.is_alive():
            log.warning(
                "model %(model_process)s: its thread is still running; it is in the server's process and cannot be "
                "killed",
                {"event": "model.thread_still_runs", "model_process": self.title},
            )
        self.end = self._killed_for or "its thread ended"
        self.died.set()
