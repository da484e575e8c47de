"""The main of an owner: `python -m services.infer.model_process.shared.owner FD FOLDER KEY`.

first connection's "load" ──> load ──> "loaded" | "failed" to each that asks ──> serve ──> the last one leaves ──> exit

It belongs to no infer process: one that dies takes nothing of another's with it. When none is left, the kernel ends it,
whatever it is doing: all of them hold a pipe open of which it is told when nobody does.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from services.infer.model_process.channel import ChannelClosed, Message
from services.infer.model_process.child.engine import serve
from services.infer.model_process.child.main import TEXT, exit_now, hosted_of
from services.infer.model_process.hosted import Hosted, LoadFailed
from services.infer.model_process.shared.connection import Connection
from services.infer.model_process.shared.multiplexer import Multiplexer
from services.infer.model_process.shared.owners import ALIVE, locked

_FIRST_S = 60.0
# Who started it connects at once, or has died.
_LAST_RUN_S = 5.0


class Owner:
    """A model's process, from its first connection to its last."""

    def __init__(self, listening: socket.socket, folder: Path, key: str) -> None:
        self._listening, self._folder, self._key = listening, folder, key
        self._junction = Multiplexer()
        self._present = 0
        """Connections that are open, or only being admitted."""
        self._held: list[Connection] = []
        """The one that left last: it is told by the end of the process, and waits for that."""
        self._lock = threading.Lock()
        self._left = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._load: Message | None = None
        self._is_asked = threading.Event()
        """There is something to load, or nobody wants anything."""
        self._told: dict[str, Any] = {}
        self._is_told = threading.Event()

    def run(self) -> None:
        """Serves until nobody is left."""
        threading.Thread(target=_or_exit, args=(self._keep_door,), name="door", daemon=True).start()
        self._is_asked.wait()
        if self._load is None:
            return
        try:
            hosted = hosted_of(self._load, self._junction.call)
        except LoadFailed as err:
            self._tell({"op": "failed", "error": str(err)[:TEXT]})
            self._wait_until_left()
            return
        self._tell({"op": "loaded", **vars(hosted.facts)})
        self._serve(hosted, int(self._load.header["load"].get("runs", 1)))

    def _serve(self, hosted: Hosted, runs: int) -> None:
        """One execution on the main thread, where the model was loaded, and the others beside it."""

        def work() -> None:
            serve(self._junction, self._junction, hosted)

        others = [threading.Thread(target=_or_exit, args=(work,), name=f"run {n}", daemon=True) for n in range(1, runs)]
        for thread in others:
            thread.start()
        work()
        for thread in others:
            thread.join(_LAST_RUN_S)
        if not any(thread.is_alive() for thread in others):
            try:
                hosted.close()
            except BaseException:
                traceback.print_exc()

    def _tell(self, said: dict[str, Any]) -> None:
        self._told = said
        self._is_told.set()

    def _wait_until_left(self) -> None:
        """Waits until everybody has heard that there is no model, and has gone."""
        while self._junction.next().op != "close":
            pass

    def _keep_door(self) -> None:
        poll = select.poll()
        poll.register(self._listening, select.POLLIN)
        poll.register(self._left, select.POLLIN)
        patience_ms: float | None = _FIRST_S * 1000
        while True:
            ready = {fd for fd, _ in poll.poll(patience_ms)}
            if self._listening.fileno() in ready:
                patience_ms = None
                self._admit()
            if self._left in ready:
                os.eventfd_read(self._left)
            if (self._left in ready or not ready) and self._has_left():
                return

    def _admit(self) -> None:
        sock, _ = self._listening.accept()
        with self._lock:
            self._present += 1
        threading.Thread(target=_or_exit, args=(lambda: self._attend(sock),), name="connection", daemon=True).start()

    def _has_left(self) -> bool:
        """Whether nobody is there and nobody will come: then it leaves."""
        poll = select.poll()
        poll.register(self._listening, select.POLLIN)
        with locked(self._folder / f"{self._key}.lock"):
            with self._lock:
                stays = bool(self._present or poll.poll(0))
                held, self._held = (self._held, []) if stays else ([], self._held)
            for connection in held:
                connection.close()
            if stays:
                return False
            (self._folder / f"{self._key}.sock").unlink(missing_ok=True)
            self._listening.close()
        self._is_asked.set()
        self._junction.close()
        return True

    def _attend(self, sock: socket.socket) -> None:
        try:
            connection = Connection(sock)
        except (OSError, ValueError):
            sock.close()
            self._depart()
            return
        try:
            self._receive(connection)
        except ChannelClosed:
            pass
        finally:
            self._leave(connection)

    def _receive(self, connection: Connection) -> None:
        message = connection.channel.receive()
        assert message is not None, "it waits without a bound"
        with self._lock:
            self._load = self._load or message
        self._is_asked.set()
        self._is_told.wait()
        connection.send(self._told)
        while (message := connection.channel.receive()) is not None and message.op != "close":
            self._junction.take(connection, message)

    def _leave(self, connection: Connection) -> None:
        """Its end is closed at once, unless it is the last: that one is told by the end of the process."""
        self._junction.leave(connection)
        self._depart(connection)

    def _depart(self, connection: Connection | None = None) -> None:
        with self._lock:
            self._present -= 1
            is_last = not self._present
            if is_last and connection is not None:
                self._held.append(connection)
        if not is_last and connection is not None:
            connection.close()
        os.eventfd_write(self._left, 1)


def main(listening: int, folder: str, key: str) -> NoReturn:
    """Owns one model, then exits."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's: it lets calls under way finish.
    _or_exit(lambda: _end_with_all(Path(folder) / ALIVE))
    _or_exit(Owner(socket.socket(fileno=listening), Path(folder), key).run)
    exit_now(0)


def _end_with_all(alive: Path) -> None:
    """From now on the kernel kills this process once no infer process has the pipe open any more."""
    fd = os.open(alive, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.fcntl(fd, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_ASYNC)
    poll = select.poll()
    poll.register(fd, 0)
    if poll.poll(0):  # They went before it was set up. (POLLHUP is told unasked.)
        exit_now(0)


def _or_exit(work: Callable[[], object]) -> None:
    """Runs it; what it raises ends the process, with a trace."""
    try:
        work()
    except BaseException:
        traceback.print_exc()
        exit_now(1)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
