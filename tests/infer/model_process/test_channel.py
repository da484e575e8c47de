"""Frames between two ends of a socket: what goes in comes out; what is no frame ends the channel, never the process."""

from __future__ import annotations

import array
import fcntl
import json
import os
import socket
import struct
import threading
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import pytest

from services.infer.model_process import channel as channels
from services.infer.model_process.channel import Channel, ChannelClosed
from services.infer.model_process.payload import part
from shoal.oip.datatypes import DTYPES


@pytest.fixture
def ends():
    one, other = socket.socketpair()
    both = Channel(one), Channel(other)
    yield both
    for channel in both:
        channel.close()


@pytest.fixture
def raw():
    one, other = socket.socketpair()
    channel = Channel(other)
    with one:
        yield one, channel
    channel.close()


def crossed(ends, *parts):
    sender = threading.Thread(target=ends[0].send, args=({"op": "x", "n": 1}, parts))
    sender.start()
    message = ends[1].receive(30)
    sender.join()
    return message


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3), (3, 50_001)])
def test_numbers_of_every_kind_and_size(ends, name, shape):
    given = np.random.default_rng(0).integers(0, 2, shape).astype(DTYPES[name])
    message = crossed(ends, part("x", name, [given]), part("again", name, [given]))
    assert (message.op, message.header["n"]) == ("x", 1)
    for _, datatype, got in message.tensors:
        assert (datatype, got.dtype, got.shape) == (name, DTYPES[name], shape)
        np.testing.assert_array_equal(got, given)
        assert got.flags.writeable
        assert got.flags.aligned


@pytest.mark.parametrize("rows", [3, 30_000])
def test_arrays_of_one_tensor_arrive_as_one(ends, rows):
    one, other = np.arange(rows * 2, dtype=np.float32).reshape(rows, 2), np.ones((1, 2), np.float32)
    ((_, _, got),) = crossed(ends, part("x", "FP32", [one, other, one[::-1]])).tensors
    np.testing.assert_array_equal(got, np.concatenate([one, other, one[::-1]]))


@pytest.mark.parametrize("times", [1, 9000])
def test_bytes(ends, times):
    given = np.array([[b"", "é"], [b"\0\xff" * times, np.bytes_(b"np")]], object)
    ((_, _, got),) = crossed(ends, part("x", "BYTES", [given])).tensors
    assert got.tolist() == [[b"", "é".encode()], [b"\0\xff" * times, b"np"]]
    with pytest.raises(TypeError, match="int"):
        part("x", "BYTES", [np.array([1], object)])


def test_more_arrays_than_one_system_call_takes(ends):
    rows = [np.full((1, 40), n, np.float64) for n in range(1500)]
    ((_, _, got),) = crossed(ends, part("x", "FP64", rows)).tensors
    np.testing.assert_array_equal(got, np.concatenate(rows))


def segments():
    """Return the inodes of the tensors' segments that this process maps or has a descriptor of."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    found = {int(line.split()[4]) for line in lines if "memfd:shoal-tensors" in line}
    for fd in os.listdir("/proc/self/fd"):
        # One may have been closed meanwhile, as the listing's own has.
        with suppress(FileNotFoundError):
            if "memfd:shoal-tensors" in os.readlink(f"/proc/self/fd/{fd}"):
                found.add(os.stat(f"/proc/self/fd/{fd}").st_ino)
    return found


def test_the_segment_of_a_large_tensor_is_freed_with_its_array(ends, monkeypatch):
    # Another test of this process may have started the thread.
    monkeypatch.setattr(channels, "_dropped", None)
    before = segments()
    message = crossed(ends, part("x", "UINT8", [np.full(32 << 20, 7, np.uint8)]))
    assert message.tensors[0][2].sum() == 7 * (32 << 20)
    assert len(segments() - before) == 1
    del message
    # What other tests have left may be freed meanwhile.
    assert segments() <= before


def test_a_large_segment_is_left_to_a_thread_and_then_freed(ends, monkeypatch):
    # As the thread's, without the thread.
    dropped = SimpleQueue()
    monkeypatch.setattr(channels, "_dropped", dropped)
    monkeypatch.setattr(channels, "_MAX_DROPPED", 1)

    def mapped():
        return Path("/proc/self/maps").read_text().count("memfd:shoal-tensors")

    tensors = [part("x", "UINT8", [np.zeros(size, np.uint8)]) for size in (100_000, 1 << 20, 1 << 20)]
    small, large, beyond = (crossed(ends, tensor) for tensor in tensors)
    before = mapped()
    assert before >= 3
    del small
    assert (mapped(), dropped.qsize()) == (before - 1, 0)
    del large, beyond
    assert (mapped(), dropped.qsize()) == (before - 2, 1)
    dropped.get()
    assert mapped() == before - 3


def test_receive_times_out_and_reports_a_closed_channel(ends):
    assert ends[1].receive(0) is None
    assert ends[1].receive(0.01) is None
    ends[0].shut()
    with pytest.raises(ChannelClosed):
        ends[1].receive()
    with pytest.raises(ChannelClosed):
        ends[0].send({})


def frame(header: object, inline: bytes = b"", segment: int = 0) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<IIQ", len(text), len(inline), segment) + text + inline


@pytest.mark.parametrize(
    "data",
    [
        b"\xff" * 64,
        struct.pack("<IIQ", 1 << 30, 0, 0),
        frame(b"no json"),
        frame(b"[" * 100_000),
        frame([]),
        frame({}),
        frame({"t": 5}),
        frame({"t": [["x", "FP32", [1]]]}),
        frame({"t": [["x", "FP33", [1], 4]]}, bytes(4)),
        frame({"t": [["x", [], [1], 4]]}, bytes(4)),
        frame({"t": [["x", "FP32", [1], 8]]}, bytes(8)),
        frame({"t": [["x", "FP32", [-1], -4]]}),
        frame({"t": [["x", "FP32", [1.0], 4]]}, bytes(4)),
        frame({"t": [["x", "FP32", [2], 8]]}, bytes(4)),
        frame({"t": [["x", "FP32", [True], 4]]}, bytes(4)),
        frame({"t": [["x", "FP32", [1 << 62, 0], 0], ["y", "FP32", [1 << 40], 1 << 42]]}),
        frame({"t": [["x", "BYTES", [1 << 40], 4]]}, bytes(4)),
        frame({"t": [["x", "BYTES", [1], 4]]}, b"\xff\xff\xff\xff"),
        frame({"t": [["x", "BYTES", [1], 8]]}, bytes(8)),
        frame({"t": [["x", "UINT8", [100000], 100000]]}, segment=100_000),
    ],
)
def test_an_invalid_frame_closes_the_channel(raw, data):
    sock, channel = raw
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)
    with pytest.raises(ChannelClosed):
        channel.receive(30)


@pytest.mark.parametrize(("size", "seals"), [(100_000, 0), (50_000, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)])
def test_a_segment_that_is_not_sealed_against_shrinking_is_rejected(raw, size, seals):
    sock, channel = raw
    fd = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    data = frame({"t": [["x", "UINT8", [100_000], 100_000]]}, segment=100_000)
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])
    os.close(fd)
    with pytest.raises(ChannelClosed, match="sealed"):
        channel.receive(30)
