"""Versions of the servers that a node starts, and warnings about versions with known defects."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shoal.node.processes import ProcessSpec

_SERVERS = ("etcd", "mongod", "envoy")
# Each takes 0.02 to 0.15 s when the machine is idle.
_TIMEOUT_S = 10.0
# `etcd Version: 3.5.1`, `db version v6.0.5`, `envoy  version: 6eb0d2/1.39.3/Clean`.
_VERSION = re.compile(rb"[Vv]ersion:? v?(?:[0-9a-f]+/)?(\d+\.\d+\.\d+)")
# etcd-io/etcd issue 13766, and the announcement of 2022-03-31.
_ETCD_LOSES_NOTHING = (3, 5, 3)


async def found(specs: Iterable[ProcessSpec]) -> dict[str, str]:
    """Return the versions of etcd, mongod and Envoy among `specs`, as their binaries say them."""
    servers = [spec for spec in specs if spec.name in _SERVERS]
    versions = await asyncio.gather(*(_version(spec.argv[0]) for spec in servers))
    return {spec.name: version for spec, version in zip(servers, versions, strict=True) if version}


async def _version(binary: str) -> str:
    """Return the version of a binary; empty when it says none."""
    try:
        process = await asyncio.create_subprocess_exec(
            binary,
            "--version",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
    except OSError:
        return ""
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            text, _ = await process.communicate()
    except TimeoutError:
        return ""
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    match = _VERSION.search(text)
    return match[1].decode() if match else ""


def warnings(versions: Mapping[str, str]) -> list[str]:
    """Return what is known against the versions of a node."""
    etcd = versions.get("etcd", "")
    if not etcd or tuple(map(int, etcd.split("."))) >= _ETCD_LOSES_NOTHING:
        return []
    return [
        f"etcd {etcd} may lose acknowledged writes when it is killed under load: policies, keys and revocations. "
        "Debian's etcd-server has 3.5.16: unpack it and set SHOAL_ETCD_BINARY (docs/running.md, section etcd)"
    ]
