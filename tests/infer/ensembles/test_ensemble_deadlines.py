"""Deadlines and cancellation hold through all steps: nothing is started for who has gone or is too late."""

from __future__ import annotations

import asyncio
import time

import grpc
import numpy as np
import pytest

from shoal.errors import DeadlineExceeded
from tests.breakable import until
from tests.infer import onnx_files
from tests.infer.conftest import floats, output, request
from tests.infer.ensembles.conftest import FAN, parameter, step
from tests.infer.ensembles.test_ensembles_served import CHAIN, refused
from tests.infer.scheduling.test_scheduling_rpc import occupied

X = floats([1, 2, 3, 4])
# A busy machine takes a while for the step before the one in which a request expires.
IN_STEP_S = 1.5


def executions(served, *models: str) -> list[int]:
    return [served.models.find(model, "").statistics.executions for model in models]


def released(served) -> bool:
    """Nobody holds any version, and no ensemble has anything in work."""
    versions = [version for name in served.models.names() for version in served.models.versions(name)]
    return not any(version._users for version in versions) and not any(
        getattr(version.scheduler, "_runs", None) for version in versions
    )


async def test_who_cancels_starts_no_further_step(serve, models_folder):
    models_folder.ensemble("e", *FAN)
    models_folder.ensemble("outer", step("e", {"x": "x"}, {"s": "s"}), step("double", {"x": "x"}, {"y": "d"}))
    served = await serve(models_folder.root)
    async with occupied(served.models.find("double", "")):
        call = asyncio.ensure_future(served.core.infer(request("outer", x=X)))
        await until(lambda: len(served.models.find("double", "").scheduler._queue) >= 2)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await until(lambda: not len(served.models.find("double", "").scheduler._queue))
    await until(lambda: released(served))
    assert executions(served, "double", "add") == [0, 0]
    assert served.models.find("outer", "").statistics.cancelled == 1
    assert served.models.find("double", "").statistics.cancelled == 2


async def test_what_expires_in_a_step_says_where(serve, models_folder):
    models_folder.ensemble("e", *CHAIN)
    served = await serve(models_folder.root)
    async with occupied(served.models.find("triple", "")):
        with pytest.raises(DeadlineExceeded) as err:
            await served.core.infer(request("e", x=X), time.monotonic() + IN_STEP_S)
        timed = request("e", x=X)
        timed.parameters["timeout"].int64_param = int(IN_STEP_S * 1e6)
        code, why = await refused(served, timed)
    assert "in ensemble 'e', step 1, model 'triple': Request timeout expired in the queue" in err.value.message
    assert (code, "step 1, model 'triple'" in why) == (grpc.StatusCode.DEADLINE_EXCEEDED, True)
    assert executions(served, "double", "triple") == [2, 0]
    statistics = served.models.find("triple", "").statistics
    assert (statistics.expired, statistics.expired_executed, statistics.fail.count) == (2, 0, 2)
    assert released(served)


async def test_what_is_too_late_at_once_runs_no_step(serve, models_folder):
    models_folder.ensemble("e", *CHAIN)
    served = await serve(models_folder.root)
    with pytest.raises(DeadlineExceeded, match="before ensemble 'e' began"):
        await served.core.infer(request("e", x=X), time.monotonic())
    assert executions(served, "double") == [0]


async def test_a_step_that_fails_calls_the_others_off(serve, models_folder):
    config = "max_batch_size: 8 dynamic_batching { default_queue_policy { default_timeout_microseconds: 20000 } }"
    models_folder.put("hasty", onnx_files.scale(), config=config)
    models_folder.ensemble("e", step("hasty", {"x": "x"}, {"y": "a"}), step("double", {"x": "x"}, {"y": "b"}))
    served = await serve(models_folder.root)
    async with occupied(served.models.find("hasty", "")), occupied(served.models.find("double", "")):
        code, why = await refused(served, request("e", x=X))
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "step 0, model 'hasty'" in why
        assert not len(served.models.find("double", "").scheduler._queue)
    assert released(served)


async def test_rows_that_wait_are_called_off_with_their_request(serve, models_folder):
    models_folder.ensemble("e", step("double", {"x": "x"}, {"y": "y"}), more=parameter("each.0", "x"))
    served = await serve(models_folder.root)
    rows = np.repeat(X, 100, axis=0)
    async with occupied(served.models.find("double", "")):
        call = asyncio.ensure_future(served.core.infer(request("e", x=rows)))
        await until(lambda: len(served.models.find("double", "").scheduler._queue) == 100)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert not len(served.models.find("double", "").scheduler._queue)
    assert executions(served, "double") == [0]
    assert released(served)


async def test_the_priority_of_a_request_holds_in_its_steps(serve, models_folder):
    config = "max_batch_size: 1 dynamic_batching { priority_levels: 2 default_priority_level: 2 }"
    models_folder.put("levels", onnx_files.scale(), config=config)
    models_folder.ensemble("e", step("levels", {"x": "x"}, {"y": "y"}))
    served = await serve(models_folder.root)
    order: list[str] = []

    async def ask(name: str, priority: int) -> None:
        made = request("e", x=X)
        made.parameters["priority"].int64_param = priority
        await served.core.infer(made)
        order.append(name)

    async with occupied(served.models.find("levels", "")):
        calls = [asyncio.ensure_future(ask(name, priority)) for name, priority in (("late", 2), ("soon", 1))]
        await until(lambda: len(served.models.find("levels", "").scheduler._queue) == 2)
    await asyncio.gather(*calls)
    assert order == ["soon", "late"]


async def test_tenants_have_their_shares_in_the_steps(serve, models_folder):
    models_folder.put("narrow", onnx_files.scale(), config="max_batch_size: 1")
    models_folder.ensemble("e", step("narrow", {"x": "x"}, {"y": "y"}))
    served = await serve(models_folder.root)
    order: list[str] = []

    async def ask(tenant: str) -> None:
        assert output(await served.core.infer(request("e", x=X), tenant=tenant), "y").shape == (1, 4)
        order.append(tenant)

    async with occupied(served.models.find("narrow", "")):
        calls = [asyncio.ensure_future(ask(tenant)) for tenant in "aaaab"]
        await until(lambda: len(served.models.find("narrow", "").scheduler._queue) == 5)
    await asyncio.gather(*calls)
    assert order.index("b") < 3
