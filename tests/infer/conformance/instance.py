"""A process that serves a folder of models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

FRONTS = ("h2", "envoy")
"""The server itself, and an Envoy in front of it."""

STOP_S = 30

EXPLICIT = {"SHOAL_INFER_MODEL_CONTROL": "explicit", "SHOAL_INFER_LOAD_MODELS": "*"}
"""Environment of an instance that serves every model, and loads and unloads models on request."""


@dataclass(frozen=True)
class Instance:
    """A running `shoal serve`."""

    process: subprocess.Popen[str]
    address: str
    pid: int
    """Of the server itself; `process` is its launcher."""
    envoy: int | None
    """The pid of the Envoy in front."""
    log: Path

    @staticmethod
    def started(root: Path, log: Path, environment: Mapping[str, str] | None = None, front: str = "auto") -> Instance:
        """Starts one and waits until every model has had its first attempt."""
        command = [sys.executable, "-m", "shoal.cli.main", "serve", str(root), "--port", "0", "--json"]
        command += ["--front", front]
        env = {**os.environ, **(environment or {})}
        with log.open("w") as errors:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=env)
        assert process.stdout
        text = ""
        while not text.endswith("\n}\n"):
            line = process.stdout.readline()
            assert line, f"it ended with {process.wait()}: {log.read_text()[-2000:]}"
            text += line
        said = json.loads(text)
        return Instance(process, said["address"], said["pid"], said["envoy"], log)

    @staticmethod
    @contextmanager
    def serving(
        root: Path, log: Path, environment: Mapping[str, str] | None = None, front: str = "auto"
    ) -> Iterator[Instance]:
        """Runs one until the block ends."""
        running = Instance.started(root, log, environment, front)
        try:
            yield running
        finally:
            running.stop()

    def stop(self) -> None:
        """Ends it in order; at once when it does not."""
        self.process.terminate()
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()
