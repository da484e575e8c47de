"""The work of a model process, in this one: what comes beside the requests ends nothing."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import numpy as np
import pytest

from services.infer.model_process.channel import Channel
from services.infer.model_process.child import engine
from services.infer.model_process.child.engine import serve
from services.infer.model_process.child.mailbox import Mailbox
from services.infer.model_process.hosted import Batch, BatchResult, HostedModelInfo, Sender
from services.infer.model_process.payload import part
from tests.infer.model_process.test_model_process import wait_until

PATIENCE_S = 30


class Doubling:
    """y = 2x, when it is let."""

    def __init__(self, model_info: HostedModelInfo) -> None:
        self.model_info = model_info
        self.entered, self.go = threading.Event(), threading.Event()

    def run(self, batch: Batch) -> BatchResult:
        self.entered.set()
        assert self.go.wait(PATIENCE_S)
        return BatchResult([part("y", "FP32", [2 * batch.arrays()["x"]])])

    def close(self) -> None: ...


def model_info(*, wants_requests: bool) -> HostedModelInfo:
    spec = (("x", "FP32", (-1,)),)
    return HostedModelInfo(inputs=spec, outputs=spec, wants_requests=wants_requests)


@contextmanager
def serving(model: Any) -> Iterator[Channel]:
    """Serve a model in a thread, and give the server's end of its channel. At the end, the model is closed."""
    one, other = socket.socketpair()
    with closing(Channel(one)) as server, closing(Channel(other)) as channel:
        worker = threading.Thread(target=serve, args=(channel, Mailbox(channel), model), daemon=True)
        worker.start()
        yield server
        server.send({"op": "close"})
        worker.join(PATIENCE_S)
        assert not worker.is_alive()


def test_outputs_that_are_too_large_are_an_error_of_their_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "MAX_RESULT_BYTES", 1_000)
    model = Doubling(model_info(wants_requests=False))
    model.go.set()
    found = []
    with serving(model) as server:
        for number, floats in enumerate((251, 250), 1):
            x = np.ones(floats, np.float32)
            server.send({"op": "run", "id": number, "outputs": ["y"], "rows": [1]}, [part("x", "FP32", [x])])
            response = server.receive(PATIENCE_S)
            assert response is not None
            found.append((response.op, response.header.get("error"), response.tensor_bytes))
    assert found == [
        ("error", "its outputs have 1004 bytes, at most 1000 may be returned at once", 0),
        ("result", None, 1_000),
    ]


@pytest.mark.parametrize("wants_requests", [False, True])
def test_a_late_cancellation_does_not_end_the_process(wants_requests: bool) -> None:
    model = Doubling(model_info(wants_requests=wants_requests))
    with serving(model) as server:
        for number in (1, 2):
            x = np.full(3, number, np.float32)
            server.send({"op": "run", "id": number, "outputs": ["y"], "rows": [1]}, [part("x", "FP32", [x])])
            assert model.entered.wait(PATIENCE_S)
            for cancelled in (number, number, 99):
                server.send({"op": "cancel", "id": cancelled})
            model.go.set()
            response = server.receive(PATIENCE_S)
            assert response is not None
            assert (response.op, response.header["id"]) == ("result", number)
            np.testing.assert_array_equal(response.tensors[0][2], 2 * x)
            model.entered.clear()
            model.go.clear()


class Endless:
    """Responds without end. Its first request starts only once it is cancelled."""

    def __init__(self) -> None:
        spec = (("x", "FP32", (-1,)),)
        self.model_info = HostedModelInfo(inputs=spec, outputs=spec, is_decoupled=True)
        self.has_started = threading.Event()

    def start(self, batch: Batch, sender: Sender) -> Iterator[None]:
        if not self.has_started.is_set():
            self.has_started.set()
            wait_until(batch.is_cancelled)
        return self._steps(sender)

    def _steps(self, sender: Sender) -> Iterator[None]:
        while True:
            sender.send([part("x", "FP32", [np.ones(3, np.float32)])], final=False)
            yield

    def close(self) -> None: ...


def test_a_request_that_is_cancelled_before_it_starts_ends() -> None:
    model = Endless()
    x = [part("x", "FP32", [np.ones(3, np.float32)])]
    with serving(model) as server:
        for number in (1, 2):
            server.send({"op": "start", "id": number, "outputs": ["x"], "rows": [], "credit": 1}, x)
        assert model.has_started.wait(PATIENCE_S)
        # The first request waits for its own cancellation: then that of the second has been read, too.
        for number in (2, 1):
            server.send({"op": "cancel", "id": number})
        ended = set()
        while len(ended) < 2:
            message = server.receive(PATIENCE_S)
            assert message is not None, f"only {ended} have ended"
            if message.op == "end":
                ended.add(message.header["id"])
