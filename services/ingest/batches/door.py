"""Batches where they can be had: they need Arrow, which a small installation leaves out."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from services.ingest.batches.room import Batches


def batches_class() -> type[Batches] | None:
    """What makes an instance's batches; None where Arrow is not installed."""
    if find_spec("pyarrow") is None:
        return None
    from services.ingest.batches.room import Batches

    return Batches
