"""A real node (`shoal up`) for the examples, in a temporary folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from shoal.errors import ShoalError

READY_S = 60.0
"""Timeout of the start, which takes seconds on an idle machine."""

STOP_S = 30.0
"""Timeout of a stop, in which calls in flight finish and processes end."""


class NotReady(Exception):
    """The node did not become ready; the message contains the end of its log."""


@contextmanager
def running(folder: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start a node with all its data in `folder`, and stop it at the end of the block, also after an error."""
    command = [sys.executable, "-m", "shoal.cli.main", "up", "--data-dir", str(folder / "data")]
    command += ["--gateway-port", "0", "--admin-port", "0", "--ready-file", str(folder / "ready.json"), *options]
    with (folder / "up.log").open("wb") as log:
        # In a session of its own, the node does not receive Ctrl-C. The demo does, and stops the node gracefully.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Stop the node: gracefully, then immediately, then with SIGKILL."""
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        # The second signal stops the node immediately.
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_ready(process: subprocess.Popen[bytes], folder: Path) -> str:
    """Wait until the node is ready, and return the gateway's address.

    Raises:
        NotReady: the node ended, or the start took too long.
    """
    ready = folder / "ready.json"
    deadline = time.monotonic() + READY_S
    while not ready.exists():
        if process.poll() is not None:
            raise NotReady(f"the node ended with status {process.returncode} before it was ready\n{log_tails(folder)}")
        if time.monotonic() > deadline:
            raise NotReady(f"the node was not ready after {READY_S:.0f} s\n{log_tails(folder)}")
        time.sleep(0.02)
    return str(json.loads(ready.read_text())["gateway"])


def log_tails(folder: Path) -> str:
    """Return the last lines of the logs of the node and its processes."""
    logs = [folder / "up.log", *sorted(folder.glob("data/logs/*.log"))]
    return "\n".join(f"--- {log.name}\n{_tail(log)}" for log in logs if log.exists())


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])


def with_node(example: Callable[[str, Path], int], *options: str) -> int:
    """Run `example(gateway, folder)` with a node in a temporary folder, and return the exit status.

    The status is that of the example, 1 when the node or a call failed, or 130 after an interrupt.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        with tempfile.TemporaryDirectory(prefix="shoal-example-") as name:
            folder = Path(name)
            # Temporary files of other packages are removed with the folder.
            os.environ["TMPDIR"] = name
            print("starting a node ...", flush=True)
            with running(folder, *options) as process:
                gateway = wait_until_ready(process, folder)
                try:
                    return example(gateway, folder)
                except ShoalError:
                    print(log_tails(folder), file=sys.stderr)
                    raise
    except NotReady as err:
        print(err, file=sys.stderr)
    except ShoalError as err:
        print(f"the example failed: {err.message}", file=sys.stderr)
    # Raised by `originals.ask`.
    except RuntimeError as err:
        print(f"the example failed: {err}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted: the node is stopped")
        return 130
    return 1
