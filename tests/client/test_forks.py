"""A client that was used before its process forked works in the child, and in the parent afterwards."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from shoal.client.transport import methods
from tests.client.inference.test_infer_calls import echo, stream
from tests.client.served import Served


def test_a_used_client_works_in_forked_children_and_in_their_parent(
    served: Served, transport: str, repository_root: Path
) -> None:
    """In a process of its own: this one has threads that must not be forked."""
    served.on(methods.MODEL_INFER, echo)
    served.on(methods.MODEL_STREAM_INFER, stream, "stream_stream")
    command = [sys.executable, "-m", "tests.client.forking", served.address, transport]
    done = subprocess.run(command, cwd=repository_root, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    # grpc reports that its own fork handlers do nothing.
    reported = [line for line in done.stderr.splitlines() if "fork_posix.cc" not in line]
    assert not reported, done.stderr
