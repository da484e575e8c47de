"""The files that an operation needs: in the version's folder, or beside the model's configuration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from services.infer.error_text import listed, quoted
from services.infer.model_files.wanted_models import read_bytes, read_text
from shoal.errors import FailedPrecondition

_MAX_BYTES = 64 << 20
# A tokenizer of a quarter of a million tokens has some twenty megabytes.


class Assets:
    """Reads files by name."""

    def __init__(self, folders: Sequence[Path]) -> None:
        """Looks in these, the first one first."""
        self._folders = tuple(folders)

    def has(self, name: str) -> bool:
        return any((folder / name).is_file() for folder in self._folders)

    def text(self, name: str) -> str:
        """Raises FailedPrecondition when it is not there, not UTF-8, too large, or no plain file."""
        return read_text(self._file(name), _MAX_BYTES)

    def data(self, name: str) -> bytes:
        """As `text`."""
        return read_bytes(self._file(name), _MAX_BYTES)

    def lines(self, name: str) -> list[str]:
        """The lines of a text, without what ends them; spaces count, and so do empty lines but for the last."""
        text = self.text(name)
        lines = text.split("\n")
        if lines[-1] == "":
            lines.pop()
        return [line.removesuffix("\r") for line in lines]

    def first(self, names: Sequence[str]) -> str:
        """The first of these that is there. Raises FailedPrecondition when none is."""
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
