"""Interfaces of runtimes and sessions: a runtime loads a model's files, the session maps input arrays to output arrays.

Both block and are called on worker threads only. The runtimes are ONNX Runtime (`onnx_runtime`), Python
(`model_process.python_runtime`), operators (`operators.kernels_runtime`) and other servers (`remote.remote_runtime`);
`choice` picks the runtime of a model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from services.infer.requests.ragged import Value
from services.infer.requests.signature import TensorSpec
from services.infer.requests.tensors import Tensor
from services.infer.runtimes.given_up import GivenUp
from services.infer.runtimes.gpu_stream import GpuStream

# Model processes import this module and no protobuf.
if TYPE_CHECKING:
    from shoal.inference.v2 import model_config_pb2 as pb


def _empty_config() -> pb.ModelConfig:
    from shoal.inference.v2 import model_config_pb2

    return model_config_pb2.ModelConfig()


class ModelFailed(Exception):
    """The model failed. Callers see the message: the model's own, without internals of the runtime."""


@dataclass(frozen=True)
class About:
    """The model whose file is loaded."""

    name: str
    version: int = 1
    folder: Path | None = None
    """The model's folder; None for a bare file."""
    config: pb.ModelConfig = field(default_factory=_empty_config)
    """The configuration before its completion."""
    instances: int = 1
    """Number of concurrent executions."""
    given_up: GivenUp = field(default_factory=GivenUp)
    """Set when the model is not desired any more, or loading takes too long: it ends early, where the runtime can."""
    digest: str = ""
    """Digest of the model's content; empty: unknown."""


class ExecutionPlacement(NamedTuple):
    """Device kind and number of executions: one `instance_group` of a configuration."""

    kind: str = "auto"
    """`cpu`, `gpu`, or `auto`: on GPUs when there are any."""
    gpu: int | None = None
    """The GPU's number; None: every GPU of this machine."""
    runs: int = 1
    """Concurrent executions, on each GPU."""


class Provider(NamedTuple):
    """Execution provider of ONNX Runtime."""

    name: str
    """The name in configurations: `tensorrt`."""
    provider: str
    """ONNX Runtime's name: `TensorrtExecutionProvider`."""
    options: Mapping[str, str]


@dataclass(frozen=True)
class SessionOptions:
    """Options of a session."""

    intra_op_threads: int
    inter_op_threads: int = 1
    graph_level: int = 0
    """Level of graph optimisation, in Triton's numbers. 0: all, -1: basic, 1: extended, 2: none."""
    is_parallel: bool = False
    """Operators that do not depend on each other run at the same time."""
    has_arena: bool = True
    """A memory arena keeps the memory of a run for the next run."""
    has_pattern: bool = True
    """Memory of runs with the same shapes is planned once."""
    entries: Mapping[str, str] = field(default_factory=dict)
    """The runtime's own settings of a session, by the runtime's names."""
    run_entries: Mapping[str, str] = field(default_factory=dict)
    """The runtime's own settings of each run, by the runtime's names."""
    shares_stream: bool = False
    """On a GPU, the session uses the stream that operators and other models share; else a stream of its own."""
    placements: Sequence[ExecutionPlacement] = (ExecutionPlacement("cpu"),)
    gpu_providers: Sequence[Provider] = ()
    """Providers for GPUs, in order of preference; empty: CUDA."""
    cpu_providers: Sequence[Provider] = ()
    """Providers for the CPU, in order of preference, before ONNX Runtime's own."""
    about: About | None = None
    """The model, for runtimes that need more than its file."""


@dataclass(frozen=True)
class RowResults:
    """Results of one execution by rows."""

    values: Sequence[Value]
    """The requested outputs, in order, each with one row for each input row."""
    unfit: Mapping[int, str]
    """Errors of the rows that could not be processed, by row number; the values of these rows are meaningless."""


