"""Loader of a `model.py` with either of the two interfaces."""

from __future__ import annotations

from services.infer.model_process.hosted import Hosted, Load, MakeInnerCall
from services.infer.model_process.python import source, triton_module
from services.infer.model_process.python.shoal_model import ShoalModel
from services.infer.model_process.python.triton import TritonModel


def host(load: Load, call: MakeInnerCall | None) -> Hosted:
    """Load and return the model. `call` runs its calls of other models; None: they are rejected. Raises LoadFailed."""
    triton_module.provide(load.file.parent, call)
    kind = source.model_class(source.import_module(load.file, load.module), load.file)
    return TritonModel(kind, load) if kind.__name__ == source.TRITON_CLASS else ShoalModel(kind, load)
