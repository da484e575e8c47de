"""Warm-up: runs before a model is ready, which prove that it works and batches, and make the first request fast.

    1  one row, made up from the signature; a free dimension is tried at a few sizes, because a model may need some
    2  a guessed batch dimension is tested: two rows of different scale together must give the results of each row
       alone; integers are ids of different tokens, or pixels of different brightness, where the model takes such
    3  the result of 1 must fit the signature (`canary`)
    4  the samples of the configuration's `model_warmup`, which must succeed
    5  a batch of each size 2, 4, 8, ... up to max_batch_size, as far as memory and time allow, on each device

A model may need other data than the first step makes up: divisors, sizes, text that holds a number. A failure there is
a warning, and the model is served, unbatched unless its configuration sets max_batch_size. A sample of step 4 that
fails keeps the model from being served.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from services.infer.loading import canary
from services.infer.loading.model_config import Completed
from services.infer.model_files.wanted_models import read_bytes
from services.infer.requests import tensors
from services.infer.requests.request import held_bytes
from services.infer.requests.signature import TensorSpec
from services.infer.requests.tensors import Tensor
from services.infer.runtimes.runtime import ModelFailed, Session
from services.infer.scheduling.cost import CostCurve
from shoal.errors import FailedPrecondition, InvalidArgument
from shoal.inference.v2 import model_config_pb2 as pb
from shoal.oip import bfloat16
from shoal.oip.datatypes import BY_NUMBER, Datatype
from shoal.oip.tensors import count_elements, shape_text

log = logging.getLogger(__name__)

# Sizes tried for dimensions that vary: of a text, a small image, the most common image.
_FREE_SIZES = (1, 8, 64, 224)
# Bounds of the trial batches, so that a start takes neither long nor a gigabyte.
_LARGEST_BYTES = 64 << 20
_BATCHES_S = 0.2
# Maximal size of a request: larger inputs are neither made up nor read from a sample.
_MAX_CALL_BYTES = 256 << 20
# Memory of an element of BYTES, without its text.
_TEXT_BYTES = 64
# A batch is computed in another order than a row, and on a GPU with products in TF32. For made-up data, unlike what the
# model was trained on, that rounding reached 0.6 % of a row's largest output. It stays below this part.
_TOLERANCE = 0.02
# Two batches of one size are computed in the same order: a row beside another row equals the row beside itself, up to
# this part. Rows that influence each other differ by more: one scale for both rows of the trial changes the smaller row
# by 3 %. Outputs in half precision are compared with `_TOLERANCE`.
_NEIGHBOUR_TOLERANCE = 0.005
# Factor between the rows of the trial: one scale for both leaves the smaller row 4 of its 8 bits.
_SCALE = 16
# Integers of the two rows of the trial, from and below: ids that most vocabularies have; of UINT8, pixels.
_IDS = (0, 2), (2, 10)
_PIXELS = (_SCALE, 256), (1, _SCALE)
# Inputs with this in their name hold 0 and 1. Other values could make a model out of proportion.
_MASK = "mask"
# Size of free dimensions in the trial, where that is cheap: single elements of two rows are often equal.
_TRIAL_SIZE = 8
_MOST_DRAWS = 32
# Runs of a trial, without those that find out which integers the model takes.
_TRIAL_RUNS = 5

Inputs = Mapping[str, Tensor]
Clock = Callable[[], float]


def run(
    name: str,
    model: Completed,
    session: Session,
    folder: Path | None,
    clock: Clock,
    *,
    made_up: bool = True,
    cost: CostCurve | None = None,
    dependence: str = "",
) -> Completed:
    """Run the model `name` on made-up data and on the samples of its `folder`. Return the confirmed configuration.

    Args:
        made_up: False when made-up data is only used to test a guessed batch dimension.
        cost: receives the durations of the batches.
        dependence: reason why the rows of a batch influence each other, by the model's file; empty when none is known.

    Raises:
        FailedPrecondition: a sample or a batch fails, or an output contradicts the signature.
    """
    first = _first_run(name, model, session, clock) if made_up or model.is_batch_guessed else None
    if model.is_batch_guessed:
        why = dependence or ("two rows have too large outputs" if first is not None and not _fit(first) else "")
        model = _with_batch_tested(name, model, session, first, why)
    elif model.signature.max_batch_size > 1:
        _warn_of_dependence(name, model, session, first, dependence)
    batched = model.signature.max_batch_size
    if first is not None:
        model = canary.checked(name, model, first.outputs, 1 if batched else None)
    for sample in model.config.model_warmup:
        model = _with_sample_run(name, sample, model, session, folder)
    if first is not None and batched > 1:
        for part in session.device_sessions():
            _batches(name, model, part, first, clock, cost if cost is not None else CostCurve())
    return model


@dataclass(frozen=True)
class First:
    """Result of a successful first run."""

    size: int
    """Size used for the dimensions that vary."""
    took_s: float
    """Duration of the second run, in seconds."""
    outputs: Sequence[Tensor]


def _first_run(name: str, model: Completed, session: Session, clock: Clock) -> First | None:
    rows = 1 if model.signature.max_batch_size else None
    is_free = any(-1 in spec.shape[rows or 0 :] for spec in _needed(model))
    failure = ""
    for size in _FREE_SIZES if is_free else _FREE_SIZES[:1]:
        size_bytes = _size_bytes(model, rows, size)
        if size_bytes > (_LARGEST_BYTES if is_free else _MAX_CALL_BYTES):
            failure = failure or f"its inputs have {size_bytes} bytes"
            break
        try:
            inputs = _zeros(model, rows, size)
            # The first run also allocates memory, so the second one is timed.
            _run(model, session, inputs)
            start = clock()
            outputs = _run(model, session, inputs)
            return First(size, clock() - start, outputs)
        except ModelFailed as err:
            failure = str(err)
    log.warning(
        "model %(model)s: not warmed up, because every made-up input (zeros) failed: %(error)s; "
        "if it needs other data, give it as model_warmup in config.pbtxt",
        {"event": "model.not_warmed_up", "model": name, "error": failure},
    )
    return None


def _fit(first: First) -> bool:
    """Return True when the outputs of two rows are small enough for a trial."""
    return 2 * held_bytes(first.outputs) <= _LARGEST_BYTES


def _with_batch_tested(
    name: str, model: Completed, session: Session, first: First | None, dependence: str
) -> Completed:
    """Return the model unchanged when its rows are independent, otherwise without a batch dimension."""
    if dependence:
        why = dependence
    elif first is None:
        why = "every made-up input failed"
    else:
        try:
            why = _mixed_rows(model, session, first)
        except ModelFailed as err:
            why = str(err)
    if not why:
        return model
    log.info(
        "model %(model)s: not batched (%(reason)s); max_batch_size in config.pbtxt overrides this",
        {"event": "model.not_batched", "model": name, "reason": why},
    )
    return model.unbatched()


def _warn_of_dependence(name: str, model: Completed, session: Session, first: First | None, dependence: str) -> None:
    """Log a warning when the rows of a model depend on each other whose configuration sets a batch size."""
    # The trial is within the bounds of the batches.
    is_small = first is not None and 2 * _size_bytes(model, 1, first.size) <= _LARGEST_BYTES and _fit(first)
    runs = _TRIAL_RUNS + len(_of_integers(model))
    if not dependence and first is not None and is_small and runs * first.took_s < _BATCHES_S:
        with suppress(ModelFailed):
            dependence = _mixed_rows(model, session, first)
    if dependence:
        log.warning(
            "model %(model)s: batched, because config.pbtxt sets max_batch_size, but a row's results depend on the "
            "rows beside it (%(reason)s); max_batch_size: 0 avoids this",
            {"event": "model.batch_dependent", "model": name, "reason": dependence},
        )


def _mixed_rows(model: Completed, session: Session, first: First) -> str:
    """Return the reason why two rows are not independent of each other; empty when they are independent.

    Raises:
        ModelFailed: the model takes no two rows.
    """
    growth = _TRIAL_SIZE**2
    is_cheap = growth * held_bytes(first.outputs) <= _LARGEST_BYTES and _TRIAL_RUNS * growth * first.took_s < _BATCHES_S
    if first.size < _TRIAL_SIZE and is_cheap and 2 * _size_bytes(model, 1, _TRIAL_SIZE) <= _LARGEST_BYTES:
        with suppress(ModelFailed):
            return _mixed(model, session, _TRIAL_SIZE)
    return _mixed(model, session, first.size)


def _mixed(model: Completed, session: Session, size: int) -> str:
    pair = _pair(model, session, size)
    together = _run(model, session, pair)
    for n in range(2):
        alone = _run(model, session, {name: array[n : n + 1] for name, array in pair.items()})
        twice = _run(model, session, {name: np.repeat(array[n : n + 1], 2, axis=0) for name, array in pair.items()})
        for spec, whole, row, same in zip(model.signature.outputs, together, alone, twice, strict=True):
            if whole.shape[:1] != (2,) or row.shape[:1] != (1,) or whole.shape[1:] != row.shape[1:]:
                return (
                    f"output '{spec.name}' is {shape_text(whole.shape)} for two rows, {shape_text(row.shape)} for one"
                )
            tight = _TOLERANCE if spec.datatype.name in ("BF16", "FP16") else _NEIGHBOUR_TOLERANCE
            if same.shape != whole.shape or not (
                _alike(whole[n : n + 1], row, spec.datatype, _TOLERANCE)
                and _alike(whole[n : n + 1], same[n : n + 1], spec.datatype, tight)
            ):
                return f"output '{spec.name}' of a row depends on the rows beside it"
    return ""


def _pair(model: Completed, session: Session, size: int) -> dict[str, Tensor]:
    """Return two rows that differ in each input, as far as the model takes such."""
    rng = np.random.default_rng(0)
    pair = {
        spec.name: _with_scales(_different_rows(spec.datatype, _shape(spec, 2, size), rng), spec.datatype)
        for spec in _needed(model)
    }
    for spec in _of_integers(model):
        ranges = _PIXELS if spec.datatype.name == "UINT8" else _IDS
        shape = _shape(spec, 1, size)
        tried = np.concatenate([rng.integers(low, high, shape) for low, high in ranges]).astype(spec.datatype.dtype)
        # Beyond its vocabulary, a model fails.
        with suppress(ModelFailed):
            _run(model, session, {**pair, spec.name: tried})
            pair[spec.name] = tried
    return pair


def _of_integers(model: Completed) -> list[TensorSpec]:
    """Return the inputs of integers other than 0 and 1."""
    return [
        spec
        for spec in _needed(model)
        if spec.datatype.dtype.kind in "iu" and spec.datatype.name != "BF16" and _MASK not in spec.name.lower()
    ]


def _different_rows(datatype: Datatype, shape: tuple[int, ...], rng: np.random.Generator) -> Tensor:
    pair = _random(datatype, shape, rng)
    for _ in range(_MOST_DRAWS):
        if not np.array_equal(pair[0], pair[1]):
            break
        pair = _random(datatype, shape, rng)
    return pair


def _with_scales(pair: Tensor, datatype: Datatype) -> Tensor:
    """Return two rows of numbers with the second one divided by `_SCALE`; rows of integers and text are unchanged."""
    if datatype.name == "BF16":
        values = bfloat16.to_float32(pair)
        values[1] /= _SCALE
        bits: Tensor = (values.view(np.uint32) >> 16).astype(np.uint16)
        return bits
    if pair.dtype.kind == "f":
        pair[1] /= _SCALE
    return pair


def _alike(one: Tensor, other: Tensor, datatype: Datatype, tolerance: float) -> bool:
    """Return True when two tensors differ by at most `tolerance` of the largest value of `other`."""
    if datatype.name == "BF16":
        one, other = bfloat16.to_float32(one), bfloat16.to_float32(other)
    if one.dtype.kind != "f":
        return bool(np.array_equal(one, other))
    scale = max(float(np.max(np.abs(other), initial=0.0, where=np.isfinite(other))), 1e-6)
    return bool(np.allclose(one, other, rtol=0, atol=tolerance * scale, equal_nan=True))


def batch_sizes(largest: int) -> Iterator[int]:
    """Yield the batch sizes of the warm-up, ascending: 2, 4, 8, ... and `largest`."""
    rows = 2
    while rows < largest:
        yield rows
        rows *= 2
    if largest > 1:
        yield largest


def _batches(name: str, model: Completed, session: Session, first: First, clock: Clock, cost: CostCurve) -> None:
    row_bytes, start = max(_size_bytes(model, 1, first.size), held_bytes(first.outputs)), clock()
    row_s = first.took_s
    cost.add_trial(1, row_s)
    for rows in batch_sizes(model.signature.max_batch_size):
        # A row in a batch takes no longer than a row took in the batch before.
        if rows * row_bytes > _LARGEST_BYTES or clock() - start + rows * row_s > _BATCHES_S:
            log.info(
                "model %(model)s: batches of %(rows)d rows and more are not warmed up: they are too large",
                {"event": "model.large_batches_not_warmed_up", "model": name, "rows": rows},
            )
            return
        begun = clock()
        try:
            results = _run(model, session, _zeros(model, rows, first.size))
        except ModelFailed as err:
            largest = model.signature.max_batch_size
            raise FailedPrecondition(
                f"the model fails with a batch of {rows} rows (max_batch_size {largest}): {err}"
            ) from err
        canary.checked(name, model, results, rows)
        took_s = clock() - begun
        cost.add_trial(rows, took_s)
        row_s = took_s / rows


def _needed(model: Completed) -> list[TensorSpec]:
    return [spec for spec in model.signature.inputs if not spec.is_optional]


def _run(model: Completed, session: Session, inputs: Inputs) -> list[Tensor]:
    return session.run(inputs, [spec.name for spec in model.signature.outputs])


def _shape(spec: TensorSpec, rows: int | None, size: int) -> tuple[int, ...]:
    shape = spec.shape if rows is None else (rows, *spec.shape[1:])
    return tuple(size if dim == -1 else dim for dim in shape)


def _size_bytes(model: Completed, rows: int | None, size: int) -> int:
    return sum(math.prod(_shape(spec, rows, size)) * spec.datatype.dtype.itemsize for spec in _needed(model))


def _zeros(model: Completed, rows: int | None, size: int) -> dict[str, Tensor]:
    text = model.signature.text
    return {spec.name: _zero(spec.datatype, _shape(spec, rows, size), text) for spec in _needed(model)}


def _zero(datatype: Datatype, shape: tuple[int, ...], text: bool) -> Tensor:
    if datatype.is_bytes:
        return np.full(shape, "" if text else b"", object)
    return np.zeros(shape, datatype.dtype)


def _random(datatype: Datatype, shape: tuple[int, ...], rng: np.random.Generator) -> Tensor:
    """Return values that most models accept: small, and different from row to row."""
    if datatype.is_bytes:
        return rng.choice(np.array(["a", "b", "c", "1", "2"], object), shape)
    if datatype.name == "BF16":
        bits: Tensor = (rng.random(shape, np.float32).view(np.uint32) >> 16).astype(np.uint16)
        return bits
    if datatype.dtype.kind == "f":
        # Not in double precision: a sample of the largest size would take four times its memory.
        return rng.random(shape, np.float64 if datatype.name == "FP64" else np.float32).astype(
            datatype.dtype, copy=False
        )
    return rng.integers(0, 2, shape, datatype.dtype)


def _with_sample_run(
    name: str, sample: pb.ModelWarmup, model: Completed, session: Session, folder: Path | None
) -> Completed:
    try:
        inputs = sample_inputs(sample, model, folder)
        for _ in range(max(sample.count, 1)):
            results = _run(model, session, inputs)
        return canary.checked(name, model, results, sample_rows(sample) if model.signature.max_batch_size else None)
    except (ModelFailed, InvalidArgument, FailedPrecondition) as err:
        raise FailedPrecondition(f"model_warmup '{sample.name}': {err}") from err


def sample_rows(sample: pb.ModelWarmup) -> int:
    """Return the number of rows of a `model_warmup` sample."""
    return sample.batch_size or 1


def sample_inputs(sample: pb.ModelWarmup, model: Completed, folder: Path | None) -> Inputs:
    """Return the inputs of a sample. Raises InvalidArgument when they do not fit the model or cannot be made."""
    batched, rows = model.signature.max_batch_size, sample_rows(sample)
    if rows > max(batched, 1):
        raise InvalidArgument(f"batch_size {rows} is over max_batch_size {batched}")
    known = model.signature.inputs_by_name
    if not model.signature.required <= sample.inputs.keys() <= known.keys():
        raise InvalidArgument(f"has inputs {sorted(sample.inputs)}, the model {sorted(known)}")
    size = sum(_sample_bytes(name, given, known[name], rows) for name, given in sample.inputs.items())
    if size > _MAX_CALL_BYTES:
        raise InvalidArgument(f"its inputs have {size} bytes in {rows} rows: more than a call can carry")
    inputs = {}
    for name, given in sample.inputs.items():
        array = _sample_input(name, given, known[name], folder, model.signature.text)
        inputs[name] = np.repeat(array[np.newaxis], rows, axis=0) if batched else array
    return inputs


def _sample_bytes(name: str, given: pb.ModelWarmup.Input, spec: TensorSpec, rows: int) -> int:
    """Return the memory of an input of a sample. Raises InvalidArgument when its datatype is not the model's."""
    datatype = BY_NUMBER.get(given.data_type)
    if datatype != spec.datatype:
        raise InvalidArgument(
            f"input '{name}' is {datatype.name if datatype else 'of no type'}, the model's {spec.datatype.name}"
        )
    elements = count_elements(tuple(given.dims), f"input '{name}'", InvalidArgument)
    return elements * rows * (_TEXT_BYTES if datatype.is_bytes else datatype.dtype.itemsize)


def _sample_input(name: str, given: pb.ModelWarmup.Input, spec: TensorSpec, folder: Path | None, text: bool) -> Tensor:
    datatype, shape = spec.datatype, tuple(given.dims)
    match given.WhichOneof("input_data_type"):
        case "zero_data":
            return _zero(datatype, shape, text)
        case "random_data":
            return _random(datatype, shape, np.random.default_rng(0))
        case "input_data_file" if folder is not None:
            file = folder / "warmup" / given.input_data_file
            if file.name != given.input_data_file:
                raise InvalidArgument(f"input_data_file '{given.input_data_file}': expected a name without folders")
            data = read_bytes(file, _MAX_CALL_BYTES)
            return tensors.from_raw(data, datatype, shape, f"input '{name}' ({file.name})", text=text)
        case _:
            raise InvalidArgument(f"input '{name}' has no data")
