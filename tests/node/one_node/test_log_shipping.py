"""deploy/observability/logs: a real rsyslog ships the lines of a node, and the other configurations fit these lines."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.breakable import Process, until
from tests.node.conftest import Node
from tests.rsyslog_binary import find_rsyslog
from tests.test_layers import ROOT
from tools.logs_table import calls

pytestmark = [pytest.mark.node, pytest.mark.timeout(240)]

FOLDER = ROOT / "deploy/observability/logs"
WAIT_S = 120.0
ECS = {
    "time": "@timestamp",
    "level": "log.level",
    "logger": "log.logger",
    "message": "message",
    "instance": "service.node.name",
    "event": "event.action",
    "trace_id": "trace.id",
    "span_id": "span.id",
    "error": "error.message",
    "exception": "error.stack_trace",
}
"""ECS name of each field that has one; the others are in `shoal`."""


class Elasticsearch(ThreadingHTTPServer):
    """`_bulk` as Elastic documents it: 201 for a new id, 409 for a known one. The first request gets no answer."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Bulk)
        self.requests = 0
        self.unanswered: list[str] = []
        self.documents: dict[str, dict[str, Any]] = {}
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def bulk(self, lines: list[str]) -> dict[str, Any] | None:
        actions, sources = lines[::2], lines[1::2]
        ids = [json.loads(action)["create"]["_id"] for action in actions]
        assert {json.loads(action)["create"]["_index"] for action in actions} == {"logs-shoal-default"}
        self.requests += 1
        if self.requests == 1:
            self.unanswered = ids
            return None
        items = []
        for id_, source in zip(ids, sources, strict=True):
            is_new = id_ not in self.documents
            if is_new:
                self.documents[id_] = json.loads(source)
            created = {"_version": 1, "result": "created", "_seq_no": 0, "_primary_term": 1, "status": 201}
            conflict = {"status": 409, "error": {"type": "version_conflict_engine_exception", "reason": "exists"}}
            item = {"_index": ".ds-logs-shoal-default-2026.12.01-000001", "_id": id_}
            items.append({"create": {**item, **(created if is_new else conflict)}})
        has_errors = any(item["create"]["status"] != 201 for item in items)
        return {"took": 30, "errors": has_errors, "items": items}


