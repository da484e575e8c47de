"""Runtime `remote`: loads models of other servers, each as a connection and the metadata that the server reports."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from services.infer.remote import settings
from services.infer.remote.connection import Connection
from services.infer.remote.dialect import Dialect, RemoteModelInfo
from services.infer.remote.oip import Oip
from services.infer.remote.session import RemoteSession
from services.infer.remote.settings import OIP, TENSORFLOW_SERVING, TORCHSERVE, RemoteSettings
from services.infer.remote.tensorflow_serving import TensorFlowServing
from services.infer.remote.torchserve import TorchServe
from services.infer.requests.signature import TensorSpec
from services.infer.runtimes.runtime import About, SessionOptions
from shoal.errors import FailedPrecondition
from shoal.inference.v2 import model_config_pb2 as pb
from shoal.oip.datatypes import BY_NAME, BY_NUMBER

_DIALECTS: Mapping[str, Callable[[RemoteSettings], Dialect]] = {
    OIP: Oip,
    TENSORFLOW_SERVING: TensorFlowServing,
    TORCHSERVE: TorchServe,
}


class RemoteRuntime:
    """Runtime whose sessions are models of other servers. Needs no model file, only the model's configuration."""

    platform = "remote"
    backend = "remote"
    model_file = ""
    can_decouple = False

    def __init__(self, environ: Mapping[str, str] | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """Store the environment for references to secrets, and the clock of the deadlines."""
        self._environ = dict(os.environ if environ is None else environ)
        self._clock = clock

    def load(self, file: Path, options: SessionOptions) -> RemoteSession:
        """Connect to the model's server, and return the session.

        Raises:
            FailedPrecondition: the configuration is wrong, or the remote model cannot be served.
            Unavailable: the server is unreachable, or does not have the model yet.
        """
        about = options.about or About(file.name)
        remote = settings.read(about, self._environ)
        dialect, declared = _DIALECTS[remote.protocol](remote), _declared(about.config, remote)
        connection = Connection(about.name, remote, dialect.fault_text)
        try:
            return RemoteSession(about.name, remote, connection, dialect, declared, self._clock, about.given_up)
        except BaseException:
            connection.close()
            raise


def _declared(config: pb.ModelConfig, remote: RemoteSettings) -> RemoteModelInfo:
    """Return the inputs and outputs of the configuration, for a server that reports none."""
    batch = (-1,) if config.max_batch_size else ()
    inputs = tuple(TensorSpec(t.name, BY_NUMBER[t.data_type], (*batch, *t.dims)) for t in config.input)
    outputs = tuple(TensorSpec(t.name, BY_NUMBER[t.data_type], (*batch, *t.dims)) for t in config.output)
    if remote.protocol != TORCHSERVE:
        return RemoteModelInfo(inputs, outputs)
    inputs, outputs = inputs or _one("data"), outputs or _one("prediction")
    _check_bytes("input", inputs)
    _check_bytes("output", outputs)
    if len(outputs) > 1:
        raise FailedPrecondition(f"protocol '{TORCHSERVE}': a prediction is one output, got {len(outputs)}")
    return RemoteModelInfo(inputs, outputs)


def _one(name: str) -> tuple[TensorSpec, ...]:
    return (TensorSpec(name, BY_NAME["BYTES"], (1,)),)


def _check_bytes(role: str, specs: Sequence[TensorSpec]) -> None:
    for spec in specs:
        if not spec.datatype.is_bytes or spec.shape != (1,):
            raise FailedPrecondition(f"{role} '{spec.name}': protocol '{TORCHSERVE}' needs TYPE_STRING with dims [ 1 ]")
