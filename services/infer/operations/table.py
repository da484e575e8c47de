"""All operations, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from services.infer.operations.byte_windows import ByteWindows, ByteWindowsParameters
from services.infer.operations.crop_boxes import CropBoxes, CropBoxesParameters
from services.infer.operations.ctc_decode import CtcDecode, CtcDecodeParameters
from services.infer.operations.db_boxes import DbBoxes, DbBoxesParameters
from services.infer.operations.decode_image import DecodeImage, DecodeImageParameters
from services.infer.operations.operation import Operation, Setting
from services.infer.operations.parameters import Parameters
from services.infer.operations.tokenize import Tokenize, TokenizeParameters


@dataclass(frozen=True)
class Entry:
    """One operation: what its parameters are, and how it is made of them."""

    parameters: type[Parameters]
    make: Callable[[Any, Setting], Operation]
    """Raises FailedPrecondition when a file or package that it needs is missing or wrong."""
    has_gpu: bool = False
    """Whether it has a version for GPUs."""


OPERATIONS: Mapping[str, Entry] = {
    "decode_image": Entry(DecodeImageParameters, DecodeImage),
    "byte_windows": Entry(ByteWindowsParameters, ByteWindows),
    "crop_boxes": Entry(CropBoxesParameters, CropBoxes),
    "ctc_decode": Entry(CtcDecodeParameters, CtcDecode),
    "db_boxes": Entry(DbBoxesParameters, DbBoxes),
    "tokenize": Entry(TokenizeParameters, Tokenize),
}
