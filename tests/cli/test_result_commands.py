"""`shoal results` and `shoal store`: what they ask, what they show, and how they complain."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration

from shoal.cli import amounts
from shoal.client.transport import methods
from shoal.errors import InvalidArgument
from shoal.store.v1 import store_pb2 as pb
from tests.cli.conftest import Shoal
from tests.cli.test_node_commands import complaint
from tests.client.served import Served

OK, FAILED = pb.Result.OUTCOME_SUCCEEDED, pb.Result.OUTCOME_FAILED


def stored(**fields: Any) -> pb.Result:
    result = pb.Result(**{"job_id": "01J", "outcome": OK, "model_name": "digits", "model_version": "3", **fields})
    result.recorded_at.FromDatetime(datetime(2026, 11, 24, 12, tzinfo=UTC))
    return result


def test_results_list(shoal: Shoal, served: Served) -> None:
    asked: list[pb.QueryResultsRequest] = []

    async def query(request: Any, context: Any) -> Any:
        asked.append(request)
        return pb.QueryResultsResponse(results=[stored(tenant="acme", labels={"team": "vision"})])

    served.on(methods.QUERY_RESULTS, query)
    options = ["--model", "digits", "--version", "3", "--tenant", "acme", "--label", "team=vision"]
    table = shoal("results", "list", *options, "--outcome", "failed", "--since", "24h", "--limit", "7").stdout
    assert all(word in table for word in ("01J", "succeeded", "digits version 3", "acme", "team=vision"))
    (request,) = asked
    assert (request.model_name, request.model_version, request.tenant) == ("digits", "3", "acme")
    assert (dict(request.labels), request.outcome, request.page_size) == ({"team": "vision"}, FAILED, 7)
    age = datetime.now(UTC) - request.since.ToDatetime(UTC)
    assert timedelta(hours=24) <= age < timedelta(hours=25)
    [entry] = json.loads(shoal("results", "list", "--json", "--until", "2026-11-24T08:00").stdout)
    assert (entry["job_id"], entry["outcome"], entry["labels"]) == ("01J", "succeeded", {"team": "vision"})
    assert "use one of succeeded" in complaint(shoal("results", "list", "--outcome", "dead"), 2)
    assert "--since 'yesterday'" in complaint(shoal("results", "list", "--since", "yesterday"), 2)


def test_results_show(shoal: Shoal, served: Served) -> None:
    async def get(request: Any, context: Any) -> Any:
        if request.job_id == "lost":
            return pb.GetResultResponse(result=stored(job_id="lost", attempt=2, answer_lost="blob x: it is damaged"))
        if request.job_id != "01J":
            await context.abort(grpc.StatusCode.NOT_FOUND, "job x: its result was removed by retention, 2026-11-24")
        result = stored(instance="local/infer-0", attempt=2)
        result.response.outputs.add(name="y", datatype="FP32", shape=[2])
        result.response.raw_output_contents.append(np.float32([0.5, 2]).tobytes())
        return pb.GetResultResponse(result=result)

    served.on(methods.GET_RESULT, get)
    shown = shoal("results", "show", "01J").stdout
    assert all(word in shown for word in ("01J", "digits version 3", "local/infer-0", "FP32", "[2]"))
    document = json.loads(shoal("results", "show", "01J", "--json").stdout)
    assert document["answer"]["outputs"][0]["data"] == [0.5, 2]
    assert "removed by retention" in complaint(shoal("results", "show", "x"))
    for options in ((), ("--json",)):
        lost = shoal("results", "show", "lost", *options)
        assert lost.returncode == 1
        assert "damaged" in lost.stdout
        assert lost.stderr == "shoal: the answer of job lost is damaged in the store: blob x: it is damaged\n"


def test_results_export(shoal: Shoal, served: Served, tmp_path: Path) -> None:
    async def export(request: Any, context: Any) -> Any:
        if request.url.startswith("s3://no"):
            yield pb.ExportResultsResponse(cursor="the-cursor", parts=0)
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "the object store refuses")
        yield (
            pb.ExportResultsResponse(
                rows=3, cursor="1", file="part-00000.parquet", file_bytes=4, chunk=b"PAR1", parts=1
            )
            if not request.url
            else pb.ExportResultsResponse(rows=3, cursor="1", parts=1)
        )
        lost = 2 * request.url.endswith("rotten")
        yield pb.ExportResultsResponse(rows=3, bytes=2048, parts=1, cursor="2", complete=True, answers_lost=lost)

    served.on(methods.EXPORT_RESULTS, export, "unary_stream")
    assert shoal("results", "export", "out").stdout == "3 results in 1 parts, 2.0 KiB, in out\n"
    assert (tmp_path / "out" / "part-00000.parquet").read_bytes() == b"PAR1"
    assert json.loads(shoal("results", "export", "s3://b/x", "--json").stdout)["complete"] is True
    rotten = shoal("results", "export", "s3://b/rotten")
    assert (rotten.returncode, rotten.stdout) == (1, "3 results in 1 parts, 2.0 KiB, in s3://b/rotten\n")
    assert "2 of them have no answer, because it is damaged in the store: the column answer_lost" in rotten.stderr
    failed = shoal("results", "export", "s3://no/x")
    assert failed.returncode == 1
    assert "0 parts are written: resume with --cursor the-cursor" in failed.stderr
    assert "the object store refuses" in failed.stderr
    assert "holds an export or a part of one" in complaint(shoal("results", "export", "out"))


def test_store_retention(shoal: Shoal, served: Served) -> None:
    asked: list[pb.SetRetentionRequest] = []
    rules = [
        pb.RetentionRule(collection=1, keep=Duration(seconds=30 * 86_400)),
        pb.RetentionRule(collection=2, tenant=""),
    ]

    async def change(request: Any, context: Any) -> Any:
        asked.append(request)
        return pb.SetRetentionResponse(rules=rules)

    async def listed(request: Any, context: Any) -> Any:
        return pb.ListRetentionResponse(rules=rules)

    served.on(methods.SET_RETENTION, change)
    served.on(methods.LIST_RETENTION, listed)
    table = shoal("store", "retention", "list").stdout
    assert all(word in table for word in ("results", "30d", "answers", "(default)", "for ever"))
    first, second = json.loads(shoal("store", "retention", "list", "--json").stdout)
    assert (first["kept"], first["tenant"], first["keep_s"]) == ("results", None, 2_592_000)
    assert (second["kept"], second["tenant"], second["keep_s"]) == ("answers", "", None)
    assert "kept for 30d" in shoal("store", "retention", "set", "results", "30d").stdout
    assert "acme: kept for ever" in shoal("store", "retention", "set", "answers", "forever", "--tenant", "acme").stdout
    assert "no rule" in shoal("store", "retention", "remove", "answers", "--tenant", "").stdout
    assert [(one.rule.collection, one.rule.keep.seconds, one.remove) for one in asked] == [
        (1, 2_592_000, False), (2, 0, False), (2, 0, True)
    ]  # fmt: skip
    assert [one.rule.tenant if one.rule.HasField("tenant") else None for one in asked] == [None, "acme", ""]
    assert "use one of results, answers, tombstones" in complaint(shoal("store", "retention", "set", "jobs", "1d"), 2)
    assert "expected an age" in complaint(shoal("store", "retention", "set", "results", "soon"), 2)


def test_store_usage_and_quotas(shoal: Shoal, served: Served) -> None:
    asked: list[pb.SetQuotaRequest] = []
    looked: list[pb.ListUsageRequest] = []

    async def change(request: Any, context: Any) -> Any:
        asked.append(request)
        return pb.SetQuotaResponse()

    async def usage(request: Any, context: Any) -> Any:
        looked.append(request)
        if not request.page_token:
            default = pb.TenantUsage(results=3, bytes=1536)
            return pb.ListUsageResponse(usages=[default], next_page_token="x")
        acme = pb.TenantUsage(
            tenant="acme", results=1, bytes=5 << 20, quota_bytes=10 << 20, payloads=77, payload_bytes=3 << 20
        )
        return pb.ListUsageResponse(usages=[acme], artifacts=2, artifact_bytes=2048)

    served.on(methods.SET_QUOTA, change)
    served.on(methods.LIST_USAGE, usage)
    table = shoal("store", "usage").stdout
    for word in ("(default)", "1.5 KiB", "none", "acme", "5.0 MiB", "10.0 MiB", "50%", "2 artifacts", "2.0 KiB"):
        assert word in table
    (row,) = (line for line in table.splitlines() if "acme" in line)
    assert row.replace("│", " ").split()[:6] == ["acme", "1", "77", "5.0", "MiB", "3.0"]
    assert not looked[0].recount
    shoal("store", "usage", "--recount")
    assert looked[2].recount
    document = json.loads(shoal("store", "usage", "--json").stdout)
    assert [tenant["quota_bytes"] for tenant in document["tenants"]] == [None, 10 << 20]
    assert [(one["payloads"], one["payload_bytes"]) for one in document["tenants"]] == [(0, 0), (77, 3 << 20)]
    assert "at most 20.0 GiB" in shoal("store", "quota", "set", "20GiB").stdout
    shoal("store", "quota", "set", "1000", "--tenant", "")
    assert "acme: no quota" in shoal("store", "quota", "remove", "--tenant", "acme").stdout
    assert "at most 0 B" in shoal("store", "quota", "set", "0", "--tenant", "trial").stdout
    quotas = [one.bytes if one.HasField("bytes") else None for one in asked]
    assert quotas == [20 << 30, 1000, None, 0]
    assert [(one.HasField("tenant"), one.tenant, one.remove) for one in asked] == [
        (False, "", False), (True, "", False), (True, "acme", True), (True, "trial", False)
    ]  # fmt: skip
    assert "expected bytes" in complaint(shoal("store", "quota", "set", "much"), 2)


@pytest.mark.parametrize(
    ("given", "bytes_"),
    [("0", 0), ("1048576", 1 << 20), ("500MiB", 500 << 20), ("20GB", 20 * 10**9), ("2G", 2 << 30), ("1.5KiB", 1536),
     ("3 TiB", 3 << 40)],
)  # fmt: skip
def test_sizes(given: str, bytes_: int) -> None:
    assert amounts.size(given, "BYTES") == bytes_


@pytest.mark.parametrize("given", ["", "x", "-1", "1PB", "1e9", "1,5GB", "GB", "1.2.3", "१", "9" * 30])
def test_invalid_sizes_are_rejected(given: str) -> None:
    with pytest.raises(InvalidArgument, match="BYTES"):
        amounts.size(given, "BYTES")


@pytest.mark.parametrize("given", ["90m", "36h", "30d", "8w", "1s", "90s"])
def test_ages_are_parsed_and_formatted(given: str) -> None:
    assert amounts.span(amounts.age(given, "AGE")) == given


@pytest.mark.parametrize("given", ["", "d", "1", "-1d", "1.5d", "1y", "१d", "9999999999d"])
def test_invalid_ages_are_rejected(given: str) -> None:
    with pytest.raises(InvalidArgument, match="AGE"):
        amounts.age(given, "AGE")
