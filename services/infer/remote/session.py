"""Session of a remote model. The metadata from load time must stay valid as long as the model is served.

requests ──> one remote call ──> the remote server ──> outputs, checked
                                    └── an error: is the model still the same? ── no ──> reject until it is again
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import grpc
from google.protobuf.message import Message

from services.infer import sans_io
from services.infer.remote.connection import Connection, parsed
from services.infer.remote.dialect import Dialect, MetadataCall, RemoteModelInfo, changes
from services.infer.remote.errors import RETRY_AFTER_MS, BatchFailed, CredentialsRejected, NotServable
from services.infer.remote.settings import RemoteSettings
from services.infer.remote.wire import Pieces
from services.infer.requests.tensors import Tensor
from services.infer.runtimes.runtime import ModelFailed, Session
from shoal.errors import FailedPrecondition, InvalidArgument, ShoalError, Unavailable
from shoal.inference.v2 import model_config_pb2 as pb

log = logging.getLogger(__name__)

IN_FLIGHT = 4
"""Concurrent executions where the configuration has no instance_group: most of a call is waiting for the network."""

# A server has metadata in memory; loading should not wait longer for an unreachable server.
_METADATA_TIMEOUT_S = 5.0
# Least time between two checks for a changed model: a flood of bad requests must not double the calls.
_CHECK_INTERVAL_S = 1.0
# Joining and sending a larger message takes about a millisecond, and is done on a thread.
_LARGE_BYTES = 4 << 20


@dataclass(frozen=True)
class RemoteBatch:
    """Inputs and output names of one remote call, before serialization."""

    inputs: Mapping[str, Sequence[Tensor]]
    """By input, the arrays of the batch's requests."""
    outputs: Sequence[str]


