"""Connection to a remote server: sends and receives serialized messages; a call in progress needs no thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from services.infer.remote import errors
from services.infer.remote.settings import RemoteSettings
from services.infer.runtimes.runtime import ModelFailed
from shoal.errors import Unavailable

M = TypeVar("M", bound=Message)
T = TypeVar("T")

# A waiting load checks at this interval that the model is still desired.
_POLL_S = 0.1


class Connection:
    """Channel of gRPC's blocking API whose calls can also be awaited, from any event loop.

    One thread of gRPC's serves all calls. The caller closes the connection.
    """

    def __init__(self, model: str, settings: RemoteSettings, fault_text: str = "") -> None:
        """Open the channel. `model` is the local name of the model, `fault_text` is for `errors.of`.

        Raises:
            FailedPrecondition: a header or a TLS file cannot be read.
        """
        self._model, self._settings, self._fault = model, settings, fault_text
        self._headers = settings.headers.read()
        options = _options(settings)
        target = settings.address.target
        if settings.tls is None:
            self._channel = grpc.insecure_channel(target, options)
        else:
            self._channel = grpc.secure_channel(target, settings.tls.credentials(), options)
        self._methods: dict[str, Any] = {}

    def renew_headers(self) -> bool:
        """Read the headers again; return True when a secret has changed. Raises as the constructor."""
        before, self._headers = self._headers, self._settings.headers.read()
        return self._headers != before

    def start(self, method: str, data: bytes, timeout_s: float) -> grpc.Future[bytes]:
        """Start a call of `method`, `/<service>/<name>`, and return it. Blocks only while `data` is copied."""
        callable_ = self._methods.get(method)
        if callable_ is None:
            callable_ = self._methods[method] = self._channel.unary_unary(method)
        call: grpc.Future[bytes] = callable_.future(data, timeout=max(timeout_s, 0.0), metadata=self._headers)
        return call

    def response_of(self, call: grpc.Future[bytes]) -> bytes:
        """Return the response of a call that has ended. Raises the errors of `errors.of`."""
        try:
            data: bytes = call.result()
        except grpc.RpcError as err:
            raise errors.of(err, self._model, self._fault) from err
        except grpc.FutureCancelledError as err:
            raise errors.BatchFailed(Unavailable(f"model '{self._model}': its remote call was cancelled")) from err
        return data

    def wait(self, call: grpc.Future[bytes], is_given_up: Callable[[], bool] = bool) -> bytes:
        """Block until the call ends, and return its response. Cancels the call once `is_given_up` returns True.

        Raises as `response_of`.
        """
        while not call.done():
            if is_given_up():
                call.cancel()
            # `response_of` raises the call's own errors.
            with suppress(grpc.FutureTimeoutError, grpc.FutureCancelledError, grpc.RpcError):
                call.result(timeout=_POLL_S)
        return self.response_of(call)

    async def result_of(self, call: grpc.Future[bytes], convert: Callable[[bytes], T]) -> T:
        """Await the call, and return its response converted by `convert`, which runs on gRPC's thread.

        Cancellation cancels the call. Raises as `response_of`, and what `convert` raises.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def on_done(_: object) -> None:
            try:
                result, error = convert(self.response_of(call)), None
            except Exception as err:
                result, error = None, err
            # A closed event loop has no waiting task.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(_settle, future, result, error)

        call.add_done_callback(on_done)
        try:
            return await future
        except asyncio.CancelledError:
            call.cancel()
            raise

    def close(self) -> None:
        """Close the channel; calls in progress are cancelled."""
        self._channel.close()


def parsed(data: bytes, response_type: type[M]) -> M:
    """Return the parsed message. Raises ModelFailed when the bytes are not such a message."""
    try:
        return response_type.FromString(data)
    except DecodeError as err:
        raise ModelFailed(f"the remote server's response of {len(data)} bytes is not what the protocol says") from err


def _settle(future: asyncio.Future[Any], result: object, error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


def _options(settings: RemoteSettings) -> list[tuple[str, int | str]]:
    options: list[tuple[str, int | str]] = [
        ("grpc.max_send_message_length", settings.max_message_bytes),
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        # A restarted server is reconnected within about a second; gRPC's default backoff grows to two minutes.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", errors.RETRY_AFTER_MS),
        # One connection for each model: closing it does not end the calls of other models.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.keepalive_timeout_ms", settings.keepalive_timeout_ms),
    ]
    if settings.keepalive_time_ms:
        options.append(("grpc.keepalive_time_ms", settings.keepalive_time_ms))
    if settings.server_name:
        options.append(("grpc.ssl_target_name_override", settings.server_name))
    return options
