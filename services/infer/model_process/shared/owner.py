"""Main module of an owner: `python -m services.infer.model_process.shared.owner FD FOLDER KEY`.

first connection's "load" ──> load ──> "loaded" | "failed" to each connection ──> serve ──> last disconnect ──> exit

An owner is the shared process of one model. It belongs to no infer process, so the death of one does not affect the
others. All infer processes hold a pipe open; the kernel kills the owner when the last of them has closed it.
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
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from services.infer.model_process.channel import ChannelClosed, Message
from services.infer.model_process.child.engine import serve
from services.infer.model_process.child.main import MAX_LOAD_ERROR_CHARACTERS, exit_now, load_hosted
from services.infer.model_process.hosted import Hosted, LoadFailed
from services.infer.model_process.shared.connection import Connection
from services.infer.model_process.shared.multiplexer import Multiplexer
from services.infer.model_process.shared.owners import ALIVE, locked

# Longest wait for the first connection: the infer process that started the owner connects immediately, or has died.
_FIRST_S = 60.0
# Longest wait for running executions before the model is closed.
_LAST_RUN_S = 5.0


class Owner:
    """A shared model process, from its first connection to its last."""

    def __init__(self, listening: socket.socket, folder: Path, key: str) -> None:
        self._listening, self._folder, self._key = listening, folder, key
        self._multiplexer = Multiplexer()
        self._open_connections = 0
        """Includes accepted connections whose first message has not arrived."""
        self._last_connections: list[Connection] = []
        """The connection that disconnected last stays open: the end of the process closes it."""
        self._lock = threading.Lock()
        self._disconnected = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._load: Message | None = None
        self._load_requested = threading.Event()
        """Set when `_load` is set, or when the owner exits without any load request."""
        self._load_reply: dict[str, Any] = {}
        self._is_load_done = threading.Event()

    def run(self) -> None:
        """Serve until the last connection has disconnected."""
        threading.Thread(target=_or_exit, args=(self._accept_loop,), name="accept", daemon=True).start()
        self._load_requested.wait()
        if self._load is None:
            return
        try:
            hosted = load_hosted(self._load, self._multiplexer.call)
        except LoadFailed as err:
            self._set_load_reply({"op": "failed", "error": str(err)[:MAX_LOAD_ERROR_CHARACTERS]})
            self._wait_disconnected()
            return
        self._set_load_reply({"op": "loaded", **vars(hosted.model_info)})
        self._serve(hosted, int(self._load.header["load"].get("runs", 1)))

    def _serve(self, hosted: Hosted, runs: int) -> None:
        """Run one execution loop on the main thread, which has loaded the model, and the others on threads."""

        def work() -> None:
            serve(self._multiplexer, self._multiplexer, hosted)

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

    def _set_load_reply(self, header: dict[str, Any]) -> None:
        self._load_reply = header
        self._is_load_done.set()

    def _wait_disconnected(self) -> None:
        """Wait until all connections have received the load error and disconnected."""
        while self._multiplexer.next().op != "close":
            pass

    def _accept_loop(self) -> None:
        poll = select.poll()
        poll.register(self._listening, select.POLLIN)
        poll.register(self._disconnected, select.POLLIN)
        timeout_ms: float | None = _FIRST_S * 1000
        while True:
            ready = {fd for fd, _ in poll.poll(timeout_ms)}
            if self._listening.fileno() in ready:
                timeout_ms = None
                self._accept()
            if self._disconnected in ready:
                os.eventfd_read(self._disconnected)
            if (self._disconnected in ready or not ready) and self._stop_if_unused():
                return

    def _accept(self) -> None:
        sock, _ = self._listening.accept()
        with self._lock:
            self._open_connections += 1
        serve_connection = partial(self._serve_connection, sock)
        threading.Thread(target=_or_exit, args=(serve_connection,), name="connection", daemon=True).start()

    def _stop_if_unused(self) -> bool:
        """Stop listening and return True when no connection is open or waits to be accepted."""
        poll = select.poll()
        poll.register(self._listening, select.POLLIN)
        with locked(self._folder / f"{self._key}.lock"):
            with self._lock:
                is_used = bool(self._open_connections or poll.poll(0))
                closable = self._last_connections if is_used else []
                self._last_connections = [] if is_used else self._last_connections
            for connection in closable:
                connection.close()
            if is_used:
                return False
            (self._folder / f"{self._key}.sock").unlink(missing_ok=True)
            self._listening.close()
        self._load_requested.set()
        self._multiplexer.close()
        return True

    def _serve_connection(self, sock: socket.socket) -> None:
        try:
            connection = Connection(sock)
        except (OSError, ValueError):
            sock.close()
            self._count_disconnect()
            return
        try:
            self._receive(connection)
        except ChannelClosed:
            pass
        finally:
            self._multiplexer.disconnect(connection)
            self._count_disconnect(connection)

    def _receive(self, connection: Connection) -> None:
        message = connection.channel.receive()
        assert message is not None, "receive() without a timeout returns a message"
        with self._lock:
            self._load = self._load or message
        self._load_requested.set()
        self._is_load_done.wait()
        connection.send(self._load_reply)
        while (message := connection.channel.receive()) is not None and message.op != "close":
            self._multiplexer.receive(connection, message)

    def _count_disconnect(self, connection: Connection | None = None) -> None:
        """Close `connection` and count it as closed. The last one stays open until the process ends or serves again."""
        with self._lock:
            self._open_connections -= 1
            is_last = not self._open_connections
            if is_last and connection is not None:
                self._last_connections.append(connection)
        if not is_last and connection is not None:
            connection.close()
        os.eventfd_write(self._disconnected, 1)


def main(listening: int, folder: str, key: str) -> NoReturn:
    """Serve one model as its owner, then exit."""
    # Ctrl-C is for the server, which drains running requests first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _or_exit(lambda: _die_with_infer_processes(Path(folder) / ALIVE))
    _or_exit(Owner(socket.socket(fileno=listening), Path(folder), key).run)
    exit_now(0)


def _die_with_infer_processes(alive: Path) -> None:
    """Have the kernel kill this process once no infer process has the pipe `alive` open any more."""
    fd = os.open(alive, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.fcntl(fd, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_ASYNC)
    poll = select.poll()
    poll.register(fd, 0)
    # All infer processes may have ended before the signal was set up. (poll reports POLLHUP without being asked.)
    if poll.poll(0):
        exit_now(0)


def _or_exit(work: Callable[[], object]) -> None:
    """Run `work`; an exception is printed and ends the process."""
    try:
        work()
    except BaseException:
        traceback.print_exc()
        exit_now(1)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
