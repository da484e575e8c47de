"""Main module of a model process: `python -m services.infer.model_process.child.main FD SERVER_PID`.

    the server's "load" ──> import and load ──> "loaded" | "failed" ──> serve ──> "close" ──> model's clean-up, exit

The process ends with the server, however the server dies: by a signal of the kernel, or when the channel closes. The
server logs its standard output and standard error.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
from pathlib import Path
from typing import NoReturn

from services.infer.model_process.channel import Channel, ChannelClosed, Message
from services.infer.model_process.child.engine import serve
from services.infer.model_process.child.mailbox import Mailbox
from services.infer.model_process.hosted import (
    Hosted,
    Load,
    LoadFailed,
    MakeInnerCall,
    print_error,
)

_PR_SET_PDEATHSIG = 1
MAX_LOAD_ERROR_CHARACTERS = 2000
"""Longest text of a load error, in characters."""


def main(fd: int, server: int) -> NoReturn:
    """Serve one model, then exit."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # The server may have died before the signal was set up.
    if os.getppid() != server:
        os._exit(1)
    # Ctrl-C is for the server, which drains running requests first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = Channel(socket.socket(fileno=fd))
    try:
        serve_one(channel)
    except ChannelClosed:
        pass
    except BaseException as err:
        print_error(err)
        exit_now(1)
    exit_now(0)


def serve_one(channel: Channel) -> None:
    """Load the model that the server's load request names, and serve that model until a "close" arrives.

    Raises:
        ChannelClosed: the server has closed the channel.
    """
    mailbox = Mailbox(channel)
    message = channel.receive()
    assert message is not None, "receive() without a timeout returns a message"
    try:
        hosted = load_hosted(message, mailbox.call)
    except LoadFailed as err:
        channel.send({"op": "failed", "error": str(err)[:MAX_LOAD_ERROR_CHARACTERS]})
        return
    channel.send({"op": "loaded", **vars(hosted.model_info)})
    try:
        serve(channel, mailbox, hosted)
    finally:
        try:
            hosted.close()
        except BaseException as err:
            print_error(err)


def load_hosted(message: Message, call: MakeInnerCall) -> Hosted:
    """Load and return the model of a load request; `call` runs calls of other models. Raises LoadFailed."""
    fields = message.header["load"]
    load = Load(**{**fields, "file": Path(fields["file"]), "folder": Path(fields["folder"])})
    # Each kind needs other libraries: only the needed ones are imported.
    if load.kind == "onnx":
        from services.infer.model_process.child.onnx_host import OnnxModel

        return OnnxModel(load)
    from services.infer.model_process.python.hosting import host

    return host(load, call)


def exit_now(code: int) -> NoReturn:
    """Flush the output and exit, without waiting for threads that the model has left running."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            pass
    os._exit(code)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
