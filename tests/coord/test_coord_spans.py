"""GetSpans: the tenants whose spans a caller may see, and the bounds of an answer."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mesh.cluster.etcd import Entry
from mesh.cluster.membership import Instance, State, encode
from mesh.cluster.mirror import Copy
from mesh.rpc.access import Access
from mesh.rpc.span_listing import BYTES, SPANS, latest
from services.coord import spans
from services.coord.spans import MeshSpans, visible_tenant
from shoal.access import tokens
from shoal.access.caller_header import AS_SERVICE
from shoal.access.tokens import Signer
from shoal.coord.v1 import coord_pb2 as pb
from shoal.errors import PermissionDenied, Unauthenticated
from shoal.tenant_header import TENANT_HEADER
from tests.access.policies import claims_of, key, passed, policy
from tests.breakable import PATIENCE_S


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    return tokens.create_signer(tmp_path_factory.mktemp("signer") / "signer.json")


def call(*headers: tuple[str, str]) -> Any:
    return SimpleNamespace(invocation_metadata=lambda: headers)


def named(signer: Signer, role: str) -> Any:
    # A gateway removes this header; it must count for nothing.
    return call(passed(claims_of(key(signer, tenant="acme", role=role))), (TENANT_HEADER, "globex"))


@pytest.mark.parametrize(
    ("role", "visible"), [("operator", None), ("admin", None), ("user", "acme"), ("viewer", "acme")]
)
def test_only_who_may_operate_the_node_sees_the_spans_of_all_tenants(
    signer: Signer, role: str, visible: str | None
) -> None:
    assert visible_tenant(Access(policy(signer)), named(signer, role)) == visible


def test_a_caller_without_rights_or_without_a_token_sees_none(signer: Signer) -> None:
    access = Access(policy(signer))
    with pytest.raises(PermissionDenied):
        visible_tenant(access, named(signer, "unknown"))
    with pytest.raises(Unauthenticated):
        visible_tenant(access, call((TENANT_HEADER, "acme")))
    assert visible_tenant(access, call(*AS_SERVICE)) is None


def test_without_a_policy_a_caller_sees_the_spans_of_the_tenant_that_it_names() -> None:
    assert visible_tenant(None, call((TENANT_HEADER, "acme"))) == "acme"
    assert visible_tenant(None, call()) is None


def test_an_answer_has_the_latest_spans_up_to_a_number_and_a_size() -> None:
    few = [pb.Span(start_ns=n) for n in (3, 1, 2)]
    assert ([span.start_ns for span in latest(few)[0]], latest(few)[1]) == ([1, 2, 3], False)
    spans, is_truncated = latest(pb.Span(start_ns=n) for n in range(SPANS + 1))
    assert (len(spans), spans[0].start_ns, is_truncated) == (SPANS, 1, True)
    spans, is_truncated = latest(pb.Span(start_ns=n, name="x" * (BYTES // 4)) for n in range(5))
    assert ([span.start_ns for span in spans], is_truncated) == ([2, 3, 4], True)


async def test_many_calls_of_one_tenant_do_not_delay_another_tenants(monkeypatch: pytest.MonkeyPatch) -> None:
    may_end, order = asyncio.Event(), list[str]()

    async def listed(instance: object, request: bytes) -> bytes:
        await may_end.wait()
        return b""

    monkeypatch.setattr(spans, "_list", listed)
    here = Instance("infer", "local", "infer-0", "unix:/none", 10, State.READY, 100.0)
    entry = Entry(here.key, encode(here), 1, 1, 0)
    kept = MeshSpans(cast("Any", SimpleNamespace(copy=Copy({here.key: entry}, 1, False))), "local")

    async def ask(tenant: str) -> None:
        await kept.get(pb.GetSpansRequest(), tenant)
        order.append(tenant)

    async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as tasks:
        for tenant in ("many",) * 20 + ("other",):
            tasks.create_task(ask(tenant))
        await asyncio.sleep(0)
        may_end.set()
    # Two are in work when it comes, and one more has its turn before.
    assert order.index("other") <= 3
