"""Servers under attack, `shoal serve` and the node of `shoal up`, of this checkout or another."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
READY_S = 90.0
STOP_S = 60.0
MIB = 1 << 20

# Before this process leaves processor 0 to the servers.
_PROCESSORS = len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Checkout:
    """A checkout of Shoal, with the interpreter of its environment."""

    name: str
    folder: Path
    python: str
    uses_whole_machine: bool = False
    """Servers run on every processor, with their default threads for models: not on processor 0 with one."""

    def command(self, *arguments: str) -> list[str]:
        return [self.python, "-m", "shoal.cli.main", *arguments]

    def on_its_processors(self, command: Sequence[str]) -> list[str]:
        """Return a server's command as run on the processors that are its own."""
        return list(command) if self.uses_whole_machine or _PROCESSORS == 1 else ["taskset", "-c", "0", *command]

    def environ(self, **more: str) -> dict[str, str]:
        # The checkout's modules take precedence, even if its environment was built for another checkout.
        threads = {} if self.uses_whole_machine else {"SHOAL_INFER_THREADS": "1"}
        return {**os.environ, "PYTHONPATH": str(self.folder), **threads, **more}


def take_precedence(pids: Iterable[int]) -> None:
    """Run processes before other work of the machine. Needs root, and a kernel with autogroups (sched(7)).

    The nice value of each process's session is set to 15 below that of the process: processes that Shoal runs at a
    lower priority keep it beside the others.
    """
    for pid in pids:
        nice = os.getpriority(os.PRIO_PROCESS, pid) - 15
        Path(f"/proc/{pid}/autogroup").write_text(str(nice))


def here() -> Checkout:
    return Checkout("now", ROOT, sys.executable)


def other(folder: Path) -> Checkout:
    return Checkout("before", folder, str(folder / ".venv/bin/python"))


@dataclass
class Server:
    """A running server."""

    process: subprocess.Popen[bytes]
    address: str
    """For bystanders and attackers."""
    probe: str
    """The infer process itself, without anything in front."""
    infer: int
    envoy: int | None
    log: Path
    others: Mapping[str, int] = field(default_factory=dict)
    """Processes of the node that are neither of these two, by name."""
    job_probes: Sequence[str] = ()
    """Ingest and store themselves."""

    def take_precedence(self) -> None:
        """Run the server before other work of the machine, and this process, too. Needs root."""
        pids = (self.process.pid, self.infer, self.envoy, *self.others.values(), os.getpid())
        take_precedence(pid for pid in pids if pid is not None)

    def is_running(self) -> bool:
        return self.process.poll() is None and all(_exists(pid) for pid in (self.infer, self.envoy) if pid)

    def stop(self) -> float | None:
        """Send SIGTERM. Return the seconds until the end; None when the server had to be killed."""
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            return None
        return time.monotonic() - began


@contextlib.contextmanager
def serve(checkout: Checkout, models: Path, folder: Path) -> Iterator[Server]:
    """Run `shoal serve` on loopback."""
    log = folder / "serve.log"
    arguments = checkout.command("serve", str(models), "--port", "0", "--json")
    with log.open("wb") as errors:
        process = subprocess.Popen(
            checkout.on_its_processors(arguments),
            stdout=subprocess.PIPE,
            stderr=errors,
            env=checkout.environ(),
            cwd=folder,
        )
    try:
        assert process.stdout is not None
        text = ""
        for line in process.stdout:
            text += line.decode()
            if text.endswith("\n}\n"):
                break
        if process.poll() is not None:
            sys.exit(f"the server ended with {process.returncode}: {log.read_text()[-2000:]}")
        document = json.loads(text)
        yield Server(process, document["address"], document["address"], document["pids"][0], None, log)
    finally:
        _end(process)


@contextlib.contextmanager
def node(checkout: Checkout, models: Path, folder: Path, *options: str) -> Iterator[Server]:
    """Run `shoal up` with the models pushed, and with further options; clients call its gateway."""
    ready, runtime, log = folder / "ready.json", folder / "runtime", folder / "up.log"
    ready.unlink(missing_ok=True)
    runtime.mkdir(mode=0o700, exist_ok=True)
    environ = checkout.environ(XDG_RUNTIME_DIR=str(runtime))
    arguments = ["up", "--data-dir", str(folder / "data"), "--admin-port", "0", *options]
    arguments += () if "--listen" in options else ("--gateway-port", "0")
    with log.open("wb") as out:
        process = subprocess.Popen(
            checkout.on_its_processors(checkout.command(*arguments, "--ready-file", str(ready))),
            stdout=out,
            stderr=out,
            env=environ,
            cwd=folder,
        )
    try:
        _wait_for(ready, process, log)
        push = checkout.command("models", "push", str(models))
        subprocess.run(push, check=True, stdout=subprocess.DEVNULL, env=environ, cwd=folder, timeout=READY_S)
        document = json.loads(ready.read_text())
        pids = document["pids"]
        infer, envoy = pids.pop("infer-0"), pids.pop("envoy")
        probes = [_listen(pids[name]) for name in ("ingest-0", "store-0")]
        yield Server(process, document["gateway"], _listen(infer), infer, envoy, log, pids, probes)
    finally:
        _end(process)


FRONTS = {"serve": serve, "gateway": node}


def _wait_for(ready: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + READY_S
    while not ready.exists():
        if process.poll() is not None or time.monotonic() > until:
            sys.exit(f"the node did not start: {log.read_text()[-2000:]}")
        time.sleep(0.05)


def _listen(pid: int) -> str:
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next(each.partition(b"=")[2].decode() for each in variables if re.match(rb"SHOAL_[A-Z]+_LISTEN=", each))


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


# -- memory


def resident_mib(pid: int) -> float:
    """Return the resident memory of a process; 0 after its end."""
    return _status(pid).get("VmRSS", 0) / 1024


def peak_mib(pid: int) -> float:
    """Return the largest resident memory since the last `reset_peak`."""
    return _status(pid).get("VmHWM", 0) / 1024


def reset_peak(pid: int) -> None:
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/clear_refs").write_text("5")


def _status(pid: int) -> Mapping[str, int]:
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return {}
    return {name: int(size) for name, size in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.M)}
