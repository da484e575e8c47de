"""The original packages, in an environment of their own: access to their files and to their answers."""

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
    """Return the folder of a package, or exit with instructions if the package is not installed."""
    found = next(VENV.glob(f"lib/python3*/site-packages/{package}"), None)
    if found is None:
        sys.exit(f"{package} is not installed in {VENV}: run `make {VENV.name}/.installed` (or `make test`) first")
    return found


def ask(script: Path, question: Any) -> Any:
    """Run `script` in that environment, with JSON on stdin and stdout, one thread and no network; return its answer.

    Raises:
        RuntimeError: the script failed; the message contains the end of its stderr.
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
