"""The commands that talk to a node, against a server that answers as a test tells it."""

from __future__ import annotations

import errno
import http.server
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration

from shoal.client.transport import methods
from shoal.coord.v1 import coord_pb2 as coord
from shoal.inference.v2 import inference_pb2 as oip
from shoal.ingest.v1 import ingest_pb2 as ingest
from shoal.store.v1 import store_pb2 as store
from tests.cli.conftest import Shoal
from tests.client.served import Served

GROUPS = (("models",), ("jobs",), ("tenants",), ("results",), ("store",), ("store", "retention"), ("store", "quota"))
"""Commands that only hold others: these have the examples."""


def complaint(done: subprocess.CompletedProcess[str], status: int = 1) -> str:
    """The one line on standard error of a command that failed."""
    assert done.returncode == status, done.stderr
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


async def metadata(request: Any, context: Any) -> Any:
    if request.name != "m":
        await context.abort(grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{request.name}' is not found")
    answer = oip.ModelMetadataResponse(name="m", versions=["1"], platform="onnxruntime_onnx")
    answer.inputs.add(name="x", datatype="FP32", shape=[-1, 2])
    return answer


async def echo(request: Any, context: Any) -> Any:
    answer = oip.ModelInferResponse(model_name=request.model_name, model_version="1", id=request.id)
    for tensor in request.inputs:
        answer.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
    answer.raw_output_contents.extend(request.raw_input_contents)
    for key, value in request.parameters.items():
        answer.parameters[key].CopyFrom(value)
    return answer


@pytest.fixture
def model(served: Served) -> Served:
    served.on(methods.MODEL_METADATA, metadata)
    served.on(methods.MODEL_INFER, echo)
    return served


def data_of(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stderr
    [output] = json.loads(done.stdout)["outputs"]
    assert output["datatype"] == "FP32"
    return output["data"]


@pytest.mark.parametrize(
    "written",
    [
        '{"x": [[1, 2]]}',
        '{"x": [1, 2]}',
        "[[1, 2]]",
        "[1, 2]",
        '{"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}]}',
        ' {"inputs": [{"name": "x", "data": [[1, 2]]}], "parameters": {"a": 1}, "id": "q"}',
    ],
)
def test_infer_takes_json_in_every_form(shoal: Shoal, model: Served, written: str) -> None:
    assert data_of(shoal("infer", "m", written, "--json")) == [[1, 2]]


def test_infer_takes_files_and_standard_input(shoal: Shoal, model: Served, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"x": [[1, 2]]}')
    np.save(tmp_path / "a.npy", np.float64([[1, 2]]))
    np.savez(tmp_path / "a.npz", x=np.int8([[1, 2]]))
    for name in ("a.json", "a.npy", "a.npz"):
        assert data_of(shoal("infer", "m", name, "--json")) == [[1, 2]]
        assert data_of(shoal("infer", "m", "-", "--json", stdin=(tmp_path / name).read_bytes())) == [[1, 2]]


def test_infer_prints_a_table_and_writes_files(shoal: Shoal, model: Served, tmp_path: Path) -> None:
    done = shoal("infer", "m", "[1, 2.5]", "-p", "explain=true", "-p", "n=7", "-p", "s=text", "-o", "out.npz")
    assert done.returncode == 0, done.stderr
    assert "FP32" in done.stdout
    assert "[[1.  2.5]]" in done.stdout
    assert "m version 1, explain True, n 7, s text" in done.stdout
    np.testing.assert_array_equal(np.load(tmp_path / "out.npz")["x"], np.float32([[1, 2.5]]))
    assert shoal("infer", "m", "[1, 2.5]", "-o", "out.npy").returncode == 0
    assert shoal("infer", "m", "[1, 2.5]", "-o", "out.json").returncode == 0
    assert json.loads((tmp_path / "out.json").read_text())["outputs"][0]["data"] == [[1.0, 2.5]]
    assert "cannot write" in shoal("infer", "m", "[1, 2]", "-o", "no/where.npz").stderr


@pytest.mark.parametrize(
    ("written", "status", "words"),
    [
        ('{"x": [[1, 2]', 2, "INPUT is not JSON"),
        ("[" * 100_000, 2, "INPUT is not JSON"),
        ('{"y": [[1, 2]]}', 2, "m has no input 'y': it takes x FP32 [-1, 2]"),
        ('{"x": [[1, "a"]]}', 2, "input 'x'"),
        ('{"x": [[1, 2], [3]]}', 2, "rows must have equal lengths"),
        ('{"x": {"b64": "!"}}', 2, "b64"),
        ('{"x": null}', 2, "input 'x'"),
        ('{"inputs": [{"name": "x"}]}', 2, "input 'x' has no `data`"),
        (
            '{"inputs": [{"name": "x", "shape": [3], "data": [1, 2]}]}',
            2,
            "2 elements of data do not have the shape [3]",
        ),
        ('{"inputs": [{"name": "x", "shape": "a", "data": [1, 2]}]}', 2, "do not have the shape a"),
        ('{"inputs": [{"name": "x", "data": [[1, 2]], "datatype": "FP8"}]}', 2, "no datatype 'FP8'"),
        ('{"inputs": [{"name": "x", "data": [[1, 2]]}], "outputs": ["y"]}', 2, "expected `outputs` to be"),
        ('{"inputs": [{"name": "x", "data": [[1, 2]]}], "parameters": {"p": {}}}', 2, "parameter 'p'"),
        ("nothing.json", 1, "nothing.json: no such file"),
        ("image.bin", 2, "image.bin: neither JSON nor .npy nor .npz"),
        ("broken.npz", 2, "broken.npz: NumPy cannot read it"),
        ("pickle.npy", 2, "pickle.npy: NumPy cannot read it"),
        (".", 2, "cannot read ."),
    ],
)
def test_bad_input_is_one_clear_line(
    shoal: Shoal, model: Served, tmp_path: Path, written: str, status: int, words: str
) -> None:
    (tmp_path / "image.bin").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 no zip")
    np.save(tmp_path / "pickle.npy", np.array([{}]), allow_pickle=True)
    stdin = written.encode() if len(written) > 1000 else b""
    assert words in complaint(shoal("infer", "m", "-" if stdin else written, stdin=stdin), status).replace(
        "standard input", "INPUT"
    )


def test_an_error_of_the_node_is_one_clear_line(shoal: Shoal, model: Served) -> None:
    assert "unknown model: 'other'" in complaint(shoal("infer", "other", "[1]"))
    assert "no node responds at 127.0.0.1:1: start one with `shoal up`" in complaint(
        shoal("models", "list", "--gateway", "127.0.0.1:1")
    )
    nowhere = shoal("models", "list", SHOAL_GATEWAY="", TMPDIR="/nowhere")
    assert "no node is running on this machine" in complaint(nowhere)
    assert "--gateway='nowhere'" in complaint(shoal("models", "list", "--gateway", "nowhere"), 2)


@pytest.mark.parametrize("command", [("doctor",), ("logs",), ("support", "bundle")])
def test_without_a_node_a_command_says_how_it_looks_at_one_that_has_stopped(
    shoal: Shoal, tmp_path: Path, command: tuple[str, ...]
) -> None:
    said = complaint(shoal(*command, SHOAL_GATEWAY="", TMPDIR="/nowhere", XDG_DATA_HOME=str(tmp_path)))
    assert said.endswith(f"Of a node that has stopped: shoal {' '.join(command)} --data-dir {tmp_path}/shoal")


def test_a_bundle_of_a_node_that_does_not_answer_says_so(shoal: Shoal, tmp_path: Path) -> None:
    done = shoal("support", "bundle", "--gateway", "127.0.0.1:1", "-o", str(tmp_path / "b.tgz"))
    assert done.stderr.startswith("not in it: status: no node responds at 127.0.0.1:1")


def test_an_admin_address_that_nobody_listens_at_is_said_in_words(shoal: Shoal) -> None:
    assert complaint(shoal("top", "--once", "--admin", "127.0.0.1:1")).endswith("/metrics: Connection refused")


@pytest.mark.parametrize(
    "args",
    [
        (),
        ("models",),
        ("models", "push"),
        ("models", "list"),
        ("models", "remove"),
        ("models", "alias"),
        ("infer",),
        ("jobs",),
        ("jobs", "submit"),
        ("jobs", "get"),
        ("jobs", "list"),
        ("jobs", "watch"),
        ("jobs", "cancel"),
        ("jobs", "result"),
        ("tenants",),
        ("tenants", "list"),
        ("tenants", "set"),
        ("tenants", "show"),
        ("results",),
        ("results", "list"),
        ("results", "show"),
        ("results", "export"),
        ("store",),
        ("store", "usage"),
        ("store", "retention"),
        ("store", "retention", "list"),
        ("store", "retention", "set"),
        ("store", "retention", "remove"),
        ("store", "quota"),
        ("store", "quota", "set"),
        ("store", "quota", "remove"),
        ("status",),
    ],
)
def test_every_command_has_help_with_an_example(shoal: Shoal, args: tuple[str, ...]) -> None:
    done = shoal(*args, "--help")
    assert done.returncode == 0, done.stderr
    if args not in GROUPS:
        assert f"shoal {' '.join(args)}".strip() in done.stdout.partition("Example" if args else "First steps")[2]


@pytest.mark.parametrize("command", ["list", "watch"])
def test_jobs_without_a_tenant_option(shoal: Shoal, command: str) -> None:
    words = " ".join(shoal("jobs", command, "--help").stdout.replace("\u2502", " ").split())
    assert "--tenant NAME Only jobs of this tenant. Default: all." in words


def test_a_wrong_option_is_a_usage_error(shoal: Shoal) -> None:
    assert shoal("models", "list", "--nonsense").returncode == 2
    assert shoal("jobs", "get").returncode == 2
    assert "KEY=VALUE" in complaint(shoal("jobs", "submit", "m", "[1]", "--label", "x"), 2)
    assert "or --remove" in complaint(shoal("models", "alias", "m", "stable"), 2)


def version(**fields: Any) -> store.ModelVersion:
    return store.ModelVersion(
        name="m", version=1, files=[store.ModelFile(path="model.onnx", size_bytes=2048)], **fields
    )


def test_models_list_remove_and_alias(shoal: Shoal, served: Served) -> None:
    async def listed(request: Any, context: Any) -> Any:
        return store.ListModelsResponse(models=[version(aliases=["stable"], labels={"by": "ada"})])

    async def removed(request: Any, context: Any) -> Any:
        if request.name != "m":
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no model {request.name!r}")
        return store.RemoveModelResponse(removed=[version()])

    async def aliased(request: Any, context: Any) -> Any:
        return store.SetAliasResponse(model=version() if request.version else None)

    served.on(methods.LIST_MODELS, listed)
    served.on(methods.REMOVE_MODEL, removed)
    served.on(methods.SET_ALIAS, aliased)
    table = shoal("models", "list").stdout
    assert all(word in table for word in ("m", "stable", "2.0 KiB", "by=ada"))
    [entry] = json.loads(shoal("models", "list", "--json").stdout)
    assert (entry["name"], entry["version"], entry["aliases"]) == ("m", 1, ["stable"])
    assert shoal("models", "remove", "m").stdout == "removed m version 1\n"
    assert "no model 'x'" in complaint(shoal("models", "remove", "x"))
    assert shoal("models", "alias", "m", "stable", "1").stdout == "m: stable is version 1\n"
    assert shoal("models", "alias", "m", "stable", "--remove").stdout == "m: stable is removed\n"


def test_a_push_of_another_file_is_an_error(shoal: Shoal, tmp_path: Path) -> None:
    (tmp_path / "m.bmp").touch()
    assert "expected a .onnx file" in complaint(shoal("models", "push", "m.bmp"), 2)
    (tmp_path / "m.pt").touch()
    assert "torch.export.save(program, 'model.pt2')" in complaint(shoal("models", "push", "m.pt"), 2)
    assert "no such file or folder" in complaint(shoal("models", "push", "n.onnx"))


def job(state: int, **fields: Any) -> ingest.Job:
    steps = [
        ingest.Transition(state=number, attempt=number - 1, reason=f"why{number}") for number in range(1, state + 1)
    ]
    return ingest.Job(id="J1", state=state, model_name="m", transitions=steps, **fields)  # type: ignore[arg-type]


def test_jobs(shoal: Shoal, model: Served) -> None:
    taken: list[ingest.SubmitRequest] = []

    async def submit(request: Any, context: Any) -> Any:
        taken.append(request)
        return ingest.SubmitResponse(job=job(1))

    async def get(request: Any, context: Any) -> Any:
        return ingest.GetJobResponse(job=job(2, labels={"a": "b"}))

    async def listed(request: Any, context: Any) -> Any:
        return ingest.ListJobsResponse(jobs=[job(2)])

    async def watch(request: Any, context: Any) -> Any:
        for state in (1, 2, 3 if request.id == "J1" else 4):
            yield ingest.WatchJobResponse(job=job(state))

    async def cancel(request: Any, context: Any) -> Any:
        return ingest.CancelJobResponse(job=job(6))

    served = model
    served.on(methods.SUBMIT, submit)
    served.on(methods.GET_JOB, get)
    served.on(methods.LIST_JOBS, listed)
    served.on(methods.WATCH_JOB, watch, "unary_stream")
    served.on(methods.CANCEL_JOB, cancel)
    done = shoal("jobs", "submit", "m", "[1, 2]", "--key", "k", "--tenant", "t", "--deadline", "60", "--label", "a=b")
    assert done.stdout == "J1\n", done.stderr
    [request] = taken
    assert (request.idempotency_key, request.tenant, request.deadline.seconds) == ("k", "t", 60)
    assert request.request.inputs[0].datatype == "FP32"
    assert list(request.request.inputs[0].shape) == [1, 2]
    shown = shoal("jobs", "get", "J1").stdout
    assert all(word in shown for word in ("J1", "running", "a=b", "why2"))
    assert json.loads(shoal("jobs", "get", "J1", "--json").stdout)["state"] == "running"
    assert "running" in shoal("jobs", "list", "--state", "running").stdout
    assert "state 'odd': use one of" in complaint(shoal("jobs", "list", "--state", "odd"), 2)
    done = shoal("jobs", "watch", "J1")
    assert (done.returncode, [line.split()[1] for line in done.stdout.splitlines()]) == (
        0,
        ["queued", "running", "succeeded"],
    )
    done = shoal("jobs", "watch", "J2", "--json")
    assert done.returncode == 1
    assert [json.loads(line)["state"] for line in done.stdout.splitlines()] == ["queued", "running", "failed"]
    assert shoal("jobs", "cancel", "J1").stdout == "J1 is cancelled\n"


@pytest.mark.parametrize(
    "options",
    [
        ("submit", "m", '{"x": [[1]]}', "--deadline", "nan"),
        ("submit", "m", '{"x": [[1]]}', "--delay", "inf"),
        ("submit", "m", '{"x": [[1]]}', "--not-before", "0001-01-01T00:00:00+0500"),
        ("dead", "list", "--older-than", "inf"),
    ],
)
def test_an_invalid_time_is_one_clear_line(shoal: Shoal, model: Served, options: tuple[str, ...]) -> None:
    assert complaint(shoal("jobs", *options), 2).startswith("shoal: ")


def test_control_characters_are_escaped(shoal: Shoal, served: Served) -> None:
    async def get(request: Any, context: Any) -> Any:
        return ingest.GetJobResponse(job=job(4, tenant="\x1b[2Jacme", labels={"a\x9b": "\x1b]0;mine\x07"}))

    async def lost(request: Any, context: Any) -> Any:
        await context.abort(grpc.StatusCode.NOT_FOUND, "no \x1b[31mjob")

    served.on(methods.GET_JOB, get)
    shown = shoal("jobs", "get", "a").stdout
    assert not {"\x1b", "\x07", "\x9b"} & {*shown}
    assert r"\x1b[2Jacme" in shown
    served.on(methods.GET_JOB, lost)
    assert complaint(shoal("jobs", "get", "a")) == r"shoal: no \x1b[31mjob"


def test_an_id_is_not_split_in_a_narrow_terminal(shoal: Shoal, served: Served) -> None:
    made = job(4, last_message="one thing and another " * 5)
    made.id = "01JD8Y3V5M2Q4R6T8W0X2Z4B6D"

    async def jobs(request: Any, context: Any) -> Any:
        return ingest.ListJobsResponse(jobs=[made])

    served.on(methods.LIST_JOBS, jobs)
    shown = shoal("jobs", "list", COLUMNS="60", FORCE_COLOR="1", TTY_COMPATIBLE="1").stdout
    assert made.id in shown
    assert "one thing and another one thing" not in shown, "it was as wide as it liked"


def test_a_full_disk_is_one_clear_line(shoal: Shoal, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def jobs(request: Any, context: Any) -> Any:
        return ingest.ListJobsResponse()

    served.on(methods.LIST_JOBS, jobs)
    monkeypatch.setattr("shoal.cli.jobs.show_json", full)
    assert "No space left on device" in complaint(shoal("jobs", "list", "--json"))


def test_job_results(shoal: Shoal, served: Served) -> None:
    async def found(request: Any, context: Any) -> Any:
        result = store.Result(job_id=request.job_id, outcome=store.Result.OUTCOME_FAILED, code=3, message="bad x")
        if request.job_id == "good":
            response = oip.ModelInferResponse(model_name="m", model_version="1")
            response.outputs.add(name="t", datatype="BYTES", shape=[2])
            response.raw_output_contents.append(b"\2\0\0\0hi\1\0\0\0\xff")
            result = store.Result(job_id="good", outcome=store.Result.OUTCOME_SUCCEEDED, response=response)
        return store.GetResultResponse(result=result)

    served.on(methods.GET_RESULT, found)
    assert json.loads(shoal("jobs", "result", "good", "--json").stdout)["outputs"][0]["data"] == ["hi", {"b64": "/w=="}]
    assert "hi" in shoal("jobs", "result", "good").stdout
    # The job's request was wrong; the command was not.
    assert "job bad failed: bad x" in shoal("jobs", "result", "bad").stderr


CLUSTERS = {
    "cluster_statuses": [
        {
            "name": "infer",
            "host_statuses": [
                {
                    "address": {"pipe": {"path": "/run/infer-0.sock"}},
                    "stats": [{"name": "rq_total", "value": "12"}, {"type": "GAUGE", "name": "rq_active"}],
                    "health_status": {"eds_health_status": "HEALTHY"},
                },
                {
                    "address": {"socket_address": {"address": "10.0.0.1", "port_value": 15006}},
                    "health_status": {"failed_active_health_check": True, "eds_health_status": "DRAINING"},
                },
            ],
        },
        {"name": "empty"},
    ]
}


@pytest.fixture
def admin() -> Iterator[str]:
    """An admin listener that answers as Envoy does."""

    class Admin(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == "/clusters?format=json"
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(CLUSTERS).encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Admin)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_status(shoal: Shoal, served: Served, admin: str) -> None:
    async def instances(request: Any, context: Any) -> Any:
        ready = coord.ReadyModel(name="m", versions=[1, 2])
        one = coord.Instance(service="infer", name="local/infer-0", state=coord.INSTANCE_STATE_READY, models=[ready])
        return coord.ListInstancesResponse(instances=[one], revision=7)

    async def leader(request: Any, context: Any) -> Any:
        await context.abort(grpc.StatusCode.UNAVAILABLE, "an election is under way")

    async def mesh(request: Any, context: Any) -> Any:
        refused = coord.ResourceStatus(type="Listener", nack="no such filter")
        return coord.GetMeshStatusResponse(envoys=[coord.EnvoyStatus(node="local", resources=[refused])])

    async def models(request: Any, context: Any) -> Any:
        return store.ListModelsResponse(models=[version()])

    served.on(methods.LIST_INSTANCES, instances)
    served.on(methods.GET_LEADER, leader)
    served.on(methods.GET_MESH_STATUS, mesh)
    served.on(methods.LIST_MODELS, models)
    done = shoal("status", "--admin", admin)
    assert done.returncode == 0, done.stderr
    for words in ("local/infer-0", "ready", "m 1/2", "none at present", "no such filter", "an election is under way"):
        assert words in done.stdout
    assert "unix:/run/infer-0.sock" in done.stdout
    assert "draining, failed active health check" in done.stdout
    document = json.loads(shoal("status", "--admin", admin, "--json").stdout)
    assert document["healthy"] is False
    assert [e["healthy"] for e in document["envoy"]["endpoints"]] == [False, True]
    assert document["instances"][0]["models"] == {"m": [1, 2]}
    done = shoal("status", "--admin", "127.0.0.1:1")
    assert (done.returncode, "admin address 127.0.0.1:1 of the node does not answer" in done.stdout) == (0, True)
    assert "no node responds" in complaint(shoal("status", "--gateway", "127.0.0.1:1"))


def test_connectors_that_the_caller_may_not_see_are_no_problem_of_the_node(
    shoal: Shoal, served: Served, admin: str
) -> None:
    async def instances(request: Any, context: Any) -> Any:
        one = coord.Instance(service="ingest", name="local/ingest-0", state=coord.INSTANCE_STATE_READY)
        return coord.ListInstancesResponse(instances=[one], revision=7)

    async def leader(request: Any, context: Any) -> Any:
        return coord.GetLeaderResponse(instance="local/coord-0")

    async def mesh(request: Any, context: Any) -> Any:
        return coord.GetMeshStatusResponse()

    async def models(request: Any, context: Any) -> Any:
        return store.ListModelsResponse()

    async def connectors(request: Any, context: Any) -> Any:
        await context.abort(code, "RBAC: access denied")

    served.on(methods.LIST_INSTANCES, instances)
    served.on(methods.GET_LEADER, leader)
    served.on(methods.GET_MESH_STATUS, mesh)
    served.on(methods.LIST_MODELS, models)
    served.on(methods.LIST_CONNECTORS, connectors)
    code = grpc.StatusCode.PERMISSION_DENIED
    document = json.loads(shoal("status", "--admin", admin, "--json").stdout)
    assert (document["healthy"], document["problems"]) == (True, [])
    code = grpc.StatusCode.INTERNAL
    document = json.loads(shoal("status", "--admin", admin, "--json").stdout)
    assert (document["healthy"], document["problems"]) == (False, ["connectors: RBAC: access denied"])


def test_job_retention(shoal: Shoal, served: Served) -> None:
    asked: list[ingest.SetJobRetentionRequest] = []

    async def change(request: Any, context: Any) -> Any:
        asked.append(request)
        rule = ingest.JobRetention(tenant=request.tenant, state=request.state, batches=request.batches)
        if request.WhichOneof("how") == "keep":
            rule.keep.CopyFrom(request.keep)
        return ingest.SetJobRetentionResponse(rule=rule)

    async def listed(request: Any, context: Any) -> Any:
        rules = [
            ingest.JobRetention(tenant="*", batches=True, keep=Duration(seconds=30 * 86_400), inherited=True),
            ingest.JobRetention(tenant="acme", state=ingest.JOB_STATE_DEAD),
        ]
        return ingest.ListJobRetentionResponse(rules=rules)

    served.on(methods.SET_JOB_RETENTION, change)
    served.on(methods.LIST_JOB_RETENTION, listed)
    set_rule = ("jobs", "retention", "set")
    assert shoal(*set_rule, "batches", "90d", "--tenant", "acme").stdout == (
        "batches of tenant 'acme' are kept for 90d\n"
    )
    assert shoal(*set_rule, "dead", "forever").stdout == (
        "dead jobs of all tenants without their own rule are kept for ever\n"
    )
    assert [(one.batches, one.state, one.tenant) for one in asked] == [
        (True, 0, "acme"),
        (False, ingest.JOB_STATE_DEAD, "*"),
    ]
    assert "use one of" in (words := complaint(shoal(*set_rule, "odd", "1d"), 2))
    assert "or batches" in words
    table = shoal("jobs", "retention", "list").stdout
    assert all(word in table for word in ("batches", "30d", "the node's setting", "dead", "ever"))
    first, second = json.loads(shoal("jobs", "retention", "list", "--json").stdout)
    assert (first["state"], first["keep"], second["state"], second["keep"]) == ("batches", 2_592_000, "dead", None)
