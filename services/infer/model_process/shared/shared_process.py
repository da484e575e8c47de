"""Connection to the owner of a model. Its instance uses the connection like a process that runs the model.

`release` ends the connection when the model is unloaded here; the owner keeps serving its other users. `kill` ends the
owner when it does not work: all users lose it, and their instances start, or join, the next owner.
"""

from __future__ import annotations

import logging
import os
import select
import time
from typing import Any

from services.infer.model_process.channel import Channel, ChannelClosed, Message
from services.infer.model_process.model_runner import NotLoaded, SignalledProcess
from services.infer.model_process.process import Program, exit_text
from services.infer.model_process.shared.owners import Owners
from services.infer.model_process.shared.progress_mark import ProgressMark

log = logging.getLogger(__name__)

# Longest wait for the exit of an owner that has closed the connection.
_END_S = 2.0
# An owner that was already running may crash on another user's request just when it is joined: then the next is joined.
_TRIES = 3


class SharedProcess(SignalledProcess):
    """A connection to an owner; see `process.Process` for the interface."""

    def __init__(self, owners: Owners, key: str, program: Program, title: str) -> None:
        """Join the owner with this `key`. `title` names the model in the log. Raises OSError."""
        super().__init__(title)
        self._owners, self._key, self._program = owners, key, program
        self._released_for = ""
        self._join()

    def _join(self) -> None:
        connection = self._owners.join(self._key, self._program)
        self.pid, self._pidfd, self.is_new = connection.pid, connection.pidfd, connection.is_new
        self.channel = Channel(connection.sock)
        try:
            self._mark = ProgressMark.sent(connection.sock)
        # The owner has ended already: `load` will find the channel closed.
        except BrokenPipeError:
            connection.sock.close()
        except BaseException:
            connection.sock.close()
            os.close(self._pidfd)
            raise

    def load(self, header: dict[str, Any], timeout_s: float) -> None:
        """Send the load request and wait until the owner has loaded the model; sets `model_info`.

        `model_info` stays empty when the owner ends meanwhile.

        Raises:
            NotLoaded: loading failed, or took longer than `timeout_s`. The runner must be reaped all the same.
        """
        deadline = time.monotonic() + timeout_s
        for is_last in (*(False,) * (_TRIES - 1), True):
            message = self._first_message(header, deadline)
            if message is not None or self.is_new or is_last or self._released_for or self._killed_for:
                break
            log.info(
                "model %(model_process)s: shared process %(pid)d died before its first message; joining the next one",
                {"event": "model.shared_process_died", "model_process": self.title, "pid": self.pid},
            )
            with self._signalling:
                os.close(self._pidfd)
                self.channel.close()
                self._join()
        # Without a message the owner has ended: `reap` finds out how.
        if message is not None:
            self.accept_loaded(message)

    def _first_message(self, header: dict[str, Any], deadline: float) -> Message | None:
        try:
            self.channel.send(header)
            message = self.channel.receive(max(deadline - time.monotonic(), 0.0))
        except (ChannelClosed, OSError):
            return None
        if message is None:
            raise NotLoaded("loading took too long: see parameter load_timeout_ms")
        return message

    def watch(self) -> None:
        """Wait until the owner ends or closes this connection, then reap the runner."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        poll.register(self.channel.fileno(), select.POLLRDHUP)
        poll.poll()
        self.reap()

    def release(self, reason: str) -> None:
        """Shut the connection; the owner keeps serving its other users."""
        with self._signalling:
            self._released_for = self._released_for or reason
            self.channel.shut()

    def request_close(self) -> None:
        """Ask the owner to close the connection; for the last user, the connection closes when the owner ends.

        Raises ChannelClosed or OSError when the connection is closed already.
        """
        self._released_for = self._released_for or "the model is unloaded"
        self.channel.send({"op": "close"})

    def reap(self) -> None:
        """Set `end` and `died`, and close the descriptors."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        # An owner that has closed the connection may be about to exit. A released connection does not wait for that.
        has_ended = bool(poll.poll(0 if self._released_for else _END_S * 1000))
        with self._signalling:
            self.end = self._killed_for or self._released_for or self._end_text(has_ended=has_ended)
            self.died.set()
            os.close(self._pidfd)
        self.channel.shut()

    def _end_text(self, *, has_ended: bool) -> str:
        if not has_ended:
            return "it closed the connection"
        code = self._owners.ending(self._key, self.pid)
        # Only the infer process that started the owner learns the exit status, and may have ended itself.
        return "it ended; its exit status is unknown" if code is None else exit_text(code)

    def has_started(self) -> bool:
        """Return True when the last batch sent is in execution, or was when the owner ended."""
        return self._mark.started_ns != 0

    def running_s(self, sent: float, now: float) -> float:
        """Return for how many seconds the batch has been in execution; waiting for others' batches does not count."""
        started = self._mark.started_ns
        return max(now - max(started / 1e9, sent), 0.0) if started else 0.0

    def is_alone(self) -> bool:
        """Return True when no batch of another user was executed at the same time."""
        return not self._mark.is_together

    def is_own_crash(self) -> bool:
        """Return True when this instance's batch crashed the owner: no other batch ran, and no outsider killed it."""
        is_by_itself = self.end.startswith(("exit code", "signal")) and not any(
            name in self.end for name in ("SIGKILL", "SIGTERM")
        )
        return (is_by_itself or bool(self._killed_for)) and self.is_alone()
