"""Base classes of model runners: whatever runs the model of one instance, from its start to its end.

process.Process                        a process for one instance                  SignalledProcess, ExclusiveRunner
thread_runner.ThreadRunner             a thread of the server                      ExclusiveRunner
shared.shared_process.SharedProcess    a process that several infer processes use  SignalledProcess
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from services.infer.model_process.channel import Channel, Message


class NotLoaded(Exception):
    """The model could not be loaded; the message says why."""


class ModelRunner:
    """Base class of all runners. Any thread may use `channel`, `kill`, `died` and `end`."""

    channel: Channel

    def __init__(self, title: str) -> None:
        """`title` names the model in the log."""
        self.title = title
        self.died = threading.Event()
        """Set once the runner is reaped; `end` has the reason then."""
        self.end = ""
        self.using = threading.Lock()
        """Held by the thread that is in a call of the channel."""
        self.model_info: Mapping[str, Any] = {}
        """The fields of HostedModelInfo; empty until the model is loaded."""
        self._killed_for = ""

    def accept_loaded(self, message: Message) -> None:
        """Read the reply to the load request and set `model_info`. Raises NotLoaded when loading failed."""
        if message.op != "loaded":
            raise NotLoaded(str(message.header.get("error", "loading failed without a message from the model process")))
        self.model_info = message.header


class SignalledProcess(ModelRunner):
    """A runner that is a process and can be killed.

    `_signalling` is held while the process is reaped: no signal may reach another process that reuses its id.
    """

    _pidfd: int

    def __init__(self, title: str) -> None:
        super().__init__(title)
        self._signalling = threading.Lock()

    def kill(self, reason: str) -> None:
        """Kill the process immediately, for all of its users; `end` will be `reason`."""
        with self._signalling:
            if not self.died.is_set():
                self._killed_for = self._killed_for or reason
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)


class ExclusiveRunner(ModelRunner):
    """A runner that works for one instance of one server only."""

    def kill(self, reason: str) -> None: ...

    def release(self, reason: str) -> None:
        """Stop using the runner: with its only user gone, the runner ends."""
        self.kill(reason)

    def request_close(self) -> None:
        """Ask the runner to close the model and end. Raises ChannelClosed or OSError when the channel is closed."""
        self.channel.send({"op": "close"})

    def has_started(self) -> bool:
        """Return True when the last batch sent is in execution, or was when the runner ended."""
        return True

    def running_s(self, sent: float, now: float) -> float:
        """Return for how many seconds a batch sent at `sent` has been in execution."""
        return now - sent

    def is_alone(self) -> bool:
        """Return True when no batch of another user was executed at the same time."""
        return True

    def is_own_crash(self) -> bool:
        """Return True when the process crashed by itself: no out-of-memory killer, and no person, ended it."""
        return not any(name in self.end for name in ("SIGKILL", "SIGTERM"))
