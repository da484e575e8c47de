"""Shoal's own interface of `model.py`.

    class Model:
        inputs = {"x": ("FP32", [-1, 4])}         optional if config.pbtxt has the inputs: whole shapes, rows first
        outputs = {"y": ("FP32", [-1, 4])}
        max_batch_size = 8                         optional
        def load(self, folder, config): ...        optional; the version's folder, and the configuration as a dict
        def predict(self, batch):                  arrays by input, rows first -> arrays by output, rows first
            return {"y": 2 * batch["x"]}
        def unload(self): ...                      optional

A `predict` that yields makes the model decoupled: each dict is one response, and each call of `predict` one request.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from services.infer.model_process import payload
from services.infer.model_process.hosted import (
    Batch,
    BatchResult,
    HostedModelInfo,
    Load,
    LoadFailed,
    RunFailed,
    Sender,
    print_error,
)
from services.infer.model_process.payload import TensorPart
from services.infer.model_process.python.config_form import specs
from services.infer.model_process.python.source import error_line
from shoal.oip.datatypes import BY_NAME, of_array

Spec = tuple[str, str, Sequence[int]]


class ShoalModel:
    """`hosted.Hosted` for a class with Shoal's interface."""

    def __init__(self, kind: type[Any], load: Load) -> None:
        """Create and load the model. Raises LoadFailed when a method is missing or invalid, or `load` raises."""
        self._file = load.file
        _check_methods(kind, load.file)
        declared = load.config.get("model_transaction_policy", {}).get("decoupled", False)
        self.model_info = _facts(kind, load, is_decoupled=declared or inspect.isgeneratorfunction(kind.predict))
        self._datatypes = {name: datatype for name, datatype, _ in self.model_info.outputs}
        try:
            self._model = kind()
            if hasattr(self._model, "load"):
                self._model.load(load.file.parent, dict(load.config))
        except BaseException as err:
            print_error(err)
            raise LoadFailed(f"the model's load failed: {error_line(err, load.file)}") from err

    def run(self, batch: Batch) -> BatchResult:
        try:
            result = self._model.predict(batch.arrays())
        except BaseException as err:
            print_error(err)
            raise RunFailed(error_line(err, self._file)) from err
        return BatchResult(self._parts(result, batch.outputs))

    def start(self, batch: Batch, sender: Sender) -> Iterator[None]:
        try:
            result = self._model.predict(batch.arrays())
            responses = iter([result] if isinstance(result, Mapping) else result)
        except BaseException as err:
            print_error(err)
            sender.fail(RunFailed(error_line(err, self._file)), final=True)
            return
        yield from self._responses(responses, batch.outputs, sender)

    def _responses(self, responses: Iterator[Any], outputs: Sequence[str], sender: Sender) -> Iterator[None]:
        try:
            for response in responses:
                sender.send(self._parts(response, outputs), final=False)
                yield
        except RunFailed as err:
            sender.fail(err, final=True)
        except GeneratorExit:
            raise
        except BaseException as err:
            print_error(err)
            sender.fail(RunFailed(error_line(err, self._file)), final=True)
        finally:
            close = getattr(responses, "close", None)
            # The model's generator receives GeneratorExit at its yield.
            if close is not None:
                close()

    def _parts(self, result: Any, outputs: Sequence[str]) -> list[TensorPart]:
        if not isinstance(result, Mapping):
            hint = ": use yield in predict itself, or set model_transaction_policy { decoupled: true }"
            raise RunFailed(
                f"predict returned a {type(result).__name__}, expected a dict of arrays by output name"
                + (hint if inspect.isgenerator(result) else "")
            )
        return [self._part(name, result) for name in outputs]

    def _part(self, name: str, result: Mapping[str, Any]) -> TensorPart:
        if name not in result:
            names = ", ".join(map(repr, list(result)[:32]))
            raise RunFailed(f"predict returned no output '{name}': it returned {names}")
        try:
            array = np.asarray(result[name])
        except Exception as err:
            raise RunFailed(f"output '{name}' is not an array: {err}") from err
        found, declared = of_array(array), self._datatypes.get(name)
        datatype = found.name if found is not None else None
        if array.dtype == object and declared == "BYTES":
            datatype = declared
        if declared == "BF16" and datatype == "UINT16":
            datatype = declared
        if datatype is None or (declared is not None and datatype != declared):
            raise RunFailed(f"output '{name}' is {datatype or array.dtype}, expected {declared or 'a known datatype'}")
        try:
            return payload.part(name, datatype, [array])
        except TypeError as err:
            raise RunFailed(f"output '{name}': {err}") from err

    def close(self) -> None:
        if hasattr(self._model, "unload"):
            self._model.unload()


