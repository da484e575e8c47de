"""What runs a model: a runtime loads files into sessions, a session maps arrays to arrays.

Both are blocking, and called on worker threads only. There are ONNX Runtime (`onnx_runtime`), Python
(`python_runtime`), operations (`kernels_runtime`) and other servers (`remote_runtime`); `choice` says which one a model
is for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from services.infer.requests.ragged import Value
from services.infer.requests.signature import TensorSpec
from services.infer.requests.tensors import Tensor
from services.infer.runtimes.gpu_stream import GpuStream

# Model processes import this module and no protobuf.
if TYPE_CHECKING:
    from shoal.inference.v2 import model_config_pb2 as pb


def _empty_config() -> pb.ModelConfig:
    from shoal.inference.v2 import model_config_pb2

    return model_config_pb2.ModelConfig()


class ModelFailed(Exception):
    """The model raised. The message is the model's own, without the insides of the runtime: callers see it."""


@dataclass(frozen=True)
class About:
    """Whose file is loaded."""

    name: str
    version: int = 1
    folder: Path | None = None
    """The model's folder; None for a bare file."""
    config: pb.ModelConfig = field(default_factory=_empty_config)
    """As it was written: not completed yet."""
    instances: int = 1
    """How many executions may run at the same time."""
    is_given_up: Callable[[], bool] = bool
    """Nobody wants it any more: loading may end."""
    digest: str = ""
    """What its content is: another one is another model. Empty: nobody said."""


class TensorPlacement(NamedTuple):
    """Where some executions of a model run."""

    kind: str = "auto"
    """`cpu`, `gpu`, or `auto`: on GPUs when there are any."""
    gpu: int | None = None
    """Its number; None: on each GPU that there is."""
    runs: int = 1
    """How many at the same time; on each GPU."""


class Provider(NamedTuple):
    """What ONNX Runtime runs a model with."""

    name: str
    """As configurations call it: `tensorrt`."""
    provider: str
    """As ONNX Runtime calls it: `TensorrtExecutionProvider`."""
    options: Mapping[str, str]


@dataclass(frozen=True)
class SessionOptions:
    """How to run a model."""

    intra_op_threads: int
    inter_op_threads: int = 1
    graph_level: int = 0
    """How far the graph is optimised, in Triton's numbers. 0: as far as can be, -1: basic, 1: extended, 2: not."""
    is_parallel: bool = False
    """Operators that do not need each other run at the same time."""
    has_arena: bool = True
    """Memory that a run is done with is kept for the next."""
    has_pattern: bool = True
    """The memory that runs with the same shapes need is planned once."""
    entries: Mapping[str, str] = field(default_factory=dict)
    """The runtime's own settings, by its own names."""
    run_entries: Mapping[str, str] = field(default_factory=dict)
    """The same, for each run."""
    shares_stream: bool = False
    """On a GPU, what all models that say so put their work on, with operations; else the session has its own."""
    places: Sequence[TensorPlacement] = (TensorPlacement("cpu"),)
    gpu_providers: Sequence[Provider] = ()
    """Preferred to the plain ones on GPUs, the first most."""
    cpu_providers: Sequence[Provider] = ()
    """The same on the CPU."""
    about: About | None = None
    """For a runtime that wants to know."""


@dataclass(frozen=True)
class RowResults:
    """What came of the rows of one execution."""

    values: Sequence[Value]
    """The outputs that were asked for, in order: a row for each that came."""
    unfit: Mapping[int, str]
    """What is wrong with the rows that could not be processed, by their number: theirs mean nothing."""


class Session(ABC):
    """One loaded model. Safe to run on several threads at the same time.

    What only some of them can is a member too, and what it is for those that cannot stands here: a session says it by
    deriving from this class, and what stands around a session passes on what it is asked for.
    """

    inputs: tuple[TensorSpec, ...]
    """As the file says; a shape of () may also mean that the file says nothing of it."""
    outputs: tuple[TensorSpec, ...]
    text: bool
    """BYTES elements must be `str`, and come as `str`; else they are `bytes`."""

    optional_inputs: tuple[TensorSpec, ...] = ()
    """More inputs: the model has a value for each that is not given."""
    sees_missing: bool = False
    """It sees for itself which inputs came: the configuration may call any of them optional."""
    wants_requests: bool = False
    """It is given each request with what that says of itself, not only rows."""
    takes_rows: bool = False
    """`run_rows`: its inputs and outputs may be ragged, and it tells rows that it cannot process from the others."""
    reshapes: bool = False
    """A `reshape` of the configuration is its own doing: it already has the shapes that clients see."""
    only_computes: bool = False
    """It waits for nobody, and its time is that of its arithmetic: a short run may be made on the event loop."""
    gpus: tuple[int, ...] = ()
    """Those that it runs on; none: on the CPU, or nobody knows."""
    lane: GpuStream | None = None
    """The one GPU that it takes tensors on, and can leave them on; none: tensors are on the host."""
    is_tried: bool = True
    """Made-up inputs may be tried on it."""
    says_batch: bool = False
    """Whether the `max_batch_size` of what it completed is meant, even 0."""

    @abstractmethod
    def run(self, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> list[Tensor]:
        """The outputs of these names. They do not share memory with the inputs.

        Raises:
            ModelFailed: the model cannot process these inputs.
        """

    def run_rows(self, inputs: Mapping[str, Value], outputs: Sequence[str], stay: Collection[str] = ()) -> RowResults:
        """As `run`, with `Rows` for each input that is ragged. Only where it `takes_rows`.

        `stay`: outputs that may come as `Resident`. With a lane, inputs may be such, too.
        """
        raise NotImplementedError("this session takes no rows")

    def run_parts(
        self, inputs: Mapping[str, Sequence[Any]], outputs: Sequence[str], stay: Collection[str] = ()
    ) -> list[Any]:
        """As `run`, with each input as the tensors of several calls, all on the host or all `Resident`; the outputs are
        those of all rows. Only where there is a lane, and it does not take rows. `stay` as in `run_rows`."""
        raise NotImplementedError("this session takes no parts")

    def close(self) -> None:
        """Gives its memory back. It is not run after that."""
        return

    def parts(self) -> Sequence[Session]:
        """The same model on each device that it runs on: what is warmed up one by one."""
        return (self,)

    def declare(self, datatypes: Mapping[str, str]) -> None:
        """Tells it of inputs, by their datatypes, that the server fills in and the model may not have declared."""
        return

    def completed(self, config: pb.ModelConfig, *, says_batch: bool) -> pb.ModelConfig:
        """The configuration with what the model says of itself; as it is where the model says nothing.

        Args:
            says_batch: `config` has a `max_batch_size` that is meant, even 0.

        Raises:
            FailedPrecondition: the two contradict each other.
        """
        return config


class Runtime(Protocol):
    """Loads models of one kind of file."""

    platform: str
    """The name in a model's configuration: `onnxruntime_onnx`."""
    backend: str
    """The other name there: `onnxruntime`."""
    model_file: str
    """What a model's file is called when nobody says otherwise: `model.onnx`; empty: there is none."""
    can_decouple: bool
    """Whether its models may give any number of responses to a request."""

    def load(self, file: Path, options: SessionOptions) -> Session:
        """Loads a model. Without a `model_file`, `file` is the version's folder.

        Raises:
            FailedPrecondition: the file is no model, or one that this runtime cannot run; the message says why.
        """
