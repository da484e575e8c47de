"""Loads a `model.py`, whichever of the two interfaces it has."""

from __future__ import annotations

from services.infer.isolation.hosted import Call, Hosted, Load
from services.infer.python_model import source, triton_module
from services.infer.python_model.own import OwnModel
from services.infer.python_model.triton import TritonModel


def host(load: Load, call: Call | None) -> Hosted:
    """The loaded model. `call` is what it may call other models with. Raises LoadFailed."""
    triton_module.provide(load.file.parent, call)
    kind = source.model_class(source.imported(load.file, load.module), load.file)
    return TritonModel(kind, load) if kind.__name__ == source.TRITON_CLASS else OwnModel(kind, load)
