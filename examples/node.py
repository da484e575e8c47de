"""A node for as long as a block lasts: the real `shoal up`, in a folder that is gone afterwards."""

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
"""It takes seconds; a machine that is busy may take longer."""

STOP_S = 30.0
"""In order: calls in flight end, then each process is waited for."""


class NotReady(Exception):
    """The node did not come up; the message has the end of its log."""


@contextmanager
def running(folder: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """Starts a node that keeps everything in `folder`; stops it when the block ends, however it ends."""
    command = [sys.executable, "-m", "shoal.cli.main", "up", "--data-dir", str(folder / "data")]
    command += ["--gateway-port", "0", "--admin-port", "0", "--ready-file", str(folder / "ready.json"), *options]
    with (folder / "up.log").open("wb") as log:
        # A session of its own: Ctrl-C is for the demo, which then stops the node in order.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends the node: in order, else at once."""
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.terminate()  # The second signal: at once.
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_ready(process: subprocess.Popen[bytes], folder: Path) -> str:
    """The gateway's address, once the node is ready.

    Raises:
        NotReady: it ended, or takes too long.
    """
    ready = folder / "ready.json"
    deadline = time.monotonic() + READY_S
    while not ready.exists():
        if process.poll() is not None:
            raise NotReady(f"the node ended with status {process.returncode} before it was ready\n{story(folder)}")
        if time.monotonic() > deadline:
            raise NotReady(f"the node was not ready after {READY_S:.0f} s\n{story(folder)}")
        time.sleep(0.02)
    return str(json.loads(ready.read_text())["gateway"])


def story(folder: Path) -> str:
    """The end of what the node and its processes said."""
    logs = [folder / "up.log", *sorted(folder.glob("data/logs/*.log"))]
    return "\n".join(f"--- {log.name}\n{_tail(log)}" for log in logs if log.exists())


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])


def with_node(example: Callable[[str, Path], int], *options: str) -> int:
    """Runs `example(gateway, folder)` beside a node of its own, in a folder that is gone afterwards; its exit status.

    1 when the node fails, or a call to it does; 130 when it was interrupted.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        with tempfile.TemporaryDirectory(prefix="shoal-example-") as name:
            folder = Path(name)
            os.environ["TMPDIR"] = name  # What anyone writes to the temporary folder goes with ours.
            print("starting a node ...", flush=True)
            with running(folder, *options) as process:
                gateway = wait_until_ready(process, folder)
                try:
                    return example(gateway, folder)
                except ShoalError:
                    print(story(folder), file=sys.stderr)
                    raise
    except NotReady as err:
        print(err, file=sys.stderr)
    except ShoalError as err:
        print(f"the example failed: {err.message}", file=sys.stderr)
    except RuntimeError as err:  # The original package's.
        print(f"the example failed: {err}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted: everything is stopped")
        return 130
    return 1
