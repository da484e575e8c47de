"""`shoal audit`, against a store that answers what a test tells it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from shoal.client.transport import methods
from shoal.store.v1 import store_pb2 as pb
from tests.cli.conftest import Shoal
from tests.client.served import Served


def has(served: Served, *events: pb.AuditEvent) -> list[pb.StreamAuditRequest]:
    asked: list[pb.StreamAuditRequest] = []

    async def stream(request: pb.StreamAuditRequest, context: Any) -> AsyncIterator[pb.StreamAuditResponse]:
        asked.append(request)
        for number, event in enumerate(events, 1):
            entry = pb.AuditEntry(id=f"store-0-1/{number:012d}", event=event, hash="ab" * 32)
            entry.at.FromSeconds(1_764_000_000 + number)
            yield pb.StreamAuditResponse(entries=[entry])

    served.on(methods.STREAM_AUDIT, stream, "unary_stream")
    return asked


REFUSAL = pb.AuditEvent(
    reason="the key is not for the model 'm'",
    kind="refusal",
    tenant="acme",
    subject="ann\x1b[2J",
    address="10.0.0.9",
    rpc="/s.S/SetQuota",
    code=7,
    count=12,
)


def test_entries_are_listed_newest_first_without_control_characters(served: Served, shoal: Shoal) -> None:
    asked = has(served, REFUSAL)
    done = shoal("audit", "list", "--kind", "refusal", "--since", "24h", "--limit", "5")
    assert (done.returncode, done.stderr) == (0, "")
    for words in ("acme/ann", "10.0.0.9", "SetQuota", "the key is not for the model 'm'", "PERMISSION_DENIED", "12"):
        assert words in done.stdout
    assert "\x1b" not in done.stdout
    assert (asked[0].newest_first, asked[0].limit, list(asked[0].kinds)) == (True, 5, ["refusal"])
    assert asked[0].HasField("since")


def test_an_act_is_listed_with_what_it_asked_for_and_its_outcome_with_the_error(served: Served, shoal: Shoal) -> None:
    rpc = "/shoal.coord.v1.AccessService/RotateSigner"
    act = pb.AuditEvent(kind="act", rpc=rpc, reason="stolen: the former keys end")
    has(served, act, pb.AuditEvent(kind="outcome", rpc=rpc, code=14, target="s-2", reason="no etcd"))
    said = shoal("audit", "list").stdout
    assert "stolen: the former keys end" in said
    assert "s-2: no etcd" in said


def test_a_sign_in_is_listed_with_its_key(served: Served, shoal: Shoal) -> None:
    rpc, reason = "/inference.GRPCInferenceService/ModelInfer", "further addresses, more than are told apart"
    first = pb.AuditEvent(kind="sign-in", key="k-1", subject="ann", tenant="acme", address="10.0.0.9", rpc=rpc)
    asked = has(served, first, pb.AuditEvent(kind="sign-in", key="k-2", rpc=rpc, reason=reason))
    said = shoal("audit", "list", "--kind", "sign-in").stdout
    assert list(asked[0].kinds) == ["sign-in"]
    for words in ("acme/ann", "10.0.0.9", "ModelInfer", "k-1", f"k-2: {reason}"):
        assert words in said


def test_an_export_is_a_line_of_json_for_each_entry(served: Served, shoal: Shoal) -> None:
    asked = has(served, REFUSAL, pb.AuditEvent(kind="act", target="model-1"))
    lines = [json.loads(line) for line in shoal("audit", "export").stdout.splitlines()]
    assert [(line["kind"], line["count"]) for line in lines] == [("refusal", 12), ("act", 0)]
    assert (asked[0].newest_first, asked[0].limit) == (False, 0)


def test_an_empty_log_says_so(served: Served, shoal: Shoal) -> None:
    has(served)
    assert shoal("audit", "list").stdout == "no entries (a node writes them with `shoal up --auth`)\n"
    assert shoal("audit", "list", "--tenant", "acme").stdout == "no such entries\n"


def test_problems_are_named_and_the_exit_status_is_1(served: Served, shoal: Shoal) -> None:
    problem = pb.VerifyAuditResponse.Problem(where="store-0-1/000000000007", message="was removed")

    async def verify(request: pb.VerifyAuditRequest, context: Any) -> AsyncIterator[pb.VerifyAuditResponse]:
        yield pb.VerifyAuditResponse(entries=5, anchors=2, problems=[problem])
        yield pb.VerifyAuditResponse(entries=9, anchors=2, complete=True)

    served.on(methods.VERIFY_AUDIT, verify, "unary_stream")
    done = shoal("audit", "verify")
    assert done.returncode == 1
    assert "store-0-1/000000000007" in done.stdout
    assert "9 entries and 2 anchors verified: 1 problems" in done.stdout
    assert json.loads(shoal("audit", "verify", "--json").stdout)["problems"][0]["message"] == "was removed"


def test_a_verification_that_breaks_off_is_no_success(served: Served, shoal: Shoal) -> None:
    async def verify(request: pb.VerifyAuditRequest, context: Any) -> AsyncIterator[pb.VerifyAuditResponse]:
        yield pb.VerifyAuditResponse(entries=5)

    served.on(methods.VERIFY_AUDIT, verify, "unary_stream")
    done = shoal("audit", "verify")
    assert done.returncode == 1
    assert "not all" in done.stdout
