"""Interface of a hosted model: the model inside a model process, be it ONNX or Python."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from services.infer.model_process.payload import Tensor, TensorPart

# Of a longer traceback, its begin and its end are written. The server reads output at 3 MB/s, and the model waits for
# that: the text of a caller in an error message would hold up all other callers.
_PRINTED_CHARACTERS = 4096


class LoadFailed(Exception):
    """The model cannot be loaded; the message gives the author of the model the reason."""


class RunFailed(Exception):
    """The model cannot process a request; the message is sent to the caller."""

    def __init__(self, message: str, code: str = "INTERNAL", *, is_own: bool = False) -> None:
        """`code` is the name of a status. `is_own`: the model itself returned this error, worded for its callers."""
        super().__init__(message)
        self.code = code
        self.is_own = is_own


def text_of(error: BaseException) -> str:
    """Return the class and the text of an error of a model, whose own code makes the text, and may fail."""
    try:
        text = str(error)[:_PRINTED_CHARACTERS]
    except Exception:
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def print_error(error: BaseException) -> None:
    """Write the traceback of an error of a model to standard error; of a long one, the begin and the end."""
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    if len(text) > 2 * _PRINTED_CHARACTERS:
        left_out = f"\n... ({len(text)} characters)\n"
        text = f"{text[:_PRINTED_CHARACTERS]}{left_out}{text[-_PRINTED_CHARACTERS:]}"
    print(text, end="", file=sys.stderr)


@dataclass(frozen=True)
class Load:
    """Load request of a model process."""

    kind: str
    """`python` or `onnx`."""
    name: str
    version: str
    file: Path
    folder: Path
    """The model's folder, with the folders of its versions in it."""
    instance: str
    """The instance's name, for the model: `NAME_NUMBER`."""
    config: Mapping[str, Any]
    """The model's configuration, in Triton's JSON form."""
    options: Mapping[str, Any]
    """Options of ONNX Runtime: the fields of SessionOptions. Empty for Python models."""
    module: str = "model"
    """The name under which a Python model's module is imported."""
    runs: int = 1
    """Concurrent executions: more than one only where several infer processes share the model process."""


@dataclass(frozen=True)
class Batch:
    """The requests of one execution."""

    inputs: Mapping[str, tuple[str, Tensor]]
    """Datatype and array of each input; the array holds the rows of all requests, one after the other."""
    outputs: Sequence[str]
    """Names of the requested outputs."""
    rows: Sequence[int]
    """Number of rows of each request. Empty: there is one request, and no batch dimension."""
    details: Sequence[Mapping[str, Any]]
    """Each request's id, parameters and flags (`request_info`); empty unless the model `wants_requests`."""

    is_cancelled: Callable[[], bool] = bool
    """Returns True when no caller waits for any of the requests any more."""

    def arrays(self) -> dict[str, Tensor]:
        return {name: array for name, (_, array) in self.inputs.items()}


@dataclass(frozen=True)
class BatchResult:
    """The outputs of one batch."""

    parts: Sequence[TensorPart]
    """Outputs with the rows of all requests; or, with `responses`, the outputs of each request, one after the other."""
    responses: Sequence[Mapping[str, Any]] | None = None
    """For each request `{"outputs": its number of parts}` or `{"error": text, "code": status}`."""


class Sender(Protocol):
    """Response stream of one request of a decoupled model. Any thread may use it."""

    def send(self, parts: Sequence[TensorPart], *, final: bool) -> None:
        """Send one response; blocks while the client reads too slowly.

        Raises:
            RunFailed: the request is cancelled, or its last response was sent already.
        """

    def fail(self, error: RunFailed, *, final: bool) -> None:
        """Send an error in place of a response. Raises nothing: the error of a cancelled request is dropped."""

    def end(self) -> None:
        """End the stream. Raises nothing."""

    def abandon(self) -> None:
        """End the stream of a sender that the model has dropped. For finalizers: takes no lock."""

    def is_cancelled(self) -> bool:
        """Return True when the caller waits for no more responses."""


MakeInnerCall = Callable[
    [Mapping[str, Any], Sequence[TensorPart]], "tuple[Mapping[str, Any], list[tuple[str, str, Tensor]]]"
]
"""Makes an inner call (of another model): takes a header and tensors, returns a header and tensors."""


@dataclass
class HostedModelInfo:
    """Inputs, outputs and properties of a loaded model."""

    inputs: Sequence[tuple[str, str, Sequence[int]]] = ()
    """Name, datatype, and whole shape, with the batch dimension."""
    outputs: Sequence[tuple[str, str, Sequence[int]]] = ()
    optional_inputs: Sequence[tuple[str, str, Sequence[int]]] = ()
    """Inputs that have a default in the model itself, so that a request may omit them."""
    text: bool = False
    """BYTES elements must be UTF-8."""
    config: Mapping[str, Any] | None = None
    """The configuration as completed by the model; None when the model completes nothing."""
    wants_requests: bool = False
    """The model receives each request with its id, parameters and flags, not only rows."""
    handles_missing_inputs: bool = True
    """The model handles requests that omit inputs."""
    is_decoupled: bool = False
    """The model returns any number of responses to a request."""
    allows_trial_run: bool = True
    """The model may be run once with made-up inputs after loading."""
    sets_max_batch_size: bool = False
    """The `max_batch_size` in `config` was set on purpose, even if it is 0."""
    gpus: Sequence[int] = ()
    """Numbers of the GPUs that the model runs on."""


class Hosted(Protocol):
    """A loaded model. One thread uses it."""

    model_info: HostedModelInfo

    def run(self, batch: Batch) -> BatchResult:
        """Run one batch. Raises RunFailed when the model cannot process the batch."""

    def start(self, batch: Batch, sender: Sender) -> Iterator[None] | None:
        """Start one request of a decoupled model.

        The caller steps a returned iterator to its end; each step sends one response at most. None: the model sends its
        responses by itself.
        """

    def close(self) -> None:
        """Run the model's clean-up code. May raise anything."""
