"""Turns, stacking and parting: what an owner does with the batches of several infer processes."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

from services.infer.model_process import payload
from services.infer.model_process.channel import Channel, Message
from services.infer.model_process.child.mailbox import RUNNING_ID
from services.infer.model_process.hosted import RunFailed
from services.infer.model_process.shared.connection import Connection
from services.infer.model_process.shared.multiplexer import Multiplexer
from services.infer.model_process.shared.progress_mark import ProgressMark


class Peer:
    """An infer process, as the owner sees it."""

    def __init__(self, stack: ExitStack, worker: int) -> None:
        ours, theirs = socket.socketpair()
        stack.callback(ours.close)
        self.mark, self.channel = ProgressMark.sent(ours), Channel(ours)
        self.connection = Connection(theirs)
        stack.callback(self.connection.close)
        self.connection.worker = worker  # All of them are this process: told apart as if they were not.

    def run(self, multiplexer: Multiplexer, number: int, given: list[float], **said: Any) -> None:
        header = {"op": "run", "id": number, "outputs": ["y"], "rows": [len(given)], "most": 8, **said}
        multiplexer.receive(self.connection, Message(header, [("x", "FP32", np.array(given, np.float32)[:, None])]))

    def heard(self) -> Message:
        message = self.channel.receive(5)
        assert message is not None
        return message

    def rows(self) -> tuple[int, list[float]]:
        message = self.heard()
        assert message.op == "result"
        return message.header["id"], message.tensors[0][2].reshape(-1).tolist()


@pytest.fixture
def peers() -> Iterator[list[Peer]]:
    with ExitStack() as stack:
        yield [Peer(stack, worker) for worker in (1, 2, 3)]


def rows_of(message: Message) -> list[float]:
    return message.tensors[0][2].reshape(-1).tolist()


def respond(multiplexer: Multiplexer, message: Message) -> None:
    part = payload.part("y", "FP32", [2 * message.tensors[0][2]])
    multiplexer.send({"op": "result", "id": message.header["id"]}, [part])


def test_infer_processes_are_served_round_robin(peers):
    multiplexer = Multiplexer()
    for number in range(3):
        peers[0].run(multiplexer, number, [number], most=0)
    peers[1].run(multiplexer, 7, [10], most=0)
    peers[2].run(multiplexer, 7, [20], most=0)
    order = []
    for _ in range(5):
        message = multiplexer.next()
        order += rows_of(message)
        respond(multiplexer, message)
    assert order == [0, 10, 20, 1, 2]
    assert [peers[0].rows() for _ in range(3)] == [(0, [0]), (1, [2]), (2, [4])]
    assert (peers[1].rows(), peers[2].rows()) == ((7, [20]), (7, [40]))


def test_queued_batches_are_stacked_and_each_connection_gets_its_rows(peers):
    multiplexer = Multiplexer()
    peers[0].run(multiplexer, 1, [1, 2])
    peers[1].run(multiplexer, 2, [3])
    peers[2].run(multiplexer, 3, [4, 5, 6])
    message = multiplexer.next()
    assert (rows_of(message), message.header["rows"]) == ([1, 2, 3, 4, 5, 6], [2, 1, 3])
    assert all(peer.mark.started_ns and peer.mark.is_together for peer in peers)
    respond(multiplexer, message)
    assert [peer.rows() for peer in peers] == [(1, [2, 4]), (2, [6]), (3, [8, 10, 12])]
    assert not any(peer.mark.started_ns for peer in peers)
    assert multiplexer.poll() is None


@pytest.mark.parametrize(
    "said", [{"outputs": ["z"]}, {"rows": []}, {"most": 0}], ids=["other outputs", "no batch", "not wanted"]
)
def test_batches_that_cannot_be_stacked_run_separately(peers, said):
    multiplexer = Multiplexer()
    peers[0].run(multiplexer, 1, [1])
    peers[1].run(multiplexer, 2, [2], **said)
    assert (rows_of(multiplexer.next()), rows_of(multiplexer.next())) == ([1], [2])


def test_a_stacked_batch_has_at_most_max_batch_size_rows(peers):
    multiplexer = Multiplexer()
    peers[0].run(multiplexer, 1, [1] * 5)
    peers[1].run(multiplexer, 2, [2] * 4)
    peers[2].run(multiplexer, 3, [3] * 3)
    assert (rows_of(multiplexer.next()), rows_of(multiplexer.next())) == ([1] * 5 + [3] * 3, [2] * 4)


def test_a_failed_stacked_batch_is_rerun_batch_by_batch(peers):
    multiplexer = Multiplexer()
    peers[0].run(multiplexer, 1, [1])
    peers[1].run(multiplexer, 2, [2])
    multiplexer.send({"op": "error", "id": multiplexer.next().header["id"], "error": "no", "code": "INTERNAL"})
    found = []
    for _ in range(2):
        message = multiplexer.next()
        found += rows_of(message)
        respond(multiplexer, message)
    assert sorted(found) == [1, 2]
    assert (peers[0].rows(), peers[1].rows()) == ((1, [2]), (2, [4]))


def test_a_batch_of_a_disconnected_connection_is_not_rerun(peers):
    multiplexer = Multiplexer()
    peers[0].run(multiplexer, 1, [1])
    peers[1].run(multiplexer, 2, [2])
    number = multiplexer.next().header["id"]
    multiplexer.disconnect(peers[0].connection)
    multiplexer.send({"op": "error", "id": number, "error": "no", "code": "INTERNAL"})
    assert rows_of(multiplexer.next()) == [2]
    assert multiplexer.poll() is None


def test_a_result_without_one_row_for_each_row_is_not_split(peers):
    multiplexer = Multiplexer()
    peers[0].run(multiplexer, 1, [1])
    peers[1].run(multiplexer, 2, [2])
    part = payload.part("y", "FP32", [np.zeros((3, 1), np.float32)])
    multiplexer.send({"op": "result", "id": multiplexer.next().header["id"]}, [part])
    assert [len(rows_of(multiplexer.next())) for _ in range(2)] == [1, 1]


def test_the_progress_mark_records_running_batches_and_concurrency(peers):
    multiplexer = Multiplexer()
    peers[0].run(multiplexer, 1, [1], most=0)
    peers[1].run(multiplexer, 2, [2], most=0)
    first = multiplexer.next()
    assert (bool(peers[0].mark.started_ns), peers[0].mark.is_together) == (True, False)
    assert not peers[1].mark.started_ns
    second = multiplexer.next()
    assert peers[0].mark.is_together
    assert peers[1].mark.is_together
    respond(multiplexer, first)
    respond(multiplexer, second)
    peers[0].run(multiplexer, 3, [1])
    multiplexer.next()
    assert not peers[0].mark.is_together


def test_a_queued_batch_can_be_cancelled_and_is_dropped_on_disconnect(peers):
    multiplexer = Multiplexer()
    peers[0].run(multiplexer, 1, [1])
    multiplexer.receive(peers[0].connection, Message({"op": "cancel", "id": 1}, []))
    assert (peers[0].heard().header["code"], multiplexer.poll()) == ("CANCELLED", None)
    peers[0].run(multiplexer, 2, [2])
    peers[1].run(multiplexer, 2, [3])
    multiplexer.disconnect(peers[0].connection)
    assert rows_of(multiplexer.next()) == [3]


def test_a_stacked_batch_is_cancelled_when_its_last_connection_disconnects(peers):
    class Heard:
        is_cancelled = False

        def cancel(self) -> None:
            self.is_cancelled = True

        def credit(self, more: int) -> None: ...

    multiplexer, heard = Multiplexer(), Heard()
    peers[0].run(multiplexer, 1, [1])
    peers[1].run(multiplexer, 2, [2])
    message = multiplexer.next()
    assert rows_of(message) == [1, 2]
    multiplexer.listeners[message.header["id"]] = heard
    multiplexer.disconnect(peers[0].connection)
    assert not heard.is_cancelled
    multiplexer.disconnect(peers[1].connection)
    assert heard.is_cancelled
    respond(multiplexer, message)  # What goes on for half a minute now would end this process, as an owner.


def test_an_inner_call_runs_on_the_infer_process_of_the_running_batch(peers):
    multiplexer = Multiplexer()
    with pytest.raises(RunFailed, match="only while a request is executed"):
        multiplexer.call({"model": "other"}, ())
    peers[1].run(multiplexer, 1, [1])
    multiplexer.next()
    multiplexer.disconnect(peers[0].connection)
    with ExitStack() as stack:
        asked = stack.enter_context(ThreadPoolExecutor(1)).submit(multiplexer.call, {"model": "other"}, ())
        call = peers[1].heard()
        assert (call.op, call.header["model"]) == ("call", "other")
        reply = Message({"op": "answer", "id": call.header["id"], "said": 5}, [])
        multiplexer.receive(peers[0].connection, reply)  # Not the one that was asked.
        multiplexer.receive(peers[1].connection, reply)
        assert asked.result(5)[0]["said"] == 5


def test_an_inner_call_is_made_for_its_own_request_and_for_none_that_has_ended(peers):
    multiplexer = Multiplexer()
    peers[0].run(multiplexer, 1, [1], most=0)
    peers[1].run(multiplexer, 2, [2], most=0)
    peers[2].run(multiplexer, 3, [3], most=0)
    ended, running, _ = (multiplexer.next() for _ in peers)
    respond(multiplexer, ended)
    assert peers[0].rows() == (1, [2])

    def call(number: int | None) -> Mapping[str, Any]:
        RUNNING_ID.set(number)
        return multiplexer.call({"model": "other"}, ())[0]

    with ThreadPoolExecutor(1) as thread:
        rejected = thread.submit(call, ended.header["id"]).result(5)
        assert (rejected["code"], rejected["error"]) == (
            "CANCELLED",
            "other models can be called only while a request is executed",
        )
        # A thread of the model's own has no request: the newest infer process chooses one.
        for number, peer, made_for in ((running.header["id"], peers[1], 2), (None, peers[2], None)):
            asked = thread.submit(call, number)
            sent = peer.heard()
            assert (sent.op, sent.header["for"]) == ("call", made_for)
            multiplexer.receive(peer.connection, Message({"op": "answer", "id": sent.header["id"], "said": 5}, []))
            assert asked.result(5)["said"] == 5


def test_closing_the_multiplexer_ends_the_engine(peers):
    multiplexer = Multiplexer()
    multiplexer.close()
    assert (multiplexer.next().op, multiplexer.poll().op) == ("close", "close")
