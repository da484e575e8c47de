"""Packages that only some operations need: imported when one of those is loaded, and named when they are missing."""

from __future__ import annotations

import importlib
import os
from functools import cache
from typing import Any

from shoal.errors import FailedPrecondition


@cache
def opencv() -> Any:
    """OpenCV. Raises FailedPrecondition when it is not installed."""
    cv2 = _imported("cv2", "vision", "OpenCV")
    # Rows run side by side already: threads of its own within one would only get in their way.
    cv2.setNumThreads(1)
    # What it says of a broken image is said to the caller, in our words.
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    return cv2


@cache
def tokenizers() -> Any:
    """Hugging Face's tokenizers. Raises FailedPrecondition when they are not installed."""
    # Its own threads are as many as there are cores, for each call: a model's executions have theirs.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return _imported("tokenizers", "text", "tokenizers")


def _imported(module: str, extra: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as err:
        raise FailedPrecondition(
            f"this operation needs {package}, which is not installed: pip install 'shoal[{extra}]' ({err})"
        ) from err
