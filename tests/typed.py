"""Type check of a piece of code that uses Shoal, with mypy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def mypy_says(source: str, folder: Path, root: Path) -> str:
    """Return the output of `mypy --strict` with the project's settings. `folder` gets the file and mypy's cache."""
    file = folder / "snippet.py"
    file.write_text(source)
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports", "silent", "--cache-dir", str(folder)]
    done = subprocess.run(
        [*command, "--config-file", "pyproject.toml", str(file)], cwd=root, capture_output=True, text=True, check=False
    )
    return done.stdout
