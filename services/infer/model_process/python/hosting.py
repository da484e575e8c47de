"""Loads a `model.py`, whichever of the two interfaces it has."""

from __future__ import annotations

from services.infer.model_process.hosted import Call, Hosted, Load
from services.infer.model_process.python import source, triton_module
from services.infer.model_process.python.shoal_model import OwnModel
from services.infer.model_process.python.triton import TritonModel


def host(load: Load, call: Call | None) -> Hosted:
    """The loaded model. `call` is what it may call other models with. Raises LoadFailed."""
    triton_module.provide(load.file.parent, call)
    kind = source.model_class(source.imported(load.file, load.module), load.file)
    return TritonModel(kind, load) if kind.__name__ == source.TRITON_CLASS else OwnModel(kind, load)
