"""Table of all operations, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from services.infer.loading.model_config import GUESSED_BATCH_SIZE
from services.infer.operators.byte_windows import ByteWindows, ByteWindowsParameters
from services.infer.operators.crop_boxes import CropBoxes, CropBoxesParameters
from services.infer.operators.ctc_decode import CtcDecode, CtcDecodeParameters
from services.infer.operators.db_boxes import DbBoxes, DbBoxesParameters
from services.infer.operators.decode_image import DecodeImage, DecodeImageParameters
from services.infer.operators.nms import Nms, NmsParameters
from services.infer.operators.operation import Operation, OperationContext
from services.infer.operators.pad_tokens import PadTokens, PadTokensParameters
from services.infer.operators.parameters import Parameters
from services.infer.operators.pool_normalize import PoolNormalize, PoolNormalizeParameters
from services.infer.operators.quantize_rows import QuantizeRows, QuantizeRowsParameters
from services.infer.operators.resize_norm import ResizeNorm, ResizeNormParameters
from services.infer.operators.softmax_topk import SoftmaxTopk, SoftmaxTopkParameters
from services.infer.operators.tabular import Tabular, TabularParameters
from services.infer.operators.tokenize import Tokenize, TokenizeParameters
from services.infer.operators.turn_image import TurnImage, TurnImageParameters


@dataclass(frozen=True)
class Entry:
    """One operation: the class of its parameters, and its constructor."""

    parameters: type[Parameters]
    make: Callable[[Any, OperationContext], Operation]
    """Raises FailedPrecondition when a required file or package is missing or wrong."""
    has_gpu: bool = False
    """True when the operation has a version for GPUs."""
    batch_size: int = GUESSED_BATCH_SIZE
    """Rows of one execution, where the configuration has no max_batch_size."""


OPERATIONS: Mapping[str, Entry] = {
    # All decoded images of a batch are in memory together, and a few bytes can become a hundred megabytes. Larger
    # batches are not faster.
    "decode_image": Entry(DecodeImageParameters, DecodeImage, batch_size=16),
    "byte_windows": Entry(ByteWindowsParameters, ByteWindows),
    "crop_boxes": Entry(CropBoxesParameters, CropBoxes),
    "ctc_decode": Entry(CtcDecodeParameters, CtcDecode),
    "db_boxes": Entry(DbBoxesParameters, DbBoxes),
    "tokenize": Entry(TokenizeParameters, Tokenize),
    "turn_image": Entry(TurnImageParameters, TurnImage),
    "nms": Entry(NmsParameters, Nms, has_gpu=True),
    "pad_tokens": Entry(PadTokensParameters, PadTokens, has_gpu=True),
    "pool_normalize": Entry(PoolNormalizeParameters, PoolNormalize, has_gpu=True),
    "quantize_rows": Entry(QuantizeRowsParameters, QuantizeRows, has_gpu=True),
    "resize_norm": Entry(ResizeNormParameters, ResizeNorm, has_gpu=True),
    "softmax_topk": Entry(SoftmaxTopkParameters, SoftmaxTopk, has_gpu=True),
    "tabular": Entry(TabularParameters, Tabular, has_gpu=True),
}
