"""The connection to a remote server: bytes there, bytes back, and no thread for a call that is under way."""

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

_LOOK_S = 0.1
# How often somebody who waits while a model loads looks whether that is still wanted.


class Connection:
    """A channel of the blocking API, whose calls can also be awaited: one thread of gRPC's serves all of them, and any
    event loop may use it. The caller closes it.
    """

    def __init__(self, model: str, settings: RemoteSettings, fault: str = "") -> None:
        """`model` is its name here, `fault` is for `errors.of`.

        Raises:
            FailedPrecondition: a header or a file of TLS cannot be had.
        """
        self._model, self._settings, self._fault = model, settings, fault
        self._headers = settings.headers.read()
        options = _options(settings)
        target = settings.address.target
        if settings.tls is None:
            self._channel = grpc.insecure_channel(target, options)
        else:
            self._channel = grpc.secure_channel(target, settings.tls.credentials(), options)
        self._methods: dict[str, Any] = {}

    def renew_headers(self) -> bool:
        """Reads the headers again: whether a secret has been renewed. Raises as the constructor does."""
        before, self._headers = self._headers, self._settings.headers.read()
        return self._headers != before

    def start(self, method: str, data: bytes, timeout_s: float) -> grpc.Future[bytes]:
        """A call that is under way. Blocks no longer than `data` takes to be copied. `method`: `/<service>/<name>`."""
        found = self._methods.get(method)
        if found is None:
            found = self._methods[method] = self._channel.unary_unary(method)
        call: grpc.Future[bytes] = found.future(data, timeout=max(timeout_s, 0.0), metadata=self._headers)
        return call

    def outcome(self, call: grpc.Future[bytes]) -> bytes:
        """What a call that is over gave. Raises what `errors.of` says."""
        try:
            data: bytes = call.result()
        except grpc.RpcError as err:
            raise errors.of(err, self._model, self._fault) from err
        except grpc.FutureCancelledError as err:
            raise errors.NotToBlame(Unavailable(f"model '{self._model}': its remote call was ended")) from err
        return data

    def wait(self, call: grpc.Future[bytes], is_given_up: Callable[[], bool] = bool) -> bytes:
        """Blocks until the call is over, or nobody wants it any more. Raises as `outcome` does."""
        while not call.done():
            if is_given_up():
                call.cancel()
            # The call's own errors are for `outcome`.
            with suppress(grpc.FutureTimeoutError, grpc.FutureCancelledError, grpc.RpcError):
                call.result(timeout=_LOOK_S)
        return self.outcome(call)

    async def over(self, call: grpc.Future[bytes], then: Callable[[bytes], T]) -> T:
        """What `then` makes of the answer, on gRPC's thread. Cancelled, it cancels the call. Raises as `outcome` does,
        and what `then` raises.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def ended(_: object) -> None:
            try:
                result, error = then(self.outcome(call)), None
            except Exception as err:
                result, error = None, err
            with suppress(RuntimeError):  # The loop is gone, and so is everybody who waited.
                loop.call_soon_threadsafe(_settle, future, result, error)

        call.add_done_callback(ended)
        try:
            return await future
        except asyncio.CancelledError:
            call.cancel()
            raise

    def close(self) -> None:
        """Ends the calls that are under way."""
        self._channel.close()


def parsed(data: bytes, kind: type[M]) -> M:
    """The message. Raises ModelFailed when the bytes are none."""
    try:
        return kind.FromString(data)
    except DecodeError as err:
        raise ModelFailed(f"the remote server's answer of {len(data)} bytes is not what the protocol says") from err


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
        # A server that is back is found within about a second; gRPC's own backoff would wait up to two minutes.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", errors.RETRY_AFTER_MS),
        # Its own connection for each model: one that is unloaded takes nobody else's with it.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.keepalive_timeout_ms", settings.keepalive_timeout_ms),
    ]
    if settings.keepalive_time_ms:
        options.append(("grpc.keepalive_time_ms", settings.keepalive_time_ms))
    if settings.server_name:
        options.append(("grpc.ssl_target_name_override", settings.server_name))
    return options
