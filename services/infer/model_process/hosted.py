"""What a model process hosts: a model behind one small interface, whatever it is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from services.infer.model_process.payload import Tensor, TensorPart


class LoadFailed(Exception):
    """The model cannot be served; the message tells its owner why."""


class RunFailed(Exception):
    """The model cannot process this; the message tells the caller."""

    def __init__(self, message: str, code: str = "INTERNAL", *, is_own: bool = False) -> None:
        """`code` is the name of a status. `is_own`: the model itself answers so, in words for its callers."""
        super().__init__(message)
        self.code = code
        self.is_own = is_own


@dataclass(frozen=True)
class Load:
    """What to load."""

    kind: str
    """`python` or `onnx`."""
    name: str
    version: str
    file: Path
    folder: Path
    """The model's folder, with the folders of its versions in it."""
    instance: str
    config: Mapping[str, Any]
    """The model's configuration, in Triton's JSON form."""
    options: Mapping[str, Any]
    """Of the runtime: threads and entries."""
    module: str = "model"
    """What a Python module is called once it is imported."""
    runs: int = 1
    """Executions that it takes at a time: more than one, where several infer processes share it."""


@dataclass(frozen=True)
class Batch:
    """The requests of one execution."""

    inputs: Mapping[str, tuple[str, Tensor]]
    """Datatype and array; the rows of all requests, one behind the other."""
    outputs: Sequence[str]
    """The names that are wanted."""
    rows: Sequence[int]
    """Of each request. Empty: there is one request, and no batch dimension."""
    details: Sequence[Mapping[str, Any]]
    """What each request says about itself; empty unless the model wants requests."""

    is_cancelled: Callable[[], bool] = bool
    """Whether nobody waits for any of them any more."""

    def arrays(self) -> dict[str, Tensor]:
        return {name: array for name, (_, array) in self.inputs.items()}


@dataclass(frozen=True)
class Given:
    """What the model gave for a batch."""

    parts: Sequence[TensorPart]
    """Rows of all requests; or, with `responses`, the outputs of each request, one after the other."""
    responses: Sequence[Mapping[str, Any]] | None = None
    """For each request `{"outputs": how many of the parts are its}` or `{"error": text, "code": status}`."""


class Sender(Protocol):
    """Where the responses of one request go, for a model that gives any number of them. Any thread may use it."""

    def send(self, parts: Sequence[TensorPart], *, final: bool) -> None:
        """Sends one response; waits while the client reads too slowly.

        Raises:
            RunFailed: nobody wants it any more; or the last one was sent.
        """

    def fail(self, error: RunFailed, *, final: bool) -> None:
        """Sends an error in place of a response. Raises nothing: an error that nobody wants is dropped."""

    def end(self) -> None:
        """There are no more responses. Raises nothing."""

    def abandon(self) -> None:
        """The model has dropped it: there are no more responses. For finalizers: takes no lock."""

    def is_cancelled(self) -> bool:
        """Whether nobody waits for responses any more."""


Call = Callable[[Mapping[str, Any], Sequence[TensorPart]], "tuple[Mapping[str, Any], list[tuple[str, str, Tensor]]]"]
"""Calls another model of the server: a header and tensors there, a header and tensors back."""


@dataclass
class HostedModelInfo:
    """What is known of a model once it is loaded."""

    inputs: Sequence[tuple[str, str, Sequence[int]]] = ()
    """Name, datatype, and whole shape, with the batch dimension."""
    outputs: Sequence[tuple[str, str, Sequence[int]]] = ()
    optional_inputs: Sequence[tuple[str, str, Sequence[int]]] = ()
    """Those that a request may leave out, where the model itself knows."""
    text: bool = False
    """BYTES elements must be UTF-8."""
    config: Mapping[str, Any] | None = None
    """The configuration as the model itself completed it."""
    wants_requests: bool = False
    """It is given each request with what it says about itself, not only rows."""
    sees_missing: bool = True
    """It sees for itself which inputs came."""
    is_decoupled: bool = False
    """It gives any number of responses to a request."""
    is_tried: bool = True
    """Made-up inputs may be tried on it."""
    says_batch: bool = False
    """The `max_batch_size` of its `config` is meant, even 0."""
    gpus: Sequence[int] = ()
    """Those that it runs on."""


class Hosted(Protocol):
    """A loaded model. One thread uses it."""

    facts: HostedModelInfo

    def run(self, batch: Batch) -> Given:
        """Raises RunFailed when the model cannot process the batch."""

    def start(self, batch: Batch, sender: Sender) -> Iterator[None] | None:
        """Begins with one request of a decoupled model.

        An iterator is stepped until its end: each step sends one response at most. None: the model sends on its own.
        """

    def close(self) -> None:
        """The model's own good-bye. May raise anything."""
