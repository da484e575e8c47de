"""Models written in Python (`model.py`), as a `Runtime`: each instance in a process of its own.

Of its `parameters`, a model's configuration may say:

    isolation              process (the default); shared: once for all infer processes of a server; or none: in the
                           server's own process, on a thread
    execution_timeout_ms   a run that takes longer is ended, and its process with it; unset: no bound
    load_timeout_ms        the same for loading; 600000 when unset
    max_streams            requests that one instance of a decoupled model works on at a time; 64 when unset
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from services.infer.model_files.config_json import as_json
from services.infer.model_process import interpreter
from services.infer.model_process.instance import Instance, Running
from services.infer.model_process.process import OWNER, Process, program
from services.infer.model_process.session import InnerCall, Limits, ProcessSession
from services.infer.model_process.shared.owners import Owners, key_of
from services.infer.model_process.shared.shared_process import Shared
from services.infer.model_process.thread_runner import ThreadRunner
from services.infer.runtimes.onnx_devices import Device
from services.infer.runtimes.onnx_runtime import devices
from services.infer.runtimes.parameters import number, texts
from services.infer.runtimes.runtime import About, SessionOptions, TensorPlacement
from shoal.errors import FailedPrecondition

_LOAD_TIMEOUT_MS = 600_000
_MAX_STREAMS = 64
_MODULES = itertools.count(1)
# Models in the server's process are modules side by side: each has a name of its own.


class PythonRuntime:
    """Loads `model.py` files."""

    platform = "python"
    backend = "python"
    model_file = "model.py"
    can_decouple = True
    kind = "python"
    isolations: tuple[str, ...] = ("process", "shared", "none")

    def __init__(
        self,
        environ: Mapping[str, str] | None = None,
        call: InnerCall | None = None,
        owners: Owners | None = None,
        isolation: str = "process",
    ) -> None:
        """Makes sessions of model processes.

        Args:
            call: runs the calls that models make of other models; without it they are refused.
            owners: of the models that are shared; without it they are shared with nobody.
            isolation: what holds for models that do not say.
        """
        self._environ = dict(os.environ if environ is None else environ)
        self._call = call
        self._owners = owners or Owners()
        self._isolation = isolation

    def load(self, file: Path, options: SessionOptions) -> ProcessSession:
        about = options.about or About(file.parent.name)
        values = texts(about.config)
        values.setdefault("isolation", self._isolation)
        self._check(values)
        limits = Limits(
            execution_s=_milliseconds(values, "execution_timeout_ms", 0) / 1000 or math.inf,
            load_s=_milliseconds(values, "load_timeout_ms", _LOAD_TIMEOUT_MS) / 1000,
            streams=number(values, "max_streams", _MAX_STREAMS, 1, 4096),
        )
        title = f"{about.name} version {about.version}"
        headers = self._load_headers(file, options, about, values)
        instances = [
            Instance(
                self._beginning(file, values, about, header),
                title if len(headers) == 1 else f"{title} instance {n}",
                header,
                load_timeout_s=limits.load_s,
            )
            for n, header in enumerate(headers)
        ]
        return ProcessSession(about.name, title, instances, limits, self._call, is_given_up=about.is_given_up)

    def _check(self, values: Mapping[str, str]) -> None:
        if "EXECUTION_ENV_PATH" in values:
            raise FailedPrecondition(
                "parameter EXECUTION_ENV_PATH is not supported: install what the model imports beside Shoal, "
                "or set SHOAL_PYTHON to a Python that has it"
            )
        if values.get("isolation", "process") not in self.isolations:
            raise FailedPrecondition(
                f"parameter isolation '{values['isolation']}': expected {' or '.join(map(repr, self.isolations))}"
            )
        if values.get("isolation") == "none" and values.get("execution_timeout_ms"):
            raise FailedPrecondition("parameter execution_timeout_ms needs isolation 'process': a thread goes on")

    def _beginning(
        self, file: Path, values: Mapping[str, str], about: About, header: Mapping[str, Any]
    ) -> Callable[[str], Running]:
        if values.get("isolation") == "none":
            return ThreadRunner
        python = interpreter.interpreter(self._environ)
        environment, folder = interpreter.environment(self._environ), str(file.parent)
        if values.get("isolation") == "shared":
            owner, key = program(python, environment, folder, OWNER), key_of(header, about.digest)
            return lambda title: Shared(self._owners, key, owner, title)
        started = program(python, environment, folder)
        return lambda title: Process(started, title)

    def _load_headers(
        self, file: Path, options: SessionOptions, about: About, values: Mapping[str, str]
    ) -> list[dict[str, Any]]:
        """What each instance is to load."""
        return [self._load_header(file, options, about, n, values) for n in range(about.instances)]

    def _load_header(
        self, file: Path, options: SessionOptions, about: About, number: int, values: Mapping[str, str]
    ) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "name": about.name,
            "version": str(about.version),
            "file": str(file.absolute()),
            "folder": str((about.folder or file.parent.parent).absolute()),
            "instance": f"{about.name}_{number}",
            "config": as_json(about.config),
            "options": self._options(options, values),
            "module": f"model_{next(_MODULES)}" if values.get("isolation") == "none" else "model",
        }

    def _options(self, options: SessionOptions, values: Mapping[str, str]) -> dict[str, Any]:
        return {}


class IsolatedOnnxRuntime(PythonRuntime):
    """Loads .onnx files into processes of their own."""

    platform = "onnxruntime_onnx"
    backend = "onnxruntime"
    model_file = "model.onnx"
    can_decouple = False
    kind = "onnx"

    def _load_headers(
        self, file: Path, options: SessionOptions, about: About, values: Mapping[str, str]
    ) -> list[dict[str, Any]]:
        where = devices(options)
        if values["isolation"] == "shared":
            # One session for all, which takes so many executions at a time.
            runs = sum(count for _, count in where)
            return [{**self._load_header(file, options, about, 0, values), "runs": runs}] * runs
        alone = each_alone(options, where)
        return [self._load_header(file, each, about, n, values) for n, each in enumerate(alone)]

    def _options(self, options: SessionOptions, values: Mapping[str, str]) -> dict[str, Any]:
        given = {each.name: getattr(options, each.name) for each in fields(options)}
        lists = ("places", "gpu_providers", "cpu_providers")
        return {key: [list(each) for each in given[key]] for key in lists} | {
            name: dict(value) if isinstance(value, Mapping) else value
            for name, value in given.items()
            if isinstance(value, int | str | Mapping)
        }


def each_alone(options: SessionOptions, where: Sequence[tuple[Device, int]]) -> list[SessionOptions]:
    """The options of each execution, where each has a process of its own: its device, and what suits that."""
    on_cpu = replace(options, places=(TensorPlacement("cpu"),), gpu_providers=())
    on_gpu = replace(options, cpu_providers=())
    return [
        on_cpu if device.gpu is None else replace(on_gpu, places=(TensorPlacement("gpu", device.gpu),))
        for device, count in where
        for _ in range(count)
    ]


def _milliseconds(values: Mapping[str, str], key: str, default: int) -> int:
    return number(values, key, default, 0, 86_400_000)
