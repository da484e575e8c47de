"""Admin key of a node's user: a file in the data folder, which the command line and shoal.Client find by themselves."""

from __future__ import annotations

import asyncio
import base64
import getpass
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mesh.process.files import write_atomically
from shoal.access.caller_header import CALLER_HEADER, LAUNCHER
from shoal.access.policy import is_name
from shoal.access.rpc_groups import CREATE_KEY, LIST_KEYS
from shoal.errors import FailedPrecondition, InvalidArgument, ShoalError, Unavailable, from_status
from shoal.node.probes import channel_to

FILE = "admin.key"
TENANT = "local"
ROLE = "admin"
# A key that expires sooner is replaced.
_LEAST_S = 30 * 86_400
_LIFE_S = 366 * 86_400
CHECK_S = 3_600.0
"""Interval of checks of the key while its node runs."""
# coord waits 5 s for the audit log.
_CALL_S = 15.0


class AdminKey:
    """Key in the file `path`; made by the coord at one of `sockets`, of which the launcher is a trusted caller."""

    def __init__(self, path: Path, sockets: Sequence[Path]) -> None:
        self.path = path
        self.text = ""
        """The key: a secret. Empty before `ensure` has returned True."""
        self.why = ""
        """Reason for which `ensure` has returned False."""
        self._sockets = tuple(sockets)

    async def ensure(self) -> bool:
        """Read the key of an earlier start, or make one. Return False while coord cannot yet.

        Raises:
            FailedPrecondition: coord cannot sign keys.
            InvalidArgument: the file cannot be written.
        """
        try:
            self.text = await self._valid_text() or await self._new_text()
        except (FailedPrecondition, InvalidArgument):
            raise
        except ShoalError as err:
            self.why = err.message
            return False
        return True

    async def keep(self, report: Callable[[str], None]) -> None:
        """Replace the key when it is missing or ends soon, until cancelled. `report` gets the reason of a failure."""
        while True:
            await asyncio.sleep(CHECK_S)
            if self._read()[2] > time.time() + _LEAST_S:
                continue
            try:
                self.text = await self._new_text()
            except ShoalError as err:
                report(f"the key of the node's user in {self.path} cannot be replaced yet: {err.message}")

    def _read(self) -> tuple[str, str, float]:
        """Return the key in the file, its id and its end; an empty text when the file has none."""
        try:
            text = self.path.read_text().strip()
            payload = text.split(".")[1]
            claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
            return text, str(claims["jti"]), float(claims["exp"])
        except (OSError, ValueError, LookupError, TypeError):
            return "", "", 0.0

    async def _valid_text(self) -> str:
        """Return the key in the file, if it is valid for a while; else nothing."""
        from shoal.coord.v1 import access_pb2 as pb

        text, id, _ = self._read()
        if not text:
            return ""
        listed = await self._call(LIST_KEYS, pb.ListKeysRequest(), pb.ListKeysResponse)
        least = time.time() + _LEAST_S
        is_valid = any(
            key.id == id and not key.revoked and key.role == ROLE and key.expires_at.seconds > least
            for key in listed.keys
        )
        return text if is_valid else ""

    async def _new_text(self) -> str:
        from shoal.coord.v1 import access_pb2 as pb

        request = pb.CreateKeyRequest(tenant=TENANT, role=ROLE, subject=_user(), life_seconds=_LIFE_S)
        text = str((await self._call(CREATE_KEY, request, pb.CreateKeyResponse)).key)
        try:
            write_atomically(self.path, text + "\n", is_private=True)
        except OSError as err:
            raise InvalidArgument(f"cannot write {self.path}: {err.strerror}") from err
        return text

    async def _call(self, rpc: str, request: Any, response: Any) -> Any:
        return await call_as_launcher(self._sockets, rpc, request, response)


async def call_as_launcher(sockets: Sequence[Path], rpc: str, request: Any, response: Any) -> Any:
    """Return the response of the coord at one of `sockets`, which only the user of its node can open.

    Raises:
        ShoalError: the error of the call; Unavailable: no coord responds.
    """
    import grpc

    error: ShoalError = Unavailable("coord has no socket yet")
    for socket in sockets:
        if not socket.exists():
            continue
        async with channel_to(f"unix:{socket}") as channel:
            call = channel.unary_unary(
                rpc,
                request_serializer=lambda one: one.SerializeToString(),
                response_deserializer=response.FromString,
            )
            try:
                return await call(request, timeout=_CALL_S, metadata=((CALLER_HEADER, LAUNCHER.decode()),))
            except grpc.aio.AioRpcError as err:
                error = from_status(err.code().value[0], err.details() or "")
                if not isinstance(error, Unavailable):
                    break
    raise error


def _user() -> str:
    try:
        name = getpass.getuser()
    except (OSError, KeyError):
        return "user"
    return name if is_name(name) else "user"
