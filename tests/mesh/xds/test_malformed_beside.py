"""A malformed request of HTTP/2 at a real Envoy costs its own call, and not those beside it on its connection."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import pytest_asyncio

from tests.http2 import INFER
from tests.mesh.h2.test_malformed_requests import MALFORMED, ask_beside
from tests.mesh.xds.test_xds_envoy import Mesh, request

pytestmark = [pytest.mark.envoy, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh() -> AsyncIterator[Mesh]:
    folder = Path(tempfile.mkdtemp(prefix="shoal-"))
    async with AsyncExitStack() as stack:
        made = Mesh(folder, stack, None)
        await made.start()
        await made.envoy.until_ready()
        await made.replica(0)
        await made.show(made.instance(0, "a"))
        yield made
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("name", MALFORMED)
async def test_a_malformed_request_costs_its_own_call(name: str, mesh: Mesh) -> None:
    body = request("a").SerializeToString()
    malformed, bystander = await asyncio.to_thread(ask_beside, mesh.envoy.gateway, MALFORMED[name], INFER, body)
    assert malformed.reset is not None or malformed.http_status == 400
    assert not malformed.is_cut
    assert (bystander.http_status, bystander.status) == (200, 0)
