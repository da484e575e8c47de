"""`pb_utils`' requests, responses and senders."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from services.infer.model_process.hosted import MakeInnerCall, RunFailed, Sender
from services.infer.model_process.payload import TensorPart
from services.infer.model_process.python.triton_tensor import TritonTensor
from services.infer.model_process.python.triton_types import CODE_OF, STATUS_OF, TritonError, TritonModelException

RESPONSE_COMPLETE_FINAL = 1
MEMORY_CPU, MEMORY_CPU_PINNED, MEMORY_GPU, MEMORY_DEFAULT = 0, 1, 2, 3


@dataclass(frozen=True)
class PreferredMemory:
    """`pb_utils.PreferredMemory`: accepted and ignored, responses are always in CPU memory."""

    preferred_memory: int = MEMORY_DEFAULT
    device_id: int = 0


class InferenceResponse:
    """`pb_utils.InferenceResponse`: the response of a model to one request, tensors or an error."""

    def __init__(self, output_tensors: Sequence[TritonTensor] = (), error: Any = None, parameters: Any = None) -> None:
        self._tensors = list(output_tensors or ())
        for tensor in self._tensors:
            if not isinstance(tensor, TritonTensor):
                raise TritonModelException(f"output_tensors has a {type(tensor).__name__}: expected pb_utils.Tensor")
        self._error = error if error is None or isinstance(error, TritonError) else TritonError(str(error))
        self._parameters = parameters or {}

    def output_tensors(self) -> list[TritonTensor]:
        return self._tensors

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error

    def parameters(self) -> Any:
        return self._parameters

    def parts(self, requested: Sequence[str]) -> list[TensorPart]:
        """Return the requested outputs in the form in which the server receives them.

        Raises:
            RunFailed: the response is an error, or an output is missing or cannot be sent.
        """
        if self._error is not None:
            code = STATUS_OF.get(self._error.code(), "INTERNAL")
            raise RunFailed(self._error.message(), code, is_own=True)
        by_name = {tensor.name(): tensor for tensor in self._tensors}
        if missing := [name for name in requested if name not in by_name]:
            raise RunFailed(
                f"the response has no output '{missing[0]}': it has {', '.join(map(repr, by_name)) or 'none'}"
            )
        try:
            return [by_name[name].part() for name in requested]
        except TypeError as err:
            raise RunFailed(f"the response cannot be sent: {err}") from err


class ResponseSender:
    """`pb_utils.InferenceResponseSender`: sends the responses of one request. Any thread may use it."""

    def __init__(self, sender: Sender, requested: Sequence[str]) -> None:
        """`requested`: names of the requested outputs."""
        self._sender, self._requested = sender, requested
        self._is_closed = False

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        """Send a response; without one, the FINAL flag ends the stream. Raises TritonModelException."""
        if self._is_closed:
            raise TritonModelException("Unable to send response. Response sender has been closed.")
        if flags not in (0, RESPONSE_COMPLETE_FINAL):
            raise TritonModelException(f"Unable to send response. Unsupported flag: {flags}")
        is_final = flags == RESPONSE_COMPLETE_FINAL
        if response is None and not is_final:
            raise TritonModelException("Inference Response object must be provided when the flags is not set to FINAL")
        self._is_closed = is_final
        if response is None:
            self._sender.end()
            return
        if not isinstance(response, InferenceResponse):
            raise TritonModelException(f"expected a pb_utils.InferenceResponse, got a {type(response).__name__}")
        try:
            parts = response.parts(self._requested)
        except RunFailed as err:
            self._sender.fail(err, final=is_final)
            return
        try:
            self._sender.send(parts, final=is_final)
        except RunFailed as err:
            raise TritonModelException(str(err)) from err

    def is_cancelled(self) -> bool:
        return self._sender.is_cancelled()

    def __del__(self) -> None:
        # A model that drops its sender can send no more responses: the request ends.
        if not self._is_closed:
            self._sender.abandon()


class InferenceRequest:
    """`pb_utils.InferenceRequest`: a request to a model, or a model's own request to another model of this server."""

    _call: MakeInnerCall | None = None
    _why_no_call = "only a model can call another one"

    def __init__(
        self,
        request_id: str = "",
        correlation_id: int | str = 0,
        inputs: Sequence[TritonTensor] = (),
        requested_output_names: Sequence[str] = (),
        model_name: str = "",
        model_version: int = -1,
        flags: int = 0,
        timeout: int = 0,
        preferred_memory: PreferredMemory | None = None,
        trace: Any = None,
        parameters: Mapping[str, Any] | str | None = None,
    ) -> None:
        for tensor in inputs:
            if not isinstance(tensor, TritonTensor):
                raise TritonModelException(f"inputs has a {type(tensor).__name__}: expected pb_utils.Tensor")
        self._id, self._correlation_id = request_id, correlation_id
        self._inputs, self._outputs = list(inputs), list(requested_output_names)
        self._model_name, self._model_version = model_name, model_version
        self._flags, self._timeout = flags, timeout
        self._memory = preferred_memory or PreferredMemory()
        self._trace, self._parameters = trace, parameters or {}
        self._sender: ResponseSender | None = None
        self._cancelled: Callable[[], bool] = bool

    def bind(self, sender: ResponseSender, is_cancelled: Callable[[], bool]) -> None:
        """Attach the response sender and the cancellation check of the caller."""
        self._sender, self._cancelled = sender, is_cancelled

    def inputs(self) -> list[TritonTensor]:
        return self._inputs

    def requested_output_names(self) -> list[str]:
        return self._outputs

    def request_id(self) -> str:
        return self._id

    def correlation_id(self) -> int | str:
        return self._correlation_id

    def model_name(self) -> str:
        return self._model_name

    def model_version(self) -> int:
        return self._model_version

    def flags(self) -> int:
        return self._flags

    def set_flags(self, flags: int) -> None:
        self._flags = flags

    def timeout(self) -> int:
        """Microseconds; 0: none."""
        return self._timeout

    def preferred_memory(self) -> PreferredMemory:
        return self._memory

    def trace(self) -> Any:
        return self._trace

    def parameters(self) -> Any:
        """JSON text, as Triton gives it."""
        return self._parameters

    def is_cancelled(self) -> bool:
        return self._cancelled()

    def get_response_sender(self) -> ResponseSender:
        if self._sender is None:
            raise TritonModelException("this request has no response sender: it was made by the model")
        return self._sender

    def set_release_flags(self, flags: int) -> None:
        raise TritonModelException("rescheduling of requests (set_release_flags) is not supported")

    def exec(self, decoupled: bool = False) -> InferenceResponse:
        """Run the request on the model `model_name` and wait for the response, which has any error of that model."""
        call = type(self)._call
        if call is None:
            raise TritonModelException(f"InferenceRequest.exec is not supported here: {self._why_no_call}")
        if decoupled:
            raise TritonModelException("InferenceRequest.exec(decoupled=True) is not supported: call with False")
        header, tensors = call(self._header(), [tensor.part() for tensor in self._inputs])
        if "error" in header:
            code = CODE_OF.get(str(header.get("code")), TritonError.INTERNAL)
            return InferenceResponse(error=TritonError(str(header["error"]), code))
        return InferenceResponse([TritonTensor(name, array, datatype) for name, datatype, array in tensors])

    async def async_exec(self, decoupled: bool = False) -> InferenceResponse:
        """Run `exec` on a thread, so that the model's event loop is not blocked."""
        return await asyncio.to_thread(self.exec, decoupled)

    def _header(self) -> dict[str, Any]:
        if not self._model_name:
            raise TritonModelException("a request for another model needs model_name")
        if not self._outputs:
            raise TritonModelException("a request for another model needs requested_output_names")
        return {
            "model": self._model_name,
            "version": "" if self._model_version == -1 else str(self._model_version),
            "request_id": self._id,
            "outputs": self._outputs,
            "timeout_us": self._timeout,
            "sequence_id": self._correlation_id,
            "flags": self._flags,
            "parameters": dict(self._parameters) if isinstance(self._parameters, Mapping) else {},
        }
