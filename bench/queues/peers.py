"""Other job queues as processes: servers, workers and clients.

Servers are from unpacked Debian packages (`apt-get download redis-server ...; dpkg-deb -x X.deb ROOT`). The queues are
from environments of their own; the project's environment contains none of them.
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
    """Paths of the other queues' packages and interpreters."""

    root: Path
    """Folder of the unpacked packages: usr/bin/redis-server, usr/lib/rabbitmq, usr/lib/erlang."""
    python: Path
    """Interpreter of an environment with celery[redis], dramatiq[redis], onnxruntime."""
    arq_python: Path
    """Interpreter of an environment with onnxruntime and arq, which needs an older redis."""


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
    """Signal the process group of `running`, which it leads, and wait for the process."""
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
    raise TimeoutError(f"no process listens at port {port} after {_START_S:.0f} s:\n{log.read_text()[-2000:]}")


@contextmanager
def redis(places: Places, folder: Path) -> Iterator[str]:
    """Run a Redis that syncs each write to disk before it answers; yield its URL."""
    folder.mkdir()
    port, log = free_port(), folder / "redis.log"
    argv = [str(places.root / "usr/bin/redis-server"), "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]
    argv += ["--appendonly", "yes", "--appendfsync", "always", "--save", ""]
    with process(argv, log, LD_LIBRARY_PATH=str(places.root / "usr/lib/x86_64-linux-gnu")):
        wait_for_port(port, log)
        yield f"redis://127.0.0.1:{port}/0"


@contextmanager
def rabbitmq(places: Places, folder: Path) -> Iterator[str]:
    """Run a RabbitMQ from its unpacked package; yield its URL."""
    folder.mkdir()
    port, log = free_port(), folder / "rabbitmq.log"
    erlang, home = places.root / "usr/lib/erlang", places.root / "usr/lib/rabbitmq/lib"
    # The script contains its installation path.
    erl = erlang / "bin/erl"
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
    """One of the other queues, with a running server. `environ` configures its workers and clients."""

    name: str
    python: Path
    environ: dict[str, str]
    folder: Path
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def call(self, *args: object) -> Any:
        """Run `caller.py` and return its output."""
        argv = [str(self.python), str(HERE / "caller.py"), *map(str, args)]
        env = {**os.environ, **self.environ}
        done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=600, check=False)
        if done.returncode:
            raise RuntimeError(f"{self.name}: {done.stderr[-2000:]}")
        return json.loads(done.stdout)

    def stored(self) -> int:
        """Return the number of stored results plus a constant, from counters of Redis, at almost no cost."""
        host, port = self.environ["RESULTS_URL"].removeprefix("redis://").partition("/")[0].split(":")
        with socket.create_connection((host, int(port)), 10) as redis:
            # A job of arq leaves its queue when it has a result.
            if self.name == "arq":
                redis.sendall(b"ZCARD arq:queue\r\n")
                return -int(redis.makefile("rb").readline()[1:])
            # The results of the other queues are in a database of their own.
            redis.sendall(b"SELECT 1\r\nDBSIZE\r\n")
            lines = redis.makefile("rb")
            lines.readline()
            return int(lines.readline()[1:])

    @contextmanager
    def working(self, processes: int = 1) -> Iterator[Callable[[], None]]:
        """Run workers during the block; yield a function that kills and restarts all of them."""
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
    """Run the servers of the queue `name`: celery-redis, celery-rabbitmq, dramatiq or arq."""
    folder.mkdir()
    with ExitStack() as stack:
        results = stack.enter_context(redis(places, folder / "redis"))
        url = stack.enter_context(rabbitmq(places, folder / "rabbitmq")) if name == "celery-rabbitmq" else results
        # A database of their own for results, except for arq, which cannot.
        results_url = results if name == "arq" else results[:-1] + "1"
        environ = {"QUEUE": name, "QUEUE_URL": url, "RESULTS_URL": results_url, "MODEL": str(model), **env}
        yield Queue(name, places.arq_python if name == "arq" else places.python, environ, folder)
