"""Another user of the machine reaches the gateway of a node, and nothing behind it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.node, pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")]

NOBODY = 65534
# Reads folders and addresses from stdin, and prints the ones that it could open. The interpreter of the tests may lie
# in a folder of root: the script becomes the other user only after its start.
SCRIPT = f"""
import json, os, socket, sys
folders, addresses = json.load(sys.stdin)
os.setgroups([])
os.setgid({NOBODY})
os.setuid({NOBODY})
found = []
for folder in folders:
    try:
        found.append([folder, os.listdir(folder)])
    except PermissionError:
        pass
for address in addresses:
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(family) as sock:
        sock.settimeout(30)
        try:
            sock.connect(address if isinstance(address, str) else tuple(address))
            found.append(address)
        except PermissionError:
            pass
print(json.dumps(found))
"""


def sockets_of(pids: set[int]) -> set[str]:
    """Return the inodes of the sockets that the processes have open."""
    found = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = os.readlink(descriptor)
            except FileNotFoundError:
                continue
            found.add(target.removeprefix("socket:[").removesuffix("]"))
    return found


def listeners(pids: set[int]) -> list[str | tuple[str, int]]:
    """Return the addresses at which the processes listen: TCP ports, and unix sockets with and without a file."""
    own = sockets_of(pids)
    found: list[str | tuple[str, int]] = []
    for row in map(str.split, Path("/proc/net/tcp").read_text().splitlines()[1:]):
        if row[3] == "0A" and row[9] in own:
            found.append(("127.0.0.1", int(row[1].rpartition(":")[2], 16)))
    for row in map(str.split, Path("/proc/net/unix").read_text().splitlines()[1:]):
        # The flag of a listening socket.
        if row[3] == "00010000" and row[6] in own:
            # An abstract name begins with a zero byte, which the kernel shows as "@".
            found.append("\0" + row[7][1:] if row[7].startswith("@") else row[7])
    return found


def test_another_user_reaches_the_gateway_alone(running: Any) -> None:
    pids = running.pids()
    found = listeners({*pids.values(), running.process.pid})
    folder = Path(json.loads((running.data_dir / "node.lock").read_text())["run_dir"])
    folders = [str(folder), str(running.data_dir), str(running.data_dir / "mongo"), str(running.data_dir / "etcd")]
    relative = [address for address in found if isinstance(address, str) and not address.startswith(("/", "\0"))]
    assert sorted(relative) == ["etcd-peer:0", "etcd:0"]
    for name in relative:
        found[found.index(name)] = str(folder / name)
    files = {Path(address).name for address in found if isinstance(address, str)}
    assert {"mongod.sock", "etcd:0", "outbound.sock", "store-0.sock"} <= files
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps([folders, found]),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    reached = [tuple(address) for address in json.loads(done.stdout)]
    public = {("127.0.0.1", int(address.rpartition(":")[2])) for address in (running.gateway, running.admin)}
    assert set(reached) == public
