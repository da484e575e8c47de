"""Runtimes that run models in model processes: PythonRuntime for `model.py`, IsolatedOnnxRuntime for .onnx files.

Keys in the `parameters` of a model's configuration:

    isolation              process (the default): one for each instance; shared: one for all infer processes of a
                           server; none: a thread in the server's own process
    execution_timeout_ms   a process whose run takes longer is killed; unset: no limit
    load_timeout_ms        the same for loading; 600000 when unset
    max_streams            concurrent requests of one instance of a decoupled model; 64 when unset
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from mesh.rest.plain_json import as_json
from services.infer.model_process import interpreter
from services.infer.model_process.instance import Instance, Runner
from services.infer.model_process.process import OWNER, Process, program
from services.infer.model_process.session import Limits, ProcessSession, RunInnerCall
from services.infer.model_process.shared.owners import Owners, key_of
from services.infer.model_process.shared.shared_process import SharedProcess
from services.infer.model_process.thread_runner import ThreadRunner
from services.infer.runtimes.onnx_devices import Device
from services.infer.runtimes.onnx_runtime import devices
from services.infer.runtimes.parameters import number, texts
from services.infer.runtimes.runtime import About, ExecutionPlacement, SessionOptions
from shoal.errors import FailedPrecondition

_LOAD_TIMEOUT_MS = 600_000
_MAX_STREAMS = 64
# Each Python model in the server's own process is imported under a module name of its own.
_MODULES = itertools.count(1)


class PythonRuntime:
    """Runtime of `model.py` files."""

    platform = "python"
    backend = "python"
    model_file = "model.py"
    can_decouple = True
    kind = "python"
    isolations: tuple[str, ...] = ("process", "shared", "none")

    def __init__(
        self,
        environ: Mapping[str, str] | None = None,
        call: RunInnerCall | None = None,
        owners: Owners | None = None,
        isolation: str = "process",
    ) -> None:
        """Store the arguments.

        Args:
            environ: the environment from which model processes get the allowed variables; None: the server's own.
            call: runs the calls that models make of other models; None: such calls are rejected.
            owners: registry of shared model processes; None: they are shared within this infer process only.
            isolation: the default of the parameter `isolation`.
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
                self._starter(file, values, about, header),
                title if len(headers) == 1 else f"{title} instance {n}",
                header,
                load_timeout_s=limits.load_s,
            )
            for n, header in enumerate(headers)
        ]
        return ProcessSession(about.name, title, instances, limits, self._call, is_given_up=about.given_up)

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
            raise FailedPrecondition(
                "parameter execution_timeout_ms needs isolation 'process': threads cannot be killed"
            )

    def _starter(
        self, file: Path, values: Mapping[str, str], about: About, header: Mapping[str, Any]
    ) -> Callable[[str], Runner]:
        """Return the function that starts a runner for one instance."""
        if values.get("isolation") == "none":
            return ThreadRunner
        python = interpreter.find_interpreter(self._environ)
        environment, folder = interpreter.environment(self._environ), str(file.parent)
        if values.get("isolation") == "shared":
            owner, key = program(python, environment, folder, OWNER), key_of(header, about.digest)
            return lambda title: SharedProcess(self._owners, key, owner, title)
        child = program(python, environment, folder)
        return lambda title: Process(child, title)

    def _load_headers(
        self, file: Path, options: SessionOptions, about: About, values: Mapping[str, str]
    ) -> list[dict[str, Any]]:
        """Return the load request of each instance: the fields of `hosted.Load`."""
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
    """Runtime of .onnx files in model processes."""

    platform = "onnxruntime_onnx"
    backend = "onnxruntime"
    model_file = "model.onnx"
    can_decouple = False
    kind = "onnx"

    def _load_headers(
        self, file: Path, options: SessionOptions, about: About, values: Mapping[str, str]
    ) -> list[dict[str, Any]]:
        placed = devices(options)
        if values["isolation"] == "shared":
            # All instances share one session, which runs so many executions concurrently.
            runs = sum(count for _, count in placed)
            return [{**self._load_header(file, options, about, 0, values), "runs": runs}] * runs
        per_process = per_process_options(options, placed)
        return [self._load_header(file, each, about, n, values) for n, each in enumerate(per_process)]

    def _options(self, options: SessionOptions, values: Mapping[str, str]) -> dict[str, Any]:
        """Return the fields of `options` as JSON values."""
        values_by_name = {each.name: getattr(options, each.name) for each in fields(options)}
        lists = ("placements", "gpu_providers", "cpu_providers")
        return {key: [list(each) for each in values_by_name[key]] for key in lists} | {
            name: dict(value) if isinstance(value, Mapping) else value
            for name, value in values_by_name.items()
            if isinstance(value, int | str | Mapping)
        }


def per_process_options(options: SessionOptions, placed: Sequence[tuple[Device, int]]) -> list[SessionOptions]:
    """Return the options of each model process: its one device, and only the providers for that device.

    Args:
        placed: each device with its number of concurrent executions; each execution gets a process.
    """
    on_cpu = replace(options, placements=(ExecutionPlacement("cpu"),), gpu_providers=())
    on_gpu = replace(options, cpu_providers=())
    return [
        on_cpu if device.gpu is None else replace(on_gpu, placements=(ExecutionPlacement("gpu", device.gpu),))
        for device, count in placed
        for _ in range(count)
    ]


def _milliseconds(values: Mapping[str, str], key: str, default: int) -> int:
    return number(values, key, default, 0, 86_400_000)
