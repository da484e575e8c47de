"""The main of a model process: `python -m services.infer.model_process.child.main FD SERVER_PID`.

    the server's "load" ──> import and load ──> "loaded" | "failed" ──> serve ──> "close" ──> the model's good-bye, exit

It dies with the server, however that dies: by the kernel's signal, or when its channel ends. What it writes to standard
output and error goes to the server's log.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from services.infer.model_process.channel import Channel, ChannelClosed, Message
from services.infer.model_process.child.engine import serve
from services.infer.model_process.child.mailbox import Mailbox
from services.infer.model_process.hosted import Call, Hosted, Load, LoadFailed

_PR_SET_PDEATHSIG = 1
TEXT = 2000
"""Characters of what is told of a failure."""


def main(fd: int, server: int) -> NoReturn:
    """Serves one model, then exits."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != server:
        os._exit(1)  # It died before the leash was on.
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's: it lets calls under way finish.
    channel = Channel(socket.socket(fileno=fd))
    try:
        serve_one(channel)
    except ChannelClosed:
        pass
    except BaseException:
        traceback.print_exc()
        exit_now(1)
    exit_now(0)


def serve_one(channel: Channel) -> None:
    """Loads the model that the server names, and serves it until it is told to close.

    Raises:
        ChannelClosed: the server is gone.
    """
    mailbox = Mailbox(channel)
    message = channel.receive()
    assert message is not None, "it waits without a bound"
    try:
        hosted = hosted_of(message, mailbox.call)
    except LoadFailed as err:
        channel.send({"op": "failed", "error": str(err)[:TEXT]})
        return
    facts = hosted.facts
    channel.send({"op": "loaded", **vars(facts)})
    try:
        serve(channel, mailbox, hosted)
    finally:
        try:
            hosted.close()
        except BaseException:
            traceback.print_exc()


def hosted_of(message: Message, call: Call) -> Hosted:
    """The model that a "load" names; `call` runs the calls that it makes of others. Raises LoadFailed."""
    said = message.header["load"]
    load = Load(**{**said, "file": Path(said["file"]), "folder": Path(said["folder"])})
    # Each brings its own libraries: only what is needed is imported.
    if load.kind == "onnx":
        from services.infer.model_process.child.onnx_host import OnnxModel

        return OnnxModel(load)
    from services.infer.model_process.python.hosting import host

    return host(load, call)


def exit_now(code: int) -> NoReturn:
    """Threads that a model left behind do not keep the process."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            pass
    os._exit(code)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
