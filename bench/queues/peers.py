"""Other job queues, as processes: their servers, their workers, and calls of them.

Servers come from unpacked Debian packages (`apt-get download redis-server ...; dpkg-deb -x X.deb ROOT`), the queues
from environments of their own: none of it is installed here.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoal.node.processes import free_port

HERE = Path(__file__).parent
_START_S = 60.0


@dataclass(frozen=True)
class Places:
    """Where the parts of others are."""

    root: Path
    """The unpacked packages: usr/bin/redis-server, usr/lib/rabbitmq, usr/lib/erlang."""
    python: Path
    """Of an environment with celery[redis], dramatiq[redis], onnxruntime."""
    arq_python: Path
    """Of one with arq, which wants an older redis, and onnxruntime."""


@contextmanager
def process(argv: Sequence[str], log: Path, **env: str) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("ab") as out:
        running = subprocess.Popen(
            argv, stdout=out, stderr=out, env={**os.environ, **env}, start_new_session=True, cwd=HERE
        )
    try:
        yield running
    finally:
        stop(running)


def stop(running: subprocess.Popen[bytes], number: int = signal.SIGKILL) -> None:
    """Signals it and all that it started (it leads a group of its own), and waits for it."""
    if running.poll() is None:
        os.killpg(running.pid, number)
    running.wait(30)


def wait_for_port(port: int, log: Path) -> None:
    until = time.monotonic() + _START_S
    while time.monotonic() < until:
        try:
            with socket.create_connection(("127.0.0.1", port), 0.5):
                return
        except OSError:
            time.sleep(0.05)
    raise TimeoutError(f"nobody listens at {port}:\n{log.read_text()[-2000:]}")


@contextmanager
def redis(places: Places, folder: Path) -> Iterator[str]:
    """A Redis that syncs each write to disk before it answers; gives its URL."""
    folder.mkdir()
    port, log = free_port(), folder / "redis.log"
    argv = [str(places.root / "usr/bin/redis-server"), "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]
    argv += ["--appendonly", "yes", "--appendfsync", "always", "--save", ""]
    with process(argv, log, LD_LIBRARY_PATH=str(places.root / "usr/lib/x86_64-linux-gnu")):
        wait_for_port(port, log)
        yield f"redis://127.0.0.1:{port}/0"


@contextmanager
def rabbitmq(places: Places, folder: Path) -> Iterator[str]:
    """A RabbitMQ, from its unpacked package; gives its URL."""
    folder.mkdir()
    port, log = free_port(), folder / "rabbitmq.log"
    erlang, home = places.root / "usr/lib/erlang", places.root / "usr/lib/rabbitmq/lib"
    erl = erlang / "bin/erl"  # Its own path is written into it.
    erl.write_text(erl.read_text().replace("ROOTDIR=/usr/lib/erlang", f"ROOTDIR={erlang}"))
    server = next(home.glob("rabbitmq_server-*"))
    epmd, dist = free_port(), free_port()
    env = {
        "PATH": f"{erlang}/bin:{os.environ['PATH']}",
        "HOME": str(folder),
        "ERL_EPMD_PORT": str(epmd),
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODE_PORT": str(port),
        "RABBITMQ_DIST_PORT": str(dist),
        "RABBITMQ_NODENAME": f"bench{port}@localhost",
        "RABBITMQ_MNESIA_BASE": str(folder / "data"),
        "RABBITMQ_LOG_BASE": str(folder / "logs"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"),
        "RABBITMQ_CONF_ENV_FILE": str(folder / "none"),
    }
    with process([str(erlang / "bin/epmd")], log, **env), process([str(server / "sbin/rabbitmq-server")], log, **env):
        wait_for_port(port, log)
        yield f"amqp://guest:guest@127.0.0.1:{port}//"


@dataclass
class Queue:
    """One of the others, with its server up. `environ` tells its processes where all is."""

    name: str
    python: Path
    environ: dict[str, str]
    folder: Path
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def call(self, *args: object) -> Any:
        """What `caller.py` says."""
        argv = [str(self.python), str(HERE / "caller.py"), *map(str, args)]
        env = {**os.environ, **self.environ}
        done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=600, check=False)
        if done.returncode:
            raise RuntimeError(f"{self.name}: {done.stderr[-2000:]}")
        return json.loads(done.stdout)

    def stored(self) -> int:
        """How many results are stored, less a constant: asked of Redis itself, which costs it next to nothing."""
        host, port = self.environ["RESULTS_URL"].removeprefix("redis://").partition("/")[0].split(":")
        with socket.create_connection((host, int(port)), 10) as redis:
            if self.name == "arq":  # What has a result is not in its queue any more.
                redis.sendall(b"ZCARD arq:queue\r\n")
                return -int(redis.makefile("rb").readline()[1:])
            redis.sendall(b"SELECT 1\r\nDBSIZE\r\n")  # Its results have a database of their own.
            lines = redis.makefile("rb")
            lines.readline()
            return int(lines.readline()[1:])

    @contextmanager
    def working(self, processes: int = 1) -> Iterator[Callable[[], None]]:
        """Workers run in the block; what it gives kills all of them at once, and starts them again."""
        with ExitStack() as stack:
            running = [stack.enter_context(process(self._command(processes), self._log(), **self.environ))]

            def restart() -> None:
                stop(running.pop())
                running.append(stack.enter_context(process(self._command(processes), self._log(), **self.environ)))

            yield restart

    def _log(self) -> Path:
        return self.folder / "worker.log"

    def _command(self, processes: int) -> list[str]:
        bin_ = self.python.parent
        if self.name.startswith("celery"):
            return [str(bin_ / "celery"), "-A", "tasks", "worker", "-c", str(processes), "--loglevel", "WARNING"]
        if self.name == "dramatiq":
            return [str(bin_ / "dramatiq"), "tasks", "-p", str(processes), "-t", "8"]
        return [str(bin_ / "arq"), "tasks.WorkerSettings"]


@contextmanager
def queue(name: str, places: Places, folder: Path, model: Path, **env: str) -> Iterator[Queue]:
    """The queue `name`: celery-redis, celery-rabbitmq, dramatiq or arq."""
    folder.mkdir()
    with ExitStack() as stack:
        results = stack.enter_context(redis(places, folder / "redis"))
        url = stack.enter_context(rabbitmq(places, folder / "rabbitmq")) if name == "celery-rabbitmq" else results
        kept = results if name == "arq" else results[:-1] + "1"  # A database of their own, where that can be.
        environ = {"QUEUE": name, "QUEUE_URL": url, "RESULTS_URL": kept, "MODEL": str(model), **env}
        yield Queue(name, places.arq_python if name == "arq" else places.python, environ, folder)
