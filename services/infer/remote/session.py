"""A model of another server, as a `Session`; what it said of itself when it was loaded holds as long as it is served.

calls ──> one request ──> the remote server ──> outputs, checked
                             └── an error: is it still the same model? ── no ──> refused by name, until it is again
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
from services.infer.remote.dialect import Dialect, Question, RemoteModelInfo, changes
from services.infer.remote.errors import RETRY_AFTER_MS, NotAccepted, NotServable, NotToBlame
from services.infer.remote.settings import RemoteSettings
from services.infer.remote.wire import Pieces
from services.infer.requests.tensors import Tensor
from services.infer.runtimes.runtime import ModelFailed, Session
from shoal.errors import FailedPrecondition, InvalidArgument, ShoalError, Unavailable
from shoal.inference.v2 import model_config_pb2 as pb

log = logging.getLogger(__name__)

IN_FLIGHT = 4
"""Executions at the same time where the configuration has no instance_group: the way there and back is waited for, and
not computed."""

_ASK_S = 5.0
# For metadata, which a server has at hand; loading should not wait longer for one that is away.
_LOOK_EVERY_S = 1.0
# How often it is asked whether a model has changed: a flood of bad requests must not become two of them.
_LARGE_BYTES = 4 << 20
# Beyond, joining and sending takes about a millisecond: it is done beside the event loop.


@dataclass(frozen=True)
class Asked:
    """One request, but for its bytes."""

    inputs: Mapping[str, Sequence[Tensor]]
    """For each input, the array of each call."""
    outputs: Sequence[str]


class RemoteSession(Session):
    """One model of one server. Owns the connection. Any thread may run it; one event loop may execute it."""

    text = False
    sees_missing = True
    is_tried = False
    """Made-up inputs are not sent to a server that others use, too."""

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
        """Asks the server. `declared`: what the configuration says, for a server that says nothing.

        Raises:
            FailedPrecondition: the model cannot be served; the message says why.
            ShoalError: the server is not there, or does not have the model yet: loading may be tried again.
        """
        self.name, self._settings, self._clock = name, settings, clock
        self._connection, self._dialect = connection, dialect
        self._facts = self._first_facts(is_given_up)
        self.inputs = self._facts.inputs or declared.inputs
        self.outputs = self._facts.outputs or declared.outputs
        if not self.inputs or not self.outputs:
            raise FailedPrecondition(
                f"the remote server at {settings.address.url} says nothing of the model's inputs and outputs: "
                "write input and output into config.pbtxt"
            )
        self.says_batch = self._facts.max_batch_size is not None
        self._inputs_by_name = {spec.name: spec for spec in self.inputs}
        self._outputs_by_name = {spec.name: spec for spec in self.outputs}
        self._change = ""
        self._is_suspect = False
        self._next_look = 0.0

    def _first_facts(self, is_given_up: Callable[[], bool]) -> RemoteModelInfo:
        try:
            return sans_io.run_sync(self._dialect.facts(), lambda question: self._asked(question, is_given_up))
        except NotServable:
            raise
        except (NotToBlame, ModelFailed, ShoalError) as err:
            # Not as FailedPrecondition, whatever it was: what is put right over there makes it right here.
            said, who = str(err), f"model '{self.name}': the remote server "
            where = f"the remote server at {self._settings.address.url}"
            why = f"{where} {said.removeprefix(who)}" if said.startswith(who) else f"{where}: {said}"
            raise Unavailable(why, retry_after_ms=RETRY_AFTER_MS) from err

    def _asked(self, question: Question, is_given_up: Callable[[], bool]) -> Message:
        return parsed(self._connection.wait(self._begun(question), is_given_up), question.kind)

    async def _awaited(self, question: Question) -> Message:
        return await self._connection.over(self._begun(question), lambda data: parsed(data, question.kind))

    def _begun(self, question: Question) -> grpc.Future[bytes]:
        timeout_s = min(self._settings.timeout_s, _ASK_S)
        return self._connection.start(question.method, question.message.SerializeToString(), timeout_s)

    def completed(self, config: pb.ModelConfig, *, says_batch: bool) -> pb.ModelConfig:
        """The configuration with what the server says. Raises FailedPrecondition when the two contradict each other."""
        done = pb.ModelConfig()
        done.CopyFrom(config)
        rows = self._facts.max_batch_size
        if not self._dialect.batches and config.max_batch_size:
            raise FailedPrecondition(
                f"max_batch_size {config.max_batch_size}: protocol '{self._settings.protocol}' carries one row in a "
                "request, and its server batches by itself: set it to 0"
            )
        if rows is not None and not says_batch:
            done.max_batch_size = rows
        if rows and done.max_batch_size > rows:
            raise FailedPrecondition(f"max_batch_size {done.max_batch_size}: the remote model takes {rows} at most")
        if any(spec.is_optional for spec in self.inputs) and not config.input:
            skip = 1 if done.max_batch_size else 0
            for spec in self.inputs:
                given = done.input.add(name=spec.name, data_type=spec.datatype.config_name, dims=spec.shape[skip:])
                given.optional = spec.is_optional
        if not done.instance_group:
            done.instance_group.add(count=IN_FLIGHT)
        return done

    # Runs

    def run(self, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> list[Tensor]:
        """As `Session.run`; raises a ShoalError, too, when the remote server is away or refuses."""
        pieces = self._request(Asked({name: [array] for name, array in inputs.items()}, outputs))
        call = self._connection.start(self._dialect.method, pieces.joined(), self._settings.timeout_s)
        try:
            return self._read(self._connection.wait(call), outputs)
        except NotToBlame as err:
            raise err.error from err
        except ShoalError as err:
            raise ModelFailed(err.message) from err

    async def execute(self, asked: Asked, deadline: float) -> list[Tensor]:
        """The outputs for the rows of several calls. Cancelled, it ends the remote call.

        Args:
            deadline: on the session's clock; `timeout_ms` is kept in any case.

        Raises:
            NotToBlame: no call is at fault.
            ModelFailed, ShoalError: one of the calls is, or each.
        """
        if self._is_suspect:
            await self._look_again()
        self._check_unchanged()
        pieces = self._request(asked)
        try:
            return await self._exchanged(pieces, asked.outputs, deadline)
        except NotAccepted as err:
            if not await self._has_new_credentials(err):
                raise
            return await self._exchanged(pieces, asked.outputs, deadline)
        except NotToBlame as err:
            if isinstance(err.error, Unavailable):
                self._is_suspect = True  # Once it is back it may be another one.
            raise
        except (ModelFailed, ShoalError):
            self._is_suspect = True
            await self._look_again()
            self._check_unchanged()
            raise

    async def _exchanged(self, pieces: Pieces, outputs: Sequence[str], deadline: float) -> list[Tensor]:
        call = await self._started(pieces, deadline)
        return await self._connection.over(call, lambda data: self._read(data, outputs))

    async def _has_new_credentials(self, refused: NotAccepted) -> bool:
        try:
            return await asyncio.to_thread(self._connection.renew_headers)
        except FailedPrecondition as err:
            raise NotToBlame(FailedPrecondition(f"{refused.error.message}; {err.message}")) from err

    def _request(self, asked: Asked) -> Pieces:
        pieces = self._dialect.request(self._inputs_by_name, asked.inputs, asked.outputs)
        if pieces.size > self._settings.max_message_bytes:
            raise InvalidArgument(
                f"model '{self.name}': the request has {pieces.size} bytes for the remote server, and parameter "
                f"max_message_bytes is {self._settings.max_message_bytes}"
            )
        return pieces

    async def _started(self, pieces: Pieces, deadline: float) -> grpc.Future[bytes]:
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
        return self._dialect.answer(data, [self._outputs_by_name[name] for name in outputs])

    # Whether it is still the same model

    def _check_unchanged(self) -> None:
        if self._change:
            raise NotToBlame(
                FailedPrecondition(
                    f"model '{self.name}': the remote model has changed since it was loaded: {self._change}; "
                    "unload it and load it again"
                )
            )

    async def _look_again(self) -> None:
        """Asks the server what the model is now, if that was not done a moment ago."""
        if self._clock() < self._next_look:
            return
        self._next_look = math.inf
        try:
            await self._look()
        finally:
            self._next_look = self._clock() + _LOOK_EVERY_S

    async def _look(self) -> None:
        try:
            change = changes(self._facts, await sans_io.run_async(self._dialect.facts(), self._awaited))
        except NotServable as err:
            change = err.message
        except (NotToBlame, ModelFailed, ShoalError) as err:
            log.debug("model %s: its remote server cannot be asked: %s", self.name, err)
            return  # It stays suspect.
        if change and not self._change:
            log.error("model %s is refused, because the remote model has changed: %s", self.name, change)
        if self._change and not change:
            log.info("model %s: the remote model is again what it was", self.name)
        self._change = change
        self._is_suspect = bool(change)

    def close(self) -> None:
        self._connection.close()
