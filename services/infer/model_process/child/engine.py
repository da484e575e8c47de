"""The work of a model process: takes requests from its mailbox, has the hosted model run them, sends what it gave.

run    ──> result | error                          a model that gives one response to each request
start  ──> response, response, ... ──> end         a decoupled one: as many as it likes, while it has credit
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from services.infer.model_process.channel import Message
from services.infer.model_process.child.mailbox import WAKE, Abandoned, Hearer
from services.infer.model_process.hosted import Batch, Hosted, RunFailed
from services.infer.model_process.payload import TensorPart

_TEXT = 1000
# Characters of an error that are sent: a status message travels in a header.


class Sends(Protocol):
    """Where answers go: a `channel.Channel`, or something that looks like one."""

    def send(self, header: dict[str, Any], parts: Sequence[TensorPart] = ()) -> None: ...


class Letters(Protocol):
    """Where work comes from: a `mailbox.Mailbox`, or something that looks like one."""

    hearers: dict[int, Hearer]

    def listen(self) -> None: ...

    def next(self) -> Any: ...

    def poll(self) -> Any: ...

    def put(self, thing: object) -> None: ...


def serve(channel: Sends, mailbox: Letters, hosted: Hosted) -> None:
    """Works until it is told to close. Raises ChannelClosed when the server is gone."""
    if hosted.facts.is_decoupled:
        mailbox.listen()
        _Streams(channel, mailbox, hosted).serve()
        return
    if hosted.facts.wants_requests:
        mailbox.listen()
    while (message := _next(mailbox)).op != "close":
        _run(channel, mailbox, hosted, message)


def _next(mailbox: Letters) -> Message:
    """The next run, or the end. A cancellation, and its wake-up, are over once what they were for has ended."""
    while True:
        found = mailbox.next()
        if isinstance(found, Message) and found.op in ("run", "close"):
            return found


class _Cancellable:
    """The hearer of a running batch."""

    def __init__(self) -> None:
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True

    def credit(self, more: int) -> None: ...


def _run(channel: Sends, mailbox: Letters, hosted: Hosted, message: Message) -> None:
    number, hearer = message.header["id"], _Cancellable()
    mailbox.hearers[number] = hearer
    try:
        given = hosted.run(_batch(message, hearer))
        header = {"op": "result", "id": number}
        if given.responses is not None:
            header["responses"] = given.responses
        parts: Sequence[TensorPart] = given.parts
    except RunFailed as err:
        header, parts = {"op": "error", "id": number, "error": str(err)[:_TEXT], "code": err.code}, ()
    finally:
        del mailbox.hearers[number]
    channel.send(header, parts)


def _batch(message: Message, hearer: _Cancellable | None = None) -> Batch:
    header = message.header
    inputs = {name: (datatype, array) for name, datatype, array in message.tensors}
    batch_cancelled = (lambda: hearer.is_cancelled) if hearer is not None else bool
    return Batch(inputs, header["outputs"], header["rows"], header.get("details", ()), batch_cancelled)


class _Stream:
    """The Sender of one request of a decoupled model."""

    def __init__(self, number: int, channel: Sends, mailbox: Letters, credit: int) -> None:
        self._number, self._channel, self._mailbox = number, channel, mailbox
        self._credit = credit
        self._changed = threading.Condition()
        self._is_cancelled = self.is_ended = False

    def send(self, parts: Sequence[TensorPart], *, final: bool) -> None:
        self._pay(final=final)
        self._channel.send({"op": "response", "id": self._number, "final": final}, parts)
        if final:
            self._mailbox.put(WAKE)

    def fail(self, error: RunFailed, *, final: bool) -> None:
        try:
            self._pay(final=final)
        except RunFailed:
            return
        said = {"error": str(error)[:_TEXT], "code": error.code, "own": error.is_own}
        self._channel.send({"op": "response", "id": self._number, "final": final, **said})
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

    def _pay(self, *, final: bool) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._credit > 0 or self._is_cancelled or self.is_ended)
            if self.is_ended:
                raise RunFailed("the last response was sent already")
            if self._is_cancelled:
                raise RunFailed("the request was cancelled: nobody waits for responses", "CANCELLED")
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
    """All requests of a decoupled model that are under way; generators are stepped in turn."""

    def __init__(self, channel: Sends, mailbox: Letters, hosted: Hosted) -> None:
        self._channel, self._mailbox, self._hosted = channel, mailbox, hosted
        self._streams: dict[int, _Stream] = {}
        self._steps: dict[int, Iterator[None]] = {}

    def serve(self) -> None:
        while True:
            found = self._mailbox.poll() if self._has_work() else self._mailbox.next()
            if isinstance(found, Message):
                if found.op == "close":
                    return
                self._start(found)
            elif isinstance(found, Abandoned) and found.id in self._streams:
                self._streams[found.id].end()
            self._step()

    def _has_work(self) -> bool:
        return any(self._streams[n].may_send() or self._streams[n].is_cancelled() for n in self._steps)

    def _start(self, message: Message) -> None:
        number = message.header["id"]
        stream = _Stream(number, self._channel, self._mailbox, message.header["credit"])
        self._streams[number] = self._mailbox.hearers[number] = stream
        batch = _batch(message)
        steps = self._hosted.start(Batch(batch.inputs, batch.outputs, (), batch.details, stream.is_cancelled), stream)
        if steps is not None:
            self._steps[number] = steps

    def _step(self) -> None:
        for number in list(self._steps):
            stream, steps = self._streams[number], self._steps[number]
            if stream.is_cancelled():
                self._close(steps)
                stream.end()
            elif stream.may_send() and next(steps, WAKE) is WAKE:
                stream.end()
        for number in [number for number, stream in self._streams.items() if stream.is_ended]:
            del self._streams[number], self._mailbox.hearers[number]
            self._steps.pop(number, None)

    def _close(self, steps: Any) -> None:
        try:
            steps.close()
        except BaseException:  # The model's own generator, on its way out: it is dropped, whatever it says.
            traceback.print_exc()
