"""Main loop of a model process: takes requests from the mailbox, runs them on the hosted model, sends the outputs.

run    ──> result | error                          a model that returns one response to each request
start  ──> response, response, ... ──> end         a decoupled model: any number of responses, while it has credit
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from services.infer.model_process.channel import Message
from services.infer.model_process.child.mailbox import RUNNING_ID, WAKE, Abandoned, RequestListener
from services.infer.model_process.hosted import (
    Batch,
    Hosted,
    RunFailed,
    print_error,
    text_of,
)
from services.infer.model_process.payload import TensorPart

# Errors are cut to this length: a status message travels in a header of limited size.
_MAX_ERROR_CHARACTERS = 1000

MAX_RESULT_BYTES = 1 << 30
"""Outputs of one run, or of one response of a decoupled model: more than the server's memory of requests has."""


class MessageSink(Protocol):
    """Sink of responses: a `channel.Channel`, or an owner's Multiplexer."""

    def send(self, header: dict[str, Any], parts: Sequence[TensorPart] = ()) -> None: ...


class MessageSource(Protocol):
    """Source of requests: a `mailbox.Mailbox`, or an owner's Multiplexer."""

    listeners: dict[int, RequestListener]

    def listen(self) -> None: ...

    def next(self) -> Any: ...

    def poll(self) -> Any: ...

    def put(self, thing: object) -> None: ...


def serve(channel: MessageSink, mailbox: MessageSource, hosted: Hosted) -> None:
    """Serve requests until a "close" arrives. Raises ChannelClosed when the server has closed the channel."""
    if hosted.model_info.is_decoupled:
        mailbox.listen()
        _Streams(channel, mailbox, hosted).serve()
        return
    if hosted.model_info.wants_requests:
        mailbox.listen()
    while (message := _next(mailbox)).op != "close":
        _run(channel, mailbox, hosted, message)


def _next(mailbox: MessageSource) -> Message:
    """Return the next "run" or "close". Other items, such as a late WAKE, belong to a run that has ended."""
    while True:
        item = mailbox.next()
        if isinstance(item, Message) and item.op in ("run", "close"):
            return item


class _Cancellable:
    """Listener of a running batch, which can be cancelled."""

    def __init__(self) -> None:
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True

    def credit(self, more: int) -> None: ...


def _run(channel: MessageSink, mailbox: MessageSource, hosted: Hosted, message: Message) -> None:
    number, listener = message.header["id"], _Cancellable()
    mailbox.listeners[number] = listener
    RUNNING_ID.set(number)
    try:
        result = hosted.run(_batch(message, listener))
        header = {"op": "result", "id": number}
        if result.responses is not None:
            header["responses"] = result.responses
        parts: Sequence[TensorPart] = result.parts
        _check_size(parts)
    except RunFailed as err:
        header, parts = _error(number, err), ()
    # An output that cannot be sent is an error of this run, and the process goes on.
    except Exception as err:
        header, parts = _error(number, RunFailed(f"its results cannot be sent: {text_of(err)}")), ()
    finally:
        del mailbox.listeners[number]
    channel.send(header, parts)


def _error(number: int, error: RunFailed) -> dict[str, Any]:
    return {"op": "error", "id": number, "error": str(error)[:_MAX_ERROR_CHARACTERS], "code": error.code}


def _check_size(parts: Sequence[TensorPart]) -> None:
    """Raise RunFailed for outputs that the server could not use: mapped there, they would be its memory."""
    if (size := sum(part.size_bytes for part in parts)) > MAX_RESULT_BYTES:
        raise RunFailed(f"its outputs have {size} bytes, at most {MAX_RESULT_BYTES} may be returned at once")


def _batch(message: Message, listener: _Cancellable | None = None) -> Batch:
    header = message.header
    inputs = {name: (datatype, array) for name, datatype, array in message.tensors}
    batch_cancelled = (lambda: listener.is_cancelled) if listener is not None else bool
    return Batch(inputs, header["outputs"], header["rows"], header.get("details", ()), batch_cancelled)


