"""A connection to the owner of a model. To the instance that keeps it, it is the process that runs the model.

It is *left* when the model is unloaded here, and the owner goes on for others. It is *killed* when the owner does not
do its work: then it ends for everybody, and everybody's instances start, or find, the next one.
"""

from __future__ import annotations

import logging
import os
import select
import time
from typing import Any

from services.infer.model_process.channel import Channel, ChannelClosed, Message
from services.infer.model_process.model_runner import NotLoaded, Signalled
from services.infer.model_process.process import Program, how
from services.infer.model_process.shared.owners import Owners
from services.infer.model_process.shared.progress_mark import ProgressMark

log = logging.getLogger(__name__)

_END_S = 2.0
# An owner that has closed a connection should end, or have been asked to close it: it is given so long.
_TRIES = 3
# An owner that was found, not started, may die of another's doing just then: so often, the next one is taken.


class Shared(Signalled):
    """A connection that is used, or was; see `isolation.process.Process`."""

    def __init__(self, owners: Owners, key: str, program: Program, title: str) -> None:
        """Joins the owner that `key` stands for. `title` names the model in the log. Raises OSError."""
        super().__init__(title)
        self._owners, self._key, self._program = owners, key, program
        self._left_for = ""
        self._join()

    def _join(self) -> None:
        joined = self._owners.join(self._key, self._program)
        self.pid, self._pidfd, self.is_new = joined.pid, joined.pidfd, joined.is_new
        self.channel = Channel(joined.sock)
        try:
            self._mark = ProgressMark.sent(joined.sock)
        except BrokenPipeError:  # It is gone again: `load` will see.
            joined.sock.close()
        except BaseException:
            joined.sock.close()
            os.close(self._pidfd)
            raise

    def load(self, header: dict[str, Any], timeout_s: float) -> None:
        """Has the owner load the model, if it has not; `facts` says what is known then.

        Raises:
            NotLoaded: it could not, or took too long, or ended. It is to be reaped all the same.
        """
        deadline = time.monotonic() + timeout_s
        for is_last in (*(False,) * (_TRIES - 1), True):
            message = self._first_word(header, deadline)
            if message is not None or self.is_new or is_last or self._left_for or self._killed_for:
                break
            log.info(
                "model %s: its process, %d, died before it said anything; the next one is taken", self.title, self.pid
            )
            with self._signalling:
                os.close(self._pidfd)
                self.channel.close()
                self._join()
        if message is None:
            return  # It has ended: `reap` knows how.
        self.learn(message)

    def _first_word(self, header: dict[str, Any], deadline: float) -> Message | None:
        try:
            self.channel.send(header)
            message = self.channel.receive(max(deadline - time.monotonic(), 0.0))
        except (ChannelClosed, OSError):
            return None
        if message is None:
            raise NotLoaded("loading took too long: see parameter load_timeout_ms")
        return message

    def attend(self) -> None:
        """Waits until the owner ends, or has let go of this connection."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        poll.register(self.channel.fileno(), select.POLLRDHUP)
        poll.poll()
        self.reap()

    def leave(self, reason: str) -> None:
        """Uses it no more; the owner goes on for others."""
        with self._signalling:
            self._left_for = self._left_for or reason
            self.channel.shut()

    def say_goodbye(self) -> None:
        """Uses it no more; the last one to say so waits for its end. Raises ChannelClosed or OSError: it is gone."""
        self._left_for = self._left_for or "the model is unloaded"
        self.channel.send({"op": "close"})

    def reap(self) -> None:
        """Sees how it ended, and gives back everything that was held for it."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        # One that has closed the connection may be about to end. Who has left does not wait for that.
        has_ended = bool(poll.poll(0 if self._left_for else _END_S * 1000))
        with self._signalling:
            self.end = self._killed_for or self._left_for or self._told(has_ended=has_ended)
            self.died.set()
            os.close(self._pidfd)
        self.channel.shut()

    def _told(self, *, has_ended: bool) -> str:
        if not has_ended:
            return "it let go of the connection"
        code = self._owners.ending(self._key, self.pid)
        # Only the process that started it is told by the kernel, and may itself be gone.
        return "it ended; how, nobody saw" if code is None else how(code)

    def has_begun(self) -> bool:
        """Whether what it was sent last is being executed, or was when it died."""
        return self._mark.started_ns != 0

    def runs_s(self, sent: float, now: float) -> float:
        """For how long the batch has been executed: not while those of others are."""
        started = self._mark.started_ns
        return max(now - max(started / 1e9, sent), 0.0) if started else 0.0

    def is_alone(self) -> bool:
        """Whether it worked for nobody else, as far as is known."""
        return not self._mark.is_together

    def is_own_doing(self) -> bool:
        """Whether it died of what it was sent from here: nobody ended it, and nothing else was executed."""
        is_by_itself = self.end.startswith(("exit code", "signal")) and not any(
            name in self.end for name in ("SIGKILL", "SIGTERM")
        )
        return (is_by_itself or bool(self._killed_for)) and self.is_alone()
