"""Choice of a model's runtime among the available ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from services.infer.runtimes import onnx_settings
from services.infer.runtimes.onnx_runtime import devices
from services.infer.runtimes.runtime import Runtime
from shoal.errors import FailedPrecondition
from shoal.inference.v2 import model_config_pb2 as pb

ISOLATION = "isolation"
"""The parameter that gives an ONNX model a process of its own, or one that several infer processes share."""

_PROCESS_PARAMETERS = ("execution_timeout_ms", "load_timeout_ms")


class Runtimes:
    """The available runtimes; chooses by a model's configuration, else by its file. The first one is the default."""

    def __init__(
        self, runtimes: Sequence[Runtime], isolated: Runtime | None = None, for_gpus: Runtime | None = None
    ) -> None:
        """Store the runtimes.

        Args:
            isolated: runs models of the first runtime whose parameter `isolation` asks for a process.
            for_gpus: runs models of the first runtime that use a GPU and have no parameter `isolation`, in one process
                for several infer processes.
        """
        self._runtimes = tuple(runtimes)
        self._for_gpus = for_gpus
        self._isolated = isolated

    def of(self, config: pb.ModelConfig, version_folder: Path, bare_file: str = "") -> Runtime:
        """Return the runtime of a model. An unknown backend gets the first runtime, whose check rejects it by name.

        Raises:
            FailedPrecondition: a parameter of model processes is set, and the model does not run in one.
        """
        first = self._runtimes[0]
        found = self._by_name(config) or self._by_file(config, version_folder, bare_file) or first
        if found is not first or self._isolated is None:
            return found
        isolation = config.parameters[ISOLATION].string_value if ISOLATION in config.parameters else ""
        if isolation in ("", "none"):
            for key in _PROCESS_PARAMETERS:
                if key in config.parameters:
                    raise FailedPrecondition(f"parameter {key} needs parameter {ISOLATION} 'process' or 'shared'")
            return self._for_gpus if self._for_gpus and not isolation and _is_for_gpus(config) else found
        return self._isolated

    def _by_name(self, config: pb.ModelConfig) -> Runtime | None:
        name = config.backend or config.platform or config.runtime
        return next((each for each in self._runtimes if name and name in (each.backend, each.platform)), None)

    def _by_file(self, config: pb.ModelConfig, version_folder: Path, bare_file: str) -> Runtime | None:
        with_file = [each for each in self._runtimes if each.model_file]
        name = bare_file or config.default_model_filename
        if name:
            return next((each for each in with_file if Path(name).suffix == Path(each.model_file).suffix), None)
        return next((each for each in with_file if (version_folder / each.model_file).is_file()), None)


def _is_for_gpus(config: pb.ModelConfig) -> bool:
    """Return True when an ONNX model with this configuration would use a GPU of this machine and can be shared."""
    if config.HasField("sequence_batching"):
        return False
    try:
        options = onnx_settings.session_options(config, 1)
        return any(device.gpu is not None for device, _ in devices(options))
    # Loading the model reports the error.
    except FailedPrecondition:
        return False