def _facts(kind: type[Any], load: Load, *, is_decoupled: bool) -> HostedModelInfo:
    completed = dict(load.config)
    max_batch_size = getattr(kind, "max_batch_size", None)
    if max_batch_size is not None:
        if type(max_batch_size) is not int or max_batch_size < 0:
            raise LoadFailed(
                f"{kind.__name__}.max_batch_size is {max_batch_size!r}: expected a number of rows, 0 or more"
            )
        completed["max_batch_size"] = completed.get("max_batch_size") or max_batch_size
    if is_decoupled:
        completed["model_transaction_policy"] = {"decoupled": True}
    inputs, outputs = _declared(kind, "inputs", completed), _declared(kind, "outputs", completed)
    changed = completed if max_batch_size is not None or is_decoupled else None
    return HostedModelInfo(
        inputs,
        outputs,
        config=changed,
        sets_max_batch_size=max_batch_size is not None,
        is_decoupled=is_decoupled,
        allows_trial_run=False,
    )


def _declared(kind: type[Any], role: str, config: Mapping[str, Any]) -> list[Spec]:
    """Return the inputs or outputs (`role`) that the class declares, or else those of the configuration."""
    declared = getattr(kind, role, None)
    if declared is None:
        configured = specs(config, role.removesuffix("s"))
        if not configured:
            raise LoadFailed(
                f"the {role} are not declared: write them into config.pbtxt, or as {kind.__name__}.{role} = "
                '{"name": ("FP32", [-1, 4])}'
            )
        return configured
    if not isinstance(declared, Mapping) or not declared:
        raise LoadFailed(f'{kind.__name__}.{role}: expected a dict like {{"name": ("FP32", [-1, 4])}}')
    return [_spec(f"{kind.__name__}.{role}", name, value) for name, value in declared.items()]


def _spec(where: str, name: Any, value: Any) -> Spec:
    try:
        datatype, shape = value
        dims = [int(dim) for dim in shape]
    except (TypeError, ValueError):
        raise LoadFailed(f'{where}[{name!r}] is {value!r}: expected ("FP32", [-1, 4])') from None
    if not isinstance(name, str) or not name:
        raise LoadFailed(f"{where}: {name!r} is not a name: expected a string of 1 character or more")
    if datatype not in BY_NAME:
        raise LoadFailed(f"{where}[{name!r}]: unknown datatype {datatype!r}: expected one of {', '.join(BY_NAME)}")
    if any(dim < -1 or dim == 0 for dim in dims):
        raise LoadFailed(f"{where}[{name!r}]: shape {dims}: expected dimensions of 1 or more, or -1 for any")
    return name, datatype, dims


def _check_methods(kind: type[Any], file: Path) -> None:
    methods = {"predict": ("batch",), "load": ("folder", "config"), "unload": ()}
    for method, arguments in methods.items():
        function = getattr(kind, method, None)
        if function is None and method != "predict":
            continue
        signature = f"{method}(self{''.join(', ' + name for name in arguments)})"
        if not callable(function):
            raise LoadFailed(f"{file.name}: class {kind.__name__} has no method {signature}")
        if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
            raise LoadFailed(f"{file.name}: {kind.__name__}.{method} is async: expected def {signature}")
        try:
            inspect.signature(function).bind(None, *arguments)
        except TypeError:
            raise LoadFailed(
                f"{file.name}: {kind.__name__}.{method}{inspect.signature(function)} cannot be called as {signature}"
            ) from None
        # A function written in C may have no signature.
        except ValueError:
            continue
