"""Files that an operation needs: in the version's folder, or beside the model's configuration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from services.infer.error_text import listed, quoted
from services.infer.model_files.wanted_models import read_bytes, read_text
from shoal.errors import FailedPrecondition

# A tokenizer of a quarter of a million tokens has about twenty megabytes.
_MAX_BYTES = 64 << 20


class Assets:
    """Reader of files by name."""

    def __init__(self, folders: Sequence[Path]) -> None:
        """Store the folders to search; an earlier folder takes precedence."""
        self._folders = tuple(folders)

    def has(self, name: str) -> bool:
        return any((folder / name).is_file() for folder in self._folders)

    def text(self, name: str) -> str:
        """Return the text of a file.

        Raises:
            FailedPrecondition: the file is missing, not UTF-8, too large, or not a plain file.
        """
        return read_text(self._file(name), _MAX_BYTES)

    def data(self, name: str) -> bytes:
        """Return the bytes of a file. Raises FailedPrecondition as `text`."""
        return read_bytes(self._file(name), _MAX_BYTES)

    def lines(self, name: str) -> list[str]:
        """Return the lines of a text without line endings. Keeps spaces, and empty lines except the last."""
        text = self.text(name)
        lines = text.split("\n")
        if lines[-1] == "":
            lines.pop()
        return [line.removesuffix("\r") for line in lines]

    def first(self, names: Sequence[str]) -> str:
        """Return the first of these names that exists. Raises FailedPrecondition when none does."""
        found = next((name for name in names if self.has(name)), None)
        if found is None:
            raise FailedPrecondition(f"none of the files {listed(names)} is in the version's folder")
        return found

    def _file(self, name: str) -> Path:
        if Path(name).name != name or name in (".", ".."):
            raise FailedPrecondition(f"file {quoted(name)}: expected a name without folders")
        found = next((folder / name for folder in self._folders if (folder / name).exists()), None)
        if found is None:
            raise FailedPrecondition(f"file {quoted(name)} is neither in the version's folder nor in the model's")
        return found
