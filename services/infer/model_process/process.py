"""One run of a model process, from its start to its end. One thread owns the run: the supervisor of its instance.

    spawn ──> handshake: "load" sent, "loaded" | "failed" received ──> output logged until exit ──> reaped, with reason

The kernel ends the process when the thread that started it ends, so the supervisor lives as long as the process.
"""

from __future__ import annotations

import logging
import os
import secrets
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

from services.infer.model_process import started
from services.infer.model_process.channel import Channel, ChannelClosed, Message, unmap_in_thread
from services.infer.model_process.model_runner import ExclusiveRunner, NotLoaded, SignalledProcess
from services.infer.model_process.output_lines import OutputLines

log = logging.getLogger(__name__)

_PIPE_BYTES = 1 << 16
# Output beyond its budget is read at 3 MB/s: each read takes the interpreter's lock. The model waits in its writes.
_PAUSE_S = 0.02
# A process that has closed its channel is killed when it has not exited after this.
_END_S = 2.0
# Output is read for this long after the process has exited: a process that it started may hold the pipe open for ever.
_LAST_OUTPUT_S = 0.2


@dataclass(frozen=True)
class Program:
    """Command line, environment and working directory of a model process."""

    argv: Sequence[str]
    """The socket's file descriptor and the server's process id are appended."""
    environment: Mapping[str, str]
    folder: str
    """Its working directory."""


class Process(SignalledProcess, ExclusiveRunner):
    """A model process that runs, or has run."""

    def __init__(self, program: Program, title: str) -> None:
        """Start the process. `title` names the model in the log. Raises OSError."""
        super().__init__(title)
        unmap_in_thread()
        self._lines = OutputLines()
        self._mark = secrets.token_hex(8)
        ours, theirs = socket.socketpair()
        out, their_out = os.pipe2(os.O_CLOEXEC)
        try:
            self._popen = subprocess.Popen(
                [*program.argv, str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=their_out,
                stderr=their_out,
                env={**program.environment, started.VARIABLE: self._mark},
                cwd=program.folder,
                pass_fds=(theirs.fileno(),),
                # A process group of its own: Ctrl-C reaches the server only, and `reap` can kill the whole group.
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
        """Send the load request and wait until the model is loaded; sets `model_info`.

        `model_info` stays empty when the process ends meanwhile.

        Raises:
            NotLoaded: loading failed, or took longer than `timeout_s`. The process must be reaped all the same.
        """
        deadline = time.monotonic() + timeout_s
        try:
            self.channel.send(header)
            message = self._first_message(deadline)
        except ChannelClosed as err:
            self._wait_exit_or_kill(f"it closed its channel while it loaded the model: {err}")
            message = None
        # Without a message the process has ended: `reap` finds out how.
        if message is not None:
            self.accept_loaded(message)

    def _wait_exit_or_kill(self, reason: str) -> None:
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        if not poll.poll(_END_S * 1000):
            self.kill(reason)

    def _first_message(self, deadline: float) -> Message | None:
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

    def watch(self) -> None:
        """Log the output of the process until it exits, then reap the process."""
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
        """Log the output that is ready; return False at the end of the output."""
        try:
            data = os.read(self._out, _PIPE_BYTES)
        except BlockingIOError:
            return True
        for text in self._lines.add(data):
            log.info(
                "model %(model_process)s: %(text)s",
                {"event": "model.printed", "model_process": self.title, "text": text},
            )
        if self._lines.is_over_budget:
            time.sleep(_PAUSE_S)
        return bool(data)

    def reap(self) -> None:
        """Wait for the exit of the process, set `end` and `died`, and close its descriptors."""
        # A program that embeds the server may let the kernel reap all children: ChildProcessError. Without a free file
        # descriptor /proc cannot be read.
        with suppress(OSError):
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
            if count := started.end_all(self._mark, self.pid):
                log.info(
                    "model %(model_process)s: %(processes)d processes that it had started were killed",
                    {"event": "model.children_killed", "model_process": self.title, "processes": count},
                )
        with self._signalling:
            # Also of a process that the kernel has reaped.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
            code = self._popen.wait()
            self.end = self._killed_for or exit_text(code)
            self.died.set()
        poll = select.poll()
        poll.register(self._out, select.POLLIN)
        until = time.monotonic() + _LAST_OUTPUT_S
        while poll.poll(max(until - time.monotonic(), 0) * 1000) and self._drain():
            pass
        os.close(self._out)
        os.close(self._pidfd)
        # A thread may wait in the channel, and a process that the model started may hold the other end.
        self.channel.shut()


def exit_text(code: int) -> str:
    """Return text for an exit status, or for minus a signal's number."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {-code}, {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"


CHILD, OWNER = "services.infer.model_process.child.main", "services.infer.model_process.shared.owner"


def program(python: str, environment: Mapping[str, str], folder: str, module: str = CHILD) -> Program:
    """Return the program that runs `module` with the interpreter `python`."""
    # -P: the working directory is not searched for modules.
    safe = ("-P",) if sys.version_info >= (3, 11) else ()
    return Program((python, *safe, "-m", module), environment, folder)