class Session(ABC):
    """One loaded model. Several threads may run it at the same time.

    The class has the members for all optional abilities, with defaults for sessions that lack the ability. A session
    that wraps another one forwards the members that it supports.
    """

    inputs: tuple[TensorSpec, ...]
    """The inputs in the model's file; a shape of () may also mean that the file has no shape."""
    outputs: tuple[TensorSpec, ...]
    text: bool
    """BYTES elements are `str` in inputs and outputs; else they are `bytes`."""

    optional_inputs: tuple[TensorSpec, ...] = ()
    """Further inputs, which have a default in the model."""
    handles_missing_inputs: bool = False
    """The model handles requests that omit inputs: the configuration may declare any input as optional."""
    wants_requests: bool = False
    """The model receives each request with its id, parameters and flags, not only rows."""
    takes_rows: bool = False
    """`run_rows` is supported: inputs and outputs may be ragged, and each row may fail by itself."""
    reshapes: bool = False
    """The session applies the `reshape` of the configuration itself: its shapes are those of the clients."""
    only_computes: bool = False
    """A run computes and never waits: a short run may be made on the event loop."""
    may_not_end: bool = False
    """The values of inputs decide how long a run takes. It can be given up."""
    gpus: tuple[int, ...] = ()
    """Numbers of the GPUs that the model runs on; empty: the CPU, or unknown."""
    gpu_stream: GpuStream | None = None
    """The one GPU stream on which inputs and outputs may be `Resident`; None: all tensors are on the host."""
    allows_trial_run: bool = True
    """The model may be run once with made-up inputs after loading."""
    sets_max_batch_size: bool = False
    """The `max_batch_size` of the completed configuration was set on purpose, even if it is 0."""

    @abstractmethod
    def run(self, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> list[Tensor]:
        """Return the outputs with the names `outputs`. The arrays do not share memory with the inputs.

        Raises:
            ModelFailed: the model cannot process these inputs.
        """

    def run_until(self, inputs: Mapping[str, Tensor], outputs: Sequence[str], given_up: GivenUp) -> list[Tensor]:
        """As `run`, and fail early once the run is given up. Only with `may_not_end`."""
        raise NotImplementedError("this session does not support run_until")

    def run_rows(self, inputs: Mapping[str, Value], outputs: Sequence[str], stay: Collection[str] = ()) -> RowResults:
        """Run the model row by row; ragged inputs are `Rows`. Only with `takes_rows`.

        Args:
            inputs: with a `gpu_stream`, inputs may be `Resident`.
            stay: names of the outputs that may be returned as `Resident`.
        """
        raise NotImplementedError("this session does not support run_rows")

    def run_parts(
        self, inputs: Mapping[str, Sequence[Any]], outputs: Sequence[str], stay: Collection[str] = ()
    ) -> list[Any]:
        """Run the model on the tensors of several requests. Only with a `gpu_stream` and without `takes_rows`.

        Args:
            inputs: for each input, the tensors of all requests: all on the host, or all `Resident`.
            stay: names of the outputs that are returned as `Resident`.

        Returns:
            The outputs, each with the rows of all requests.
        """
        raise NotImplementedError("this session does not support run_parts")

    def close(self) -> None:
        """Free the model's memory. The session must not be run after that."""
        return

    def interrupt(self) -> None:
        """End the runs in progress, where the runtime can, and fail later ones: the load was given up. Any thread."""
        return

    def shrink(self) -> None:
        """Free memory that is kept for later runs. Called by any thread, while others run or close the session."""
        return

    def device_sessions(self) -> Sequence[Session]:
        """Return one session for each device of the model; warm-up runs each of them."""
        return (self,)

    def declare(self, datatypes: Mapping[str, str]) -> None:
        """Add inputs, with their datatypes, that the server fills in and the model may not have declared."""
        return

    def completed(self, config: pb.ModelConfig, *, sets_max_batch_size: bool) -> pb.ModelConfig:
        """Return `config` completed by the model's own declarations; `config` itself when the model has none.

        Args:
            sets_max_batch_size: the `max_batch_size` of `config` was set on purpose, even if it is 0.

        Raises:
            FailedPrecondition: the configuration contradicts the model.
        """
        return config


class Runtime(Protocol):
    """Loader of models of one kind of file."""

    platform: str
    """The `platform` in a model's configuration: `onnxruntime_onnx`."""
    backend: str
    """The `backend` in a model's configuration: `onnxruntime`."""
    model_file: str
    """Default name of a model's file: `model.onnx`; empty: models have no file."""
    can_decouple: bool
    """Models may return any number of responses to a request."""

    def load(self, file: Path, options: SessionOptions) -> Session:
        """Load a model. For a runtime without `model_file`, `file` is the version's folder.

        Raises:
            FailedPrecondition: the file is not a model, or this runtime cannot run it; the message says why.
        """
