"""The original packages, in an environment of their own: their files, and their own answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv-originals"


def folder(package: str) -> Path:
    """Where the package lies. Ends the program, with what to do, when it is not there."""
    found = next(VENV.glob(f"lib/python3*/site-packages/{package}"), None)
    if found is None:
        sys.exit(f"{package} is not installed in {VENV}: run `make {VENV.name}/.installed` (or `make test`) first")
    return found


def ask(script: Path, question: Any) -> Any:
    """What `script` answers in that environment: JSON in on its stdin, JSON out on its stdout. One thread, no network.

    Raises:
        RuntimeError: it failed; the message has the end of what it said.
    """
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [VENV / "bin/python", script],
        input=json.dumps(question),
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{script.name} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout)
