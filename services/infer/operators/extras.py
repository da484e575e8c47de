"""Optional packages of some operations: imported when such an operation is loaded; the error names a missing one."""

from __future__ import annotations

import importlib
import os
from functools import cache
from typing import Any

from shoal.errors import FailedPrecondition


@cache
def opencv() -> Any:
    """Return the module of OpenCV. Raises FailedPrecondition when OpenCV is not installed."""
    cv2 = _imported("cv2", "vision", "OpenCV")
    # Rows run in parallel already: OpenCV's own threads within one row would compete with them.
    cv2.setNumThreads(1)
    # The caller gets an error for a damaged image; OpenCV's log lines repeat it.
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    return cv2


@cache
def tokenizers() -> Any:
    """Return the module of Hugging Face's tokenizers. Raises FailedPrecondition when the package is not installed."""
    # Rows run in parallel already; the package would start a thread for each core, for each execution.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return _imported("tokenizers", "text", "tokenizers")


def _imported(module: str, extra: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as err:
        raise FailedPrecondition(
            f"this operation needs {package}, which is not installed: pip install 'shoal[{extra}]' ({err})"
        ) from err
