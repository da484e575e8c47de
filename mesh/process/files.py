"""Files that are replaced as a whole."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: Path, content: str | bytes, *, is_private: bool = False) -> None:
    """Write a file so that a reader sees the old content or the new one, never a part.

    With `is_private`, only the owner can read the file, and a power failure does not leave it empty.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with os.fdopen(os.open(temporary, flags, 0o600 if is_private else 0o666), "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            if is_private:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
