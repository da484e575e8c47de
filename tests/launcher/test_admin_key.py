"""The key of the node's user while the node runs for more than a year: on a simulated clock, without a coord."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mesh.process.tasks import end
from shoal.access import tokens
from shoal.access.rpc_groups import CREATE_KEY
from shoal.coord.v1 import access_pb2 as pb
from shoal.errors import Unavailable
from shoal.node import admin_key
from shoal.node.admin_key import AdminKey
from tests.breakable import until

DAY_S = 86_400


async def test_the_key_is_replaced_a_month_before_its_end_once_coord_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signer = tokens.create_signer(tmp_path / "signer")
    days, is_away, asked, looks = 0, False, 0, 0

    def now() -> float:
        nonlocal looks
        looks += 1
        return 1_800_000_000.0 + days * DAY_S

    async def call(sockets: Any, rpc: str, request: Any, response: Any) -> Any:
        nonlocal asked
        assert rpc == CREATE_KEY
        asked += 1
        if is_away:
            raise Unavailable("coord has no socket yet")
        made = tokens.create_key(
            signer,
            tenant=request.tenant,
            role=request.role,
            subject=request.subject,
            models=["*"],
            grants=[],
            life_s=request.life_seconds,
            now=now(),
        )
        return pb.CreateKeyResponse(key=made.text)

    monkeypatch.setattr(admin_key, "call_as_launcher", call)
    monkeypatch.setattr(admin_key, "time", SimpleNamespace(time=now))
    monkeypatch.setattr(admin_key, "CHECK_S", 0.001)
    key, reports = AdminKey(tmp_path / "admin.key", []), list[str]()
    assert await key.ensure()
    first = key.path.read_text()

    keeping = asyncio.create_task(key.keep(reports.append))
    try:
        days, before = 335, looks
        await until(lambda: looks > before + 10, "the key is looked at")
        assert (asked, key.path.read_text()) == (1, first)
        is_away, days = True, 337
        await until(lambda: len(reports) > 1, "each failure is reported")
        assert f"the key of the node's user in {key.path} cannot be replaced yet: coord has no" in reports[0]
        assert key.path.read_text() == first
        is_away = False
        await until(lambda: key.path.read_text() != first, "the key is replaced")
        assert key.path.stat().st_mode & 0o777 == 0o600
        made = asked
        key.path.unlink()
        await until(lambda: asked > made and key.path.exists(), "a key that is missing is made")
    finally:
        await end(keeping)
