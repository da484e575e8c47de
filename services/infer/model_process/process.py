"""One run of a model process, from its start to its end. Owned by one thread, its keeper's.

    spawn ──> handshake: "load" there, "loaded" | "failed" back ──> log lines, until it ends ──> reaped, with the reason

The kernel ends the process when the thread that started it ends: the keeper lives as long as the process.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from services.infer.model_process.channel import Channel, ChannelClosed, Message
from services.infer.model_process.model_runner import NotLoaded, OwnProcess, Signalled

log = logging.getLogger(__name__)

_LINE_BYTES = 8192
# A longer line is cut into several: a model may write without ever ending a line.
_PIPE_BYTES = 1 << 16
_END_S = 2.0
# What has closed its channel should end: it is given so long.
_LAST_WORDS_S = 0.2
# How long the output of a process that has ended is still read: one that it started may hold the pipe for ever.


@dataclass(frozen=True)
class Program:
    """How a model process is started."""

    argv: Sequence[str]
    """Up to the numbers of its socket and its server, which follow."""
    environment: Mapping[str, str]
    folder: str
    """Its working directory."""


class Process(Signalled, OwnProcess):
    """A model process that runs, or has run."""

    def __init__(self, program: Program, title: str) -> None:
        """Starts it. `title` names the model in the log. Raises OSError."""
        super().__init__(title)
        self._rest = b""
        ours, theirs = socket.socketpair()
        out, their_out = os.pipe2(os.O_CLOEXEC)
        try:
            self._popen = subprocess.Popen(
                [*program.argv, str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=their_out,
                stderr=their_out,
                env=dict(program.environment),
                cwd=program.folder,
                pass_fds=(theirs.fileno(),),
                # A group of its own: Ctrl-C is the server's, and what it starts in turn can be ended with it.
                start_new_session=True,
            )
        except BaseException:
            ours.close()
            os.close(out)
            raise
        finally:
            theirs.close()
            os.close(their_out)
        self.pid = self._popen.pid
        self.channel = Channel(ours)
        self._out = out
        os.set_blocking(out, False)
        self._pidfd = os.pidfd_open(self.pid)

    def load(self, header: dict[str, Any], timeout_s: float) -> None:
        """Has it load its model; `facts` says what is known then.

        Raises:
            NotLoaded: it could not, or took too long, or ended. It is to be reaped all the same.
        """
        deadline = time.monotonic() + timeout_s
        try:
            self.channel.send(header)
            message = self._first_word(deadline)
        except ChannelClosed as err:
            self._end_soon(f"it broke off while it loaded the model: {err}")
            message = None
        if message is None:
            return  # It has ended: `reap` knows how.
        self.learn(message)

    def _end_soon(self, reason: str) -> None:
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        if not poll.poll(_END_S * 1000):
            self.kill(reason)

    def _first_word(self, deadline: float) -> Message | None:
        poll = self._polling(with_channel=True)
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise NotLoaded("loading took too long: see parameter load_timeout_ms")
            ready = {fd for fd, _ in poll.poll(left * 1000)}
            if self._out in ready and not self._drain():
                poll.unregister(self._out)
            if self.channel.fileno() in ready:
                return self.channel.receive()
            if self._pidfd in ready:
                return None

    def attend(self) -> None:
        """Passes on what it writes, until it ends. Then reaps it."""
        poll = self._polling(with_channel=False)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if self._out in ready and not self._drain():
                poll.unregister(self._out)
            if self._pidfd in ready:
                break
        self.reap()

    def _polling(self, *, with_channel: bool) -> select.poll:
        poll = select.poll()
        for fd in (self._out, self._pidfd, *((self.channel.fileno(),) if with_channel else ())):
            poll.register(fd, select.POLLIN)
        return poll

    def _drain(self) -> bool:
        """Logs what has been written; False when there will be no more."""
        try:
            data = os.read(self._out, _PIPE_BYTES)
        except BlockingIOError:
            return True
        *lines, self._rest = (self._rest + data).split(b"\n")
        while len(self._rest) > _LINE_BYTES:
            lines.append(self._rest[:_LINE_BYTES])
            self._rest = self._rest[_LINE_BYTES:]
        if not data and self._rest:
            lines.append(self._rest)
        for line in lines:
            if text := line[:_LINE_BYTES].decode(errors="replace").rstrip():
                log.info("model %s: %s", self.title, text)
        return bool(data)

    def reap(self) -> None:
        """Waits for its end, and gives back everything that was held for it."""
        with suppress(ChildProcessError):  # The program that embeds us may have all children reaped by the kernel.
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        with self._signalling:
            # Before it is reaped, while its number cannot be another's: what it has started goes with it.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
            code = self._popen.wait()
            self.end = self._killed_for or how(code)
            self.died.set()
        poll = select.poll()
        poll.register(self._out, select.POLLIN)
        until = time.monotonic() + _LAST_WORDS_S
        while poll.poll(max(until - time.monotonic(), 0) * 1000) and self._drain():
            pass
        os.close(self._out)
        os.close(self._pidfd)
        self.channel.shut()  # A thread may be waiting in it, and something that was started may hold the other end.


def how(code: int) -> str:
    """An exit status, or minus a signal, in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {-code}, {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"


CHILD, OWNER = "services.infer.model_process.child.main", "services.infer.model_process.shared.owner"


def program(python: str, environment: Mapping[str, str], folder: str, module: str = CHILD) -> Program:
    """The one that runs a model. `-P`: the working directory is not searched for modules."""
    safe = ("-P",) if sys.version_info >= (3, 11) else ()
    return Program((python, *safe, "-m", module), environment, folder)
