"""The runtimes there are, and which one a model is for."""

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

_OF_PROCESSES = ("execution_timeout_ms", "load_timeout_ms")


class Runtimes:
    """By what a model's configuration says, or else by which file there is. The first one is for all that say nothing.

    Args:
        isolated: runs the models of the first one in processes of their own.
        for_gpus: runs those that would run on a GPU, and do not say where: once for several infer processes.
    """

    def __init__(
        self, runtimes: Sequence[Runtime], isolated: Runtime | None = None, for_gpus: Runtime | None = None
    ) -> None:
        self._runtimes = tuple(runtimes)
        self._for_gpus = for_gpus
        self._isolated = isolated

    def of(self, config: pb.ModelConfig, version_folder: Path, bare_file: str = "") -> Runtime:
        """The runtime for a model. One that no runtime is for gets the first, whose check refuses it by name.

        Raises:
            FailedPrecondition: a parameter that is for models in processes of their own only.
        """
        first = self._runtimes[0]
        found = self._named(config) or self._by_file(config, version_folder, bare_file) or first
        if found is not first or self._isolated is None:
            return found
        said = config.parameters[ISOLATION].string_value if ISOLATION in config.parameters else ""
        if said in ("", "none"):
            for key in _OF_PROCESSES:
                if key in config.parameters:
                    raise FailedPrecondition(f"parameter {key} needs parameter {ISOLATION} 'process' or 'shared'")
            return self._for_gpus if self._for_gpus and not said and _is_for_gpus(config) else found
        return self._isolated

    def _named(self, config: pb.ModelConfig) -> Runtime | None:
        said = config.backend or config.platform or config.runtime
        return next((each for each in self._runtimes if said and said in (each.backend, each.platform)), None)

    def _by_file(self, config: pb.ModelConfig, version_folder: Path, bare_file: str) -> Runtime | None:
        with_file = [each for each in self._runtimes if each.model_file]
        name = bare_file or config.default_model_filename
        if name:
            return next((each for each in with_file if Path(name).suffix == Path(each.model_file).suffix), None)
        return next((each for each in with_file if (version_folder / each.model_file).is_file()), None)


def _is_for_gpus(config: pb.ModelConfig) -> bool:
    """Whether an ONNX model with this configuration would run on a GPU of this machine, and can be shared there."""
    if config.HasField("sequence_batching"):
        return False
    try:
        options = onnx_settings.session_options(config, 1)
        return any(device.gpu is not None for device, _ in devices(options))
    except FailedPrecondition:  # Whoever loads it says so.
        return False