class Bulk(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Elasticsearch

    def do_GET(self) -> None:
        self._answer({})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        assert (self.path, self.headers.get_content_type()) == ("/_bulk", "application/json")
        # The end of the last line is doubled.
        assert body.endswith("\n")
        document = self.server.bulk(body.rstrip("\n").split("\n"))
        if document is None:
            self.close_connection = True
        else:
            self._answer(document)

    def _answer(self, document: dict[str, Any]) -> None:
        body = json.dumps(document).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def elasticsearch() -> Iterator[Elasticsearch]:
    with Elasticsearch() as server:
        thread = threading.Thread(target=server.serve_forever, name="elasticsearch")
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def lines_of(node: Node) -> list[tuple[str, str]]:
    """Each line of the node's logs, with its path. rsyslog escapes control characters: such lines are left out."""
    return [
        (str(path), line)
        for path in sorted(node.data_dir.glob("logs/*.log"))
        for line in path.read_text().split("\n")[:-1]
        if line.strip() and not re.search(r"[\x00-\x1f\x7f]", line)
    ]


def is_ours(line: str) -> bool:
    return line.startswith("{") and "instance" in json.loads(line)


def expected(path: str, line: str) -> dict[str, Any]:
    """The document of a line, without the host, and without the time of lines that are not ours."""
    common = {"ecs.version": "8.11.0", "log.file.path": path}
    if not is_ours(line):
        return {**common, "message": line, "service.name": re.split(r"[-.]", Path(path).name)[0]}
    fields = json.loads(line)
    named = {ecs: fields.get(name) for name, ecs in ECS.items()}
    service = fields["instance"].partition("/")[2].partition("-")[0]
    values = {name: value for name, value in fields.items() if name not in ECS}
    return {**common, **named, "log.level": fields["level"].lower(), "service.name": service, "shoal": values}


def seen(document: dict[str, Any]) -> str:
    """A document in the form of `expected`, to be counted."""
    left_out = {"host.name"} if "service.node.name" in document else {"host.name", "@timestamp"}
    return json.dumps({name: value for name, value in document.items() if name not in left_out}, sort_keys=True)


def mapped() -> set[str]:
    """The names of fields in the index template."""

    def names(properties: dict[str, Any], prefix: str = "") -> Iterator[str]:
        for name, of in properties.items():
            if "properties" in of:
                yield from names(of["properties"], f"{prefix}{name}.")
            else:
                yield prefix + name

    template = json.loads((FOLDER / "elasticsearch-template.json").read_text())
    return {*names(template["template"]["mappings"]["properties"])}


def test_rsyslog_ships_every_line_of_a_node_once_with_ecs_names(
    running: Node, elasticsearch: Elasticsearch, tmp_path: Path
) -> None:
    if (rsyslog := find_rsyslog()) is None:
        pytest.skip("no rsyslog with its output for Elasticsearch: run tools/rsyslog.sh")
    command, variables = rsyslog
    text = (FOLDER / "rsyslog.conf").read_text()
    for place, value in (
        ("DATA_DIR", str(running.data_dir)),
        ("/var/spool/rsyslog", str(tmp_path)),
        ("http://127.0.0.1:9200", elasticsearch.url),
    ):
        assert place in text
        text = text.replace(place, value)
    (tmp_path / "rsyslog.conf").write_text(text)
    wanted = Counter(seen(expected(path, line)) for path, line in lines_of(running))
    argv = [*command, "-n", "-f", str(tmp_path / "rsyslog.conf"), "-i", str(tmp_path / "rsyslog.pid")]
    with Process(argv, tmp_path / "rsyslog.log", variables) as process:
        missing = lambda: wanted - Counter(seen(each) for each in [*elasticsearch.documents.values()])  # noqa: E731
        asyncio.run(until(lambda: not missing(), "every line was shipped", WAIT_S, every_s=0.5))
        process.terminate(WAIT_S)
    documents = [*elasticsearch.documents.values()]
    assert {name for document in documents for name in document} == mapped()
    assert {"service.serving", "policy.in_force"} & {document.get("event.action") for document in documents}
    assert {"infer", "store", "ingest", "coord", "mongod"} <= {document["service.name"] for document in documents}
    # Those of the request without an answer were sent again, under the same ids.
    assert elasticsearch.unanswered
    assert {*elasticsearch.unanswered} <= elasticsearch.documents.keys()
    # A line that is twice in a log is twice in the index; no other document is.
    got = Counter(seen(document) for document in documents)
    now = Counter(seen(expected(path, line)) for path, line in lines_of(running))
    assert not Counter({text: count for text, count in got.items() if text in wanted}) - now


def test_the_configuration_of_otelcol_fits_the_lines_of_a_node(running: Node) -> None:
    receiver = yaml.safe_load((FOLDER / "otelcol.yaml").read_text())["receivers"]["filelog"]
    assert receiver["include"] == ["DATA_DIR/logs/*.log"]
    by_type = {operator["type"]: operator for operator in receiver["operators"]}
    condition = re.fullmatch(r"body matches (\".*\")", by_type["json_parser"]["if"])
    assert condition is not None
    pattern = re.compile(json.loads(condition[1]))
    lines = lines_of(running)
    assert [bool(pattern.search(line)) for _, line in lines] == [is_ours(line) for _, line in lines]
    check_paths(by_type["regex_parser"]["regex"], lines)
    severities = {*by_type["json_parser"]["severity"]["mapping"].values()}
    ours = [json.loads(line) for _, line in lines if is_ours(line)]
    assert {line["level"] for line in ours} <= severities
    assert by_type["json_parser"]["timestamp"]["layout"] == "2006-01-02T15:04:05.000Z"
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"]) for line in ours)
    used = re.findall(r"attributes\.(\w+)", (FOLDER / "otelcol.yaml").read_text())
    assert {*used} - {"service", "process"} <= {*ECS}


def test_the_configuration_of_promtail_fits_the_lines_of_a_node(running: Node) -> None:
    [job] = yaml.safe_load((FOLDER / "promtail.yaml").read_text())["scrape_configs"]
    stages = {name: stage for each in job["pipeline_stages"] for name, stage in each.items()}
    check_paths(stages["regex"]["expression"], lines_of(running))
    read = stages["json"]["expressions"]
    of_events = {name for call in calls() for name in call.fields}
    assert {*read.values()} <= {*ECS} | of_events
    assert {*stages["labels"], *stages["structured_metadata"]} <= {*read, "process"}
    assert stages["timestamp"]["source"] in read


def check_paths(expression: str, lines: list[tuple[str, str]]) -> None:
    """Each log's path gives the name of its process."""
    for path in {path for path, _ in lines}:
        found = re.search(expression, path)
        assert found is not None
        assert found["process"] == Path(path).stem
