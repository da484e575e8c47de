"""Canary check: the first outputs of a new version are compared with its signature's names, datatypes and shapes.

Outputs that contradict the configuration keep the version from being served. A shape that only the model's file states
may be wrong there, as exporters leave it: the signature is then loosened to the observed shape, and clients see that.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from services.infer.loading.model_config import Completed
from services.infer.requests.signature import TensorSpec, fits
from services.infer.requests.tensors import Tensor
from shoal.errors import FailedPrecondition
from shoal.inference.v2 import model_config_pb2 as pb
from shoal.oip.tensors import shape_text

log = logging.getLogger(__name__)


def checked(name: str, model: Completed, results: Sequence[Tensor], rows: int | None) -> Completed:
    """Return the model with a signature that fits `results`, all of its outputs in order.

    Args:
        rows: rows of the batch; None without a batch dimension.

    Raises:
        FailedPrecondition: the results contradict the configuration; the message names the output.
    """
    if len(results) != len(model.signature.outputs):
        raise FailedPrecondition(f"the model gave {len(results)} outputs, expected {len(model.signature.outputs)}")
    specs = tuple(
        _checked(name, model, spec, result, rows) for spec, result in zip(model.signature.outputs, results, strict=True)
    )
    if specs == model.signature.outputs:
        return model
    config = pb.ModelConfig()
    config.CopyFrom(model.config)
    for output, spec in zip(config.output, specs, strict=True):
        output.dims[:] = spec.shape[0 if rows is None else 1 :]
    return replace(model, config=config, signature=replace(model.signature, outputs=specs))


def _checked(name: str, model: Completed, spec: TensorSpec, result: Tensor, rows: int | None) -> TensorSpec:
    if result.dtype != spec.datatype.dtype:
        raise FailedPrecondition(
            f"output '{spec.name}': the model gave {result.dtype} in its trial run, expected {spec.datatype.name}"
        )
    if rows is not None and result.shape[:1] != (rows,):
        raise FailedPrecondition(
            f"output '{spec.name}': the model gave {shape_text(result.shape)} for {rows} rows in its trial run: its "
            f"first dimension is no batch; set max_batch_size to 0"
        )
    if fits(result.shape, spec.shape):
        return spec
    if spec.name in model.given_outputs:
        raise FailedPrecondition(
            f"output '{spec.name}': the configuration promises {shape_text(spec.shape)}, "
            f"the model gave {shape_text(result.shape)} in its trial run"
        )
    seen = _loosened(spec.shape, result.shape)
    log.warning(
        "model %(model)s: output '%(output)s' is %(declared)s by its file, and %(seen)s in fact: it is served as "
        "%(served)s",
        {
            "event": "model.output_differs",
            "model": name,
            "output": spec.name,
            "declared": shape_text(spec.shape),
            "seen": shape_text(result.shape),
            "served": shape_text(seen),
        },
    )
    return replace(spec, shape=seen)


def _loosened(stated: Sequence[int], seen: Sequence[int]) -> tuple[int, ...]:
    if len(stated) != len(seen):
        return (-1,) * len(seen)
    return tuple(dim if dim == size else -1 for dim, size in zip(stated, seen, strict=True))
