"""Export of results to Parquet files in a local folder, written piece by piece."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from shoal.errors import DataLoss, FailedPrecondition
from shoal.store.v1 import store_pb2 as store

_NAME = re.compile(r"(part-\d{5}\.parquet|_manifest\.json)")


@dataclass(frozen=True)
class Exported:
    """Progress of an export."""

    rows: int = 0
    """Rows so far, including those of the unfinished part."""
    bytes: int = 0
    parts: int = 0
    cursor: str = ""
    """Resume token: another export to the same folder or URL continues after these parts."""
    complete: bool = False
    """True when everything is written, the manifest included."""
    answers_lost: int = 0
    """Rows whose answer is damaged in the store, and therefore missing: column `answer_lost` has the reason."""


class ExportFolder:
    """Writer of an export's files from their pieces. A file gets its final name once it is complete and synced."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._name = ""
        self._out: BinaryIO | None = None

    def check_empty(self) -> None:
        """Create the folder.

        Raises:
            FailedPrecondition: the folder cannot be created, or holds an export.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            found = sorted(path.name for path in self._folder.iterdir() if _NAME.fullmatch(path.name))
        except OSError as err:
            raise FailedPrecondition(f"cannot export to {self._folder}: {err.strerror}") from err
        if found:
            raise FailedPrecondition(
                f"{self._folder} holds an export or a part of one ({found[0]}): choose another folder, or resume that "
                "export with its cursor"
            )

    def add(self, piece: store.ExportResultsResponse) -> bool:
        """Write a piece. Return True when everything up to the piece's cursor is on the disk.

        Raises:
            FailedPrecondition: the file cannot be written.
            DataLoss: the pieces do not fit together.
        """
        if not piece.file:
            return not self._out
        if not _NAME.fullmatch(piece.file):
            raise DataLoss(f"the node sent a file {piece.file!r}, which is no name of an export's file")
        try:
            return self._write(piece)
        except OSError as err:
            raise FailedPrecondition(f"cannot write {self._folder / piece.file}: {err.strerror}") from err

    def close(self) -> None:
        """Close and remove the unfinished file."""
        if self._out is not None:
            self._out.close()
            self._out = None
            self._partial.unlink(missing_ok=True)

    @property
    def _partial(self) -> Path:
        return self._folder / f".{self._name}.{os.getpid()}.partial"

    def _write(self, piece: store.ExportResultsResponse) -> bool:
        if piece.offset == 0:
            self.close()
            self._name = piece.file
            self._out = self._partial.open("wb")
        if self._out is None or self._name != piece.file or self._out.tell() != piece.offset:
            raise DataLoss(f"a piece of {piece.file} does not continue the pieces before it")
        self._out.write(piece.chunk)
        if self._out.tell() < piece.file_bytes:
            return False
        self._out.flush()
        os.fsync(self._out.fileno())
        self._out.close()
        self._out = None
        self._partial.replace(self._folder / self._name)
        return True