class _Stream:
    """`hosted.Sender` of one request of a decoupled model."""

    def __init__(self, number: int, channel: MessageSink, mailbox: MessageSource, credit: int) -> None:
        self._number, self._channel, self._mailbox = number, channel, mailbox
        self._credit = credit
        self._changed = threading.Condition()
        self._is_cancelled = self.is_ended = False

    def send(self, parts: Sequence[TensorPart], *, final: bool) -> None:
        _check_size(parts)
        self._use_credit(final=final)
        self._channel.send({"op": "response", "id": self._number, "final": final}, parts)
        if final:
            self._mailbox.put(WAKE)

    def fail(self, error: RunFailed, *, final: bool) -> None:
        try:
            self._use_credit(final=final)
        except RunFailed:
            return
        fields = {"error": str(error)[:_MAX_ERROR_CHARACTERS], "code": error.code, "own": error.is_own}
        self._channel.send({"op": "response", "id": self._number, "final": final, **fields})
        if final:
            self._mailbox.put(WAKE)

    def end(self) -> None:
        with self._changed:
            if self.is_ended:
                return
            self.is_ended = True
        self._channel.send({"op": "end", "id": self._number})
        self._mailbox.put(WAKE)

    def abandon(self) -> None:
        self._mailbox.put(Abandoned(self._number))

    def _use_credit(self, *, final: bool) -> None:
        """Wait for credit for one response. Raises RunFailed when the stream has ended or is cancelled."""
        with self._changed:
            self._changed.wait_for(lambda: self._credit > 0 or self._is_cancelled or self.is_ended)
            if self.is_ended:
                raise RunFailed("the last response was sent already")
            if self._is_cancelled:
                raise RunFailed("the request was cancelled: its caller waits for no more responses", "CANCELLED")
            self._credit -= 1
            self.is_ended = final

    def may_send(self) -> bool:
        return self._credit > 0

    def is_cancelled(self) -> bool:
        return self._is_cancelled

    def cancel(self) -> None:
        with self._changed:
            self._is_cancelled = True
            self._changed.notify_all()

    def credit(self, more: int) -> None:
        with self._changed:
            self._credit += more
            self._changed.notify_all()


class _Streams:
    """All running requests of a decoupled model; generators are stepped round-robin."""

    def __init__(self, channel: MessageSink, mailbox: MessageSource, hosted: Hosted) -> None:
        self._channel, self._mailbox, self._hosted = channel, mailbox, hosted
        self._streams: dict[int, _Stream] = {}
        self._steps: dict[int, Iterator[None]] = {}

    def serve(self) -> None:
        while True:
            item = self._mailbox.poll() if self._can_step() else self._mailbox.next()
            if isinstance(item, Message):
                if item.op == "close":
                    return
                if item.op == "start":
                    self._start(item)
                # A cancellation that came before its request had started.
                elif item.op == "cancel" and item.header.get("id") in self._streams:
                    self._streams[item.header["id"]].cancel()
            elif isinstance(item, Abandoned) and item.id in self._streams:
                self._streams[item.id].end()
            self._step()

    def _can_step(self) -> bool:
        return any(self._streams[n].may_send() or self._streams[n].is_cancelled() for n in self._steps)

    def _start(self, message: Message) -> None:
        number = message.header["id"]
        stream = _Stream(number, self._channel, self._mailbox, message.header["credit"])
        self._streams[number] = self._mailbox.listeners[number] = stream
        batch = _batch(message)
        RUNNING_ID.set(number)
        steps = self._hosted.start(Batch(batch.inputs, batch.outputs, (), batch.details, stream.is_cancelled), stream)
        if steps is not None:
            self._steps[number] = steps

    def _step(self) -> None:
        for number in list(self._steps):
            stream, steps = self._streams[number], self._steps[number]
            RUNNING_ID.set(number)
            if stream.is_cancelled():
                self._close(steps)
                stream.end()
            elif stream.may_send() and next(steps, WAKE) is WAKE:
                stream.end()
        for number in [number for number, stream in self._streams.items() if stream.is_ended]:
            del self._streams[number], self._mailbox.listeners[number]
            self._steps.pop(number, None)

    def _close(self, steps: Any) -> None:
        try:
            steps.close()
        # The model's generator may raise while it is closed: the request is cancelled, so nothing receives the error.
        except BaseException as err:
            print_error(err)
