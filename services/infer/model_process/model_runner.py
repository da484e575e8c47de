"""What an instance knows of whatever runs its model, from its start to its end.

process.Process         a process for one instance alone            Signalled, OwnProcess
inside.Inside           a thread of the server that looks like it   OwnProcess
sharing.shared.Shared   a process that several servers use          Signalled
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
    """Base of all. Any thread may use `channel`, `kill`, `died` and `end`."""

    channel: Channel

    def __init__(self, title: str) -> None:
        """`title` names the model in the log."""
        self.title = title
        self.died = threading.Event()
        """Set once it is reaped, and `end` says how it ended."""
        self.end = ""
        self.using = threading.Lock()
        """Held by the one that is in a call of the channel."""
        self.facts: Mapping[str, Any] = {}
        """What is known of the model; empty until it is loaded."""
        self._killed_for = ""

    def learn(self, message: Message) -> None:
        """Takes the first word of what was to load the model: its facts. Raises NotLoaded: it could not."""
        if message.op != "loaded":
            raise NotLoaded(str(message.header.get("error", "the model process did not say how loading went")))
        self.facts = message.header


class Signalled(ModelRunner):
    """A process. Whoever reaps it holds `_signalling`, so that no signal goes to another with its number."""

    _pidfd: int

    def __init__(self, title: str) -> None:
        super().__init__(title)
        self._signalling = threading.Lock()

    def kill(self, reason: str) -> None:
        """Ends it at once, for everybody who uses it; `reason` is what is told of its end."""
        with self._signalling:
            if not self.died.is_set():
                self._killed_for = self._killed_for or reason
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)


class OwnProcess(ModelRunner):
    """What works for one instance of one server alone."""

    def kill(self, reason: str) -> None: ...

    def leave(self, reason: str) -> None:
        """Uses it no more: without anybody who does, it ends."""
        self.kill(reason)

    def say_goodbye(self) -> None:
        """Asks it to end in order. Raises ChannelClosed or OSError when it is gone."""
        self.channel.send({"op": "close"})

    def has_begun(self) -> bool:
        """Whether what it was sent is being executed, or was when it died."""
        return True

    def runs_s(self, sent: float, now: float) -> float:
        """For how long what it was sent at `sent` has been executed."""
        return now - sent

    def is_alone(self) -> bool:
        """Whether nobody else's work was executed at the same time."""
        return True

    def is_own_doing(self) -> bool:
        """Whether it died of its work: the kernel may have ended it for want of memory, or a person."""
        return not any(name in self.end for name in ("SIGKILL", "SIGTERM"))