class RemoteSession(Session):
    """One model of one server. Owns the connection. `run` works on any thread, `execute` on one event loop."""

    text = False
    handles_missing_inputs = True
    allows_trial_run = False
    """No trial: generated inputs are not sent to a server that others use, too."""

    def __init__(
        self,
        name: str,
        settings: RemoteSettings,
        connection: Connection,
        dialect: Dialect,
        declared: RemoteModelInfo,
        clock: Callable[[], float],
        is_given_up: Callable[[], bool] = bool,
    ) -> None:
        """Query the model's metadata; `declared` has the configuration's tensors, for a server that reports none.

        Raises:
            FailedPrecondition: the model cannot be served; the message has the reason.
            Unavailable: the server is unreachable, or does not have the model yet: loading may be retried.
        """
        self.name, self._settings, self._clock = name, settings, clock
        self._connection, self._dialect = connection, dialect
        self._info = self._load_info(is_given_up)
        self.inputs = self._info.inputs or declared.inputs
        self.outputs = self._info.outputs or declared.outputs
        if not self.inputs or not self.outputs:
            raise FailedPrecondition(
                f"the remote server at {settings.address.url} reports no inputs and outputs of the model: "
                "write input and output into config.pbtxt"
            )
        self.sets_max_batch_size = self._info.max_batch_size is not None
        self._inputs_by_name = {spec.name: spec for spec in self.inputs}
        self._outputs_by_name = {spec.name: spec for spec in self.outputs}
        self._change = ""
        self._may_have_changed = False
        self._next_check = 0.0

    def _load_info(self, is_given_up: Callable[[], bool]) -> RemoteModelInfo:
        try:
            return sans_io.run_sync(self._dialect.model_info(), lambda call: self._call_blocking(call, is_given_up))
        except NotServable:
            raise
        except (BatchFailed, ModelFailed, ShoalError) as err:
            # Unavailable for every cause: the error can be repaired on the remote server, without a reload here.
            text, prefix = str(err), f"model '{self.name}': the remote server "
            server = f"the remote server at {self._settings.address.url}"
            reason = f"{server} {text.removeprefix(prefix)}" if text.startswith(prefix) else f"{server}: {text}"
            raise Unavailable(reason, retry_after_ms=RETRY_AFTER_MS) from err

    def _call_blocking(self, call: MetadataCall, is_given_up: Callable[[], bool]) -> Message:
        return parsed(self._connection.wait(self._start_call(call), is_given_up), call.response_type)

    async def _call_async(self, call: MetadataCall) -> Message:
        return await self._connection.result_of(self._start_call(call), lambda data: parsed(data, call.response_type))

    def _start_call(self, call: MetadataCall) -> grpc.Future[bytes]:
        timeout_s = min(self._settings.timeout_s, _METADATA_TIMEOUT_S)
        return self._connection.start(call.method, call.message.SerializeToString(), timeout_s)

    def completed(self, config: pb.ModelConfig, *, sets_max_batch_size: bool) -> pb.ModelConfig:
        """Return the configuration, completed with the server's metadata.

        Raises:
            FailedPrecondition: the configuration contradicts the metadata.
        """
        done = pb.ModelConfig()
        done.CopyFrom(config)
        rows = self._info.max_batch_size
        if not self._dialect.batches and config.max_batch_size:
            raise FailedPrecondition(
                f"max_batch_size {config.max_batch_size}: protocol '{self._settings.protocol}' carries one row in a "
                "request, and its server batches by itself: set it to 0"
            )
        if rows is not None and not sets_max_batch_size:
            done.max_batch_size = rows
        if rows and done.max_batch_size > rows:
            raise FailedPrecondition(f"max_batch_size {done.max_batch_size}: the remote model takes {rows} at most")
        if any(spec.is_optional for spec in self.inputs) and not config.input:
            skip = 1 if done.max_batch_size else 0
            for spec in self.inputs:
                added = done.input.add(name=spec.name, data_type=spec.datatype.config_name, dims=spec.shape[skip:])
                added.optional = spec.is_optional
        if not done.instance_group:
            done.instance_group.add(count=IN_FLIGHT)
        return done

    # Runs

    def run(self, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> list[Tensor]:
        """Run one request, as `Session.run`.

        Raises:
            ModelFailed: the request or the model caused the failure.
            ShoalError: the remote server failed or is unreachable.
        """
        pieces = self._request(RemoteBatch({name: [array] for name, array in inputs.items()}, outputs))
        call = self._connection.start(self._dialect.method, pieces.joined(), self._settings.timeout_s)
        try:
            return self._read(self._connection.wait(call), outputs)
        except BatchFailed as err:
            raise err.error from err
        except ShoalError as err:
            raise ModelFailed(err.message) from err

    async def execute(self, batch: RemoteBatch, deadline: float) -> list[Tensor]:
        """Return the outputs for the rows of several requests. Cancellation cancels the remote call.

        Args:
            deadline: on the session's clock; `timeout_ms` applies as well.

        Raises:
            BatchFailed: the failure has nothing to do with the batch's requests.
            ModelFailed, ShoalError: one request or all requests caused the failure.
        """
        if self._may_have_changed:
            await self._check_model()
        self._check_unchanged()
        pieces = self._request(batch)
        try:
            return await self._exchange(pieces, batch.outputs, deadline)
        except CredentialsRejected as err:
            if not await self._has_new_credentials(err):
                raise
            return await self._exchange(pieces, batch.outputs, deadline)
        except BatchFailed as err:
            # After a restart the server may have another model under the same name.
            if isinstance(err.error, Unavailable):
                self._may_have_changed = True
            raise
        except (ModelFailed, ShoalError):
            self._may_have_changed = True
            await self._check_model()
            self._check_unchanged()
            raise

    async def _exchange(self, pieces: Pieces, outputs: Sequence[str], deadline: float) -> list[Tensor]:
        call = await self._start(pieces, deadline)
        return await self._connection.result_of(call, lambda data: self._read(data, outputs))

    async def _has_new_credentials(self, rejected: CredentialsRejected) -> bool:
        try:
            return await asyncio.to_thread(self._connection.renew_headers)
        except FailedPrecondition as err:
            raise BatchFailed(FailedPrecondition(f"{rejected.error.message}; {err.message}")) from err

    def _request(self, batch: RemoteBatch) -> Pieces:
        pieces = self._dialect.request(self._inputs_by_name, batch.inputs, batch.outputs)
        if pieces.size > self._settings.max_message_bytes:
            raise InvalidArgument(
                f"model '{self.name}': the request has {pieces.size} bytes for the remote server, and parameter "
                f"max_message_bytes is {self._settings.max_message_bytes}"
            )
        return pieces

    async def _start(self, pieces: Pieces, deadline: float) -> grpc.Future[bytes]:
        def start() -> grpc.Future[bytes]:
            timeout_s = min(deadline - self._clock(), self._settings.timeout_s)
            return self._connection.start(self._dialect.method, pieces.joined(), timeout_s)

        if pieces.size <= _LARGE_BYTES:
            return start()
        starting = asyncio.ensure_future(asyncio.to_thread(start))
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            starting.add_done_callback(lambda done: done.result().cancel())
            raise

    def _read(self, data: bytes, outputs: Sequence[str]) -> list[Tensor]:
        return self._dialect.parse_response(data, [self._outputs_by_name[name] for name in outputs])

    # Detection of a changed model

    def _check_unchanged(self) -> None:
        if self._change:
            raise BatchFailed(
                FailedPrecondition(
                    f"model '{self.name}': the remote model has changed since it was loaded: {self._change}; "
                    "unload it and load it again"
                )
            )

    async def _check_model(self) -> None:
        """Query the model's metadata again and compare; does nothing within the interval after the last query."""
        if self._clock() < self._next_check:
            return
        self._next_check = math.inf
        try:
            await self._compare_model()
        finally:
            self._next_check = self._clock() + _CHECK_INTERVAL_S

    async def _compare_model(self) -> None:
        try:
            change = changes(self._info, await sans_io.run_async(self._dialect.model_info(), self._call_async))
        except NotServable as err:
            change = err.message
        except (BatchFailed, ModelFailed, ShoalError) as err:
            # `_may_have_changed` stays set: the next execution queries again.
            log.debug("model %s: querying the remote model failed: %s", self.name, err)
            return
        if change and not self._change:
            log.error(
                "model %(model)s rejects requests, because the remote model has changed: %(change)s",
                {"event": "remote.incompatible", "model": self.name, "change": change},
            )
        if self._change and not change:
            log.info(
                "model %(model)s: the remote model is compatible again",
                {"event": "remote.compatible", "model": self.name},
            )
        self._change = change
        self._may_have_changed = bool(change)

    def close(self) -> None:
        self._connection.close()
