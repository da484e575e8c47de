"""Results as Parquet files in a folder of the caller's, written as they come."""

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
    """How far an export is."""

    rows: int = 0
    """Of the part that is being made, too."""
    bytes: int = 0
    parts: int = 0
    cursor: str = ""
    """Another export to the same place goes on after these parts with it."""
    complete: bool = False
    """All is written, the manifest too."""
    answers_lost: int = 0
    """How many of the rows are without an answer that is damaged in the store: column `answer_lost` says why."""


class ExportFolder:
    """Takes the pieces of an export's files. A file has its name only once all of it is there and synced."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._name = ""
        self._out: BinaryIO | None = None

    def check_empty(self) -> None:
        """Makes the folder.

        Raises:
            FailedPrecondition: it cannot be made, or an export lies there.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            found = sorted(path.name for path in self._folder.iterdir() if _NAME.fullmatch(path.name))
        except OSError as err:
            raise FailedPrecondition(f"cannot export to {self._folder}: {err.strerror}") from err
        if found:
            raise FailedPrecondition(
                f"{self._folder} holds an export already, or a part of one ({found[0]}): choose another folder, or go "
                "on with the cursor of that one"
            )

    def take(self, piece: store.ExportResultsResponse) -> bool:
        """Writes a piece. True when what its cursor says is on the disk.

        Raises:
            FailedPrecondition: it cannot be written.
            DataLoss: the pieces do not fit together.
        """
        if not piece.file:
            return not self._out
        if not _NAME.fullmatch(piece.file):
            raise DataLoss(f"the node sends a file {piece.file!r}, which no export has")
        try:
            return self._write(piece)
        except OSError as err:
            raise FailedPrecondition(f"cannot write {self._folder / piece.file}: {err.strerror}") from err

    def close(self) -> None:
        """Leaves nothing that is not whole."""
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
            raise DataLoss(f"a piece of {piece.file} does not fit what came before it")
        self._out.write(piece.chunk)
        if self._out.tell() < piece.file_bytes:
            return False
        self._out.flush()
        os.fsync(self._out.fileno())
        self._out.close()
        self._out = None
        self._partial.replace(self._folder / self._name)
        return True
