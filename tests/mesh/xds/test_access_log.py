"""Refused calls that Envoy reports become counted events of the audit log."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from mesh.rpc import audit_log
from mesh.rpc.access import Access
from mesh.xds.access_log import RefusedCalls
from mesh.xds.json_calls import json_calls
from mesh.xds.messages import HttpAccessLogEntry
from services.coord.traffic import JSON_SERVICES
from shoal.access import tokens
from shoal.access.audit import Event
from shoal.access.caller_header import CALLER_HEADER
from shoal.access.tokens import Signer
from shoal.errors import Unavailable
from tests.access.policies import claims_of, key, passed, policy

INFER = "/inference.GRPCInferenceService/ModelInfer"


class Log:
    def __init__(self) -> None:
        self.events: list[Event] = []
        self.is_away = False

    async def record(self, events: Sequence[Event]) -> Sequence[str]:
        if self.is_away:
            raise Unavailable("away")
        self.events.extend(events)
        return [""] * len(events)


def refused(
    path: str = INFER,
    address: str = "10.0.0.9",
    caller: str = "",
    status: str = "16",
    method: str = "POST",
    **headers: str,
) -> HttpAccessLogEntry:
    sent = {**headers, **({CALLER_HEADER: caller} if caller else {})}
    return HttpAccessLogEntry.from_dict(
        {
            "common_properties": {"downstream_remote_address": {"socket_address": {"address": address}}},
            "request": {"path": path, "request_method": method, "request_headers": sent},
            "response": {
                "response_code": 200,
                "response_headers": {"grpc-status": status, "grpc-message": "Jwt%20is%20missing"},
                "response_code_details": "jwt_authn_access_denied",
            },
        }
    )


@pytest.mark.parametrize(
    ("details", "reason", "target"),
    [
        ("via_upstream", "refused by the service", "a/b"),
        # The gateway knows no model, and its callers may name any.
        (
            "rbac_access_denied_matched_policy[revoked]",
            "RBAC: access denied: the key is revoked: ask for another one",
            "",
        ),
        ("of_a_later_Envoy", "of_a_later_Envoy", ""),
    ],
)
async def test_a_refusal_without_a_message_has_a_reason_and_the_model_that_a_service_refused(
    calls: RefusedCalls, log: Log, details: str, reason: str, target: str
) -> None:
    response = {"response_code": 403, "response_code_details": details}
    request = {"path": "/v2/models/a%2Fb/infer", "request_method": "POST"}
    calls.count(HttpAccessLogEntry.from_dict({"request": request, "response": response}))
    await calls.write()
    found = [(event.rpc, event.code, event.reason, event.target) for event in log.events]
    assert found == [(INFER, 7, reason, target)]


JWT_FORM = "Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections"


@pytest.mark.parametrize(
    ("status", "details", "message", "reason"),
    [
        (401, f"jwt_authn_access_denied{{{JWT_FORM}}}", "", f"{JWT_FORM}: send a whole key as 'authorization: Bearer"),
        (401, "jwt_authn_access_denied{Jwt is expired}", "", "Jwt is expired: the key has expired: send another one"),
        # Envoy reports no headers with keys, so it is not known whether there was one.
        (401, "jwt_authn_access_denied{Jwt is missing}", "the header 'authorization' has no key: send", "no key: send"),
        (
            401,
            "jwt_authn_access_denied{Jwks doesn't have key to match kid or alg from Jwt}",
            "",
            "Jwks doesn't have key to match kid or alg from Jwt: the token's signer is not among",
        ),
        (403, "rbac_access_denied_matched_policy[none]", "", "RBAC: access denied: the policy allows this call to no"),
    ],
)
async def test_one_cause_has_one_reason_over_rest_and_grpc(
    calls: RefusedCalls, log: Log, status: int, details: str, message: str, reason: str
) -> None:
    details = details.replace(" ", "_")
    over_rest = {"response_code": status, "response_code_details": details}
    headers = {"grpc-status": {401: "16", 403: "7"}[status], "grpc-message": message or "made by the mapper"}
    over_grpc = {"response_code": 200, "response_code_details": details, "response_headers": headers}
    for path, response in (("/v2/models/m/infer", over_rest), (INFER, over_grpc)):
        request = {"path": path, "request_method": "POST"}
        calls.count(HttpAccessLogEntry.from_dict({"request": request, "response": response}))
    await calls.write()
    (event,) = log.events
    assert (event.count, event.reason[: len(reason)]) == (2, reason)


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    return tokens.create_signer(tmp_path_factory.mktemp("signer") / "signer.json")


@pytest.fixture
def calls(log: Log, signer: Signer) -> RefusedCalls:
    return RefusedCalls(log, Access(policy(signer)), "coord-0", list(json_calls(JSON_SERVICES)))


async def test_a_thousand_equal_refusals_are_one_event(calls: RefusedCalls, log: Log, signer: Signer) -> None:
    for number in range(1_000):
        calls.count(refused(traceparent=f"00-{number:032x}-{number:016x}-01"))
    _, ann = passed(claims_of(key(signer, subject="ann")))
    calls.count(refused(caller=ann, status="7"))
    await calls.write()
    await calls.write()

    first, second = log.events
    assert (first.count, first.code, first.address, first.rpc) == (1_000, 16, "10.0.0.9", INFER)
    assert (first.reason, first.trace_id, first.subject) == ("Jwt is missing", f"{0:032x}", "")
    assert (second.count, second.code, second.subject, second.tenant) == (1, 7, "ann", "acme")


async def test_distinct_callers_beyond_the_bound_are_one_event(
    calls: RefusedCalls, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_log, "MAX_DISTINCT", 10)
    for number in range(100):
        calls.count(refused(address=f"10.0.1.{number}"))
    await calls.write()

    assert len(log.events) == 11
    assert sum(event.count for event in log.events) == 100
    assert log.events[-1].count == 90
    assert "further callers" in log.events[-1].reason


async def test_refusals_are_kept_while_the_log_is_away(calls: RefusedCalls, log: Log) -> None:
    log.is_away = True
    for _ in range(3):
        calls.count(refused())
        with pytest.raises(Unavailable):
            await calls.write()
    log.is_away = False
    await calls.write()

    assert [event.count for event in log.events] == [3]


async def test_paths_that_callers_make_up_and_forged_callers_are_not_told_apart(calls: RefusedCalls, log: Log) -> None:
    for number in range(50):
        calls.count(refused(path=f"/made/up{number}?x=1", caller="forged", traceparent="nonsense"))
    await calls.write()

    (event,) = log.events
    assert (event.count, event.subject, event.trace_id) == (50, "", "")


@pytest.mark.parametrize(
    ("method", "path", "rpc"),
    [
        ("POST", "/v2/models/a%2Fb/infer?x=1", INFER),
        ("GET", "/v2/models/a/versions/1", "/inference.GRPCInferenceService/ModelMetadata"),
        ("POST", "/v2/repository/models/a/load", "/inference.GRPCInferenceService/RepositoryModelLoad"),
        ("GET", "/v2/repository/models/a/load", "another path"),
        ("POST", "/shoal/v1/jobs", "/shoal.ingest.v1.IngestService/Submit"),
        ("GET", "/shoal/v1/jobs?page_size=3", "/shoal.ingest.v1.IngestService/ListJobs"),
        ("POST", "/shoal/v1/keys/k-1:revoke", "/shoal.coord.v1.AccessService/RevokeKey"),
        ("PUT", "/shoal/v1/keys/k-1:revoke", "another path"),
        ("POST", "/v2/models/a/in%66er", "another path"),
    ],
)
async def test_a_refusal_of_rest_or_json_names_its_rpc(
    calls: RefusedCalls, log: Log, method: str, path: str, rpc: str
) -> None:
    calls.count(refused(path, method=method))
    await calls.write()

    assert [event.rpc for event in log.events] == [rpc]


async def test_an_entry_without_any_field_is_counted(calls: RefusedCalls, log: Log) -> None:
    calls.count(HttpAccessLogEntry())
    await calls.write()

    assert [event.count for event in log.events] == [1]
