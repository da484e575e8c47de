"""Sequences through a node's gateway, from an unmodified tritonclient: to one replica each, until it is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.infer.conformance import served_models

pytestmark = [pytest.mark.node, pytest.mark.timeout(300)]

START_IT = "must specify the START flag on the first request of the sequence"

Ask = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def with_steps(running: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The node, with the model steps on it."""
    models = served_models.write(tmp_path_factory.mktemp("models") / "models")
    config = models / "steps/config.pbtxt"
    config.write_text(config.read_text().replace("direct { }", "oldest { max_candidate_sequences: 64 }"))
    running.shoal("models", "push", str(models / "steps"))
    return running


@pytest.fixture
def ask(with_steps: Any, repository_root: Path) -> Iterator[Ask]:
    """`ask(step, ...)`, `ask(stream=[step, ...])`: what the client was told."""
    yield from _client(with_steps, repository_root)


@pytest.fixture
def ask_http(with_steps: Any, repository_root: Path) -> Iterator[Ask]:
    """`ask`, over REST."""
    yield from _client(with_steps, repository_root, "http")


def _client(with_steps: Any, repository_root: Path, *more: str) -> Iterator[Ask]:
    python = repository_root / ".venv-tritonclient/bin/python"
    if not python.exists():
        pytest.fail("tritonclient has an environment of its own: run `make test`")
    script = Path(__file__).parent / "foreign/tritonclient_sequences.py"
    command = [python, script, with_steps.gateway, *more]
    client = subprocess.Popen(command, stdin=-1, stdout=-1, stderr=sys.stderr, text=True)
    assert client.stdin
    assert client.stdout

    def send(*steps: dict[str, Any], stream: list[dict[str, Any]] | None = None) -> list[Any]:
        client.stdin.write(json.dumps(list(steps) if stream is None else {"stream": stream}) + "\n")
        client.stdin.flush()
        line = client.stdout.readline()
        assert line, f"the client ended with {client.wait()}"
        answer: list[Any] = json.loads(line)
        return answer

    yield send
    client.stdin.close()
    client.wait(30)
    client.stdout.close()


def step(id: int, x: float = 1, *, start: bool = False, end: bool = False) -> dict[str, Any]:
    return {"id": id, "x": x, "start": start, "end": end}


def test_each_sequence_has_one_replica_and_its_own_state(ask: Ask) -> None:
    ids = range(1, 13)
    replicas = {}
    for n in range(1, 6):
        answers = ask(*(step(id, id, start=n == 1, end=n == 5) for id in ids))
        assert [answer["total"] for answer in answers] == [n * id for id in ids]
        for id, answer in zip(ids, answers, strict=True):
            assert replicas.setdefault(id, answer["replica"]) == answer["replica"]
    assert set(replicas.values()) == {"local/infer-0", "local/infer-1"}, "they are spread"
    ((code, message),) = ask(step(1))
    assert (code, START_IT in message) == ("StatusCode.INVALID_ARGUMENT", True)


def test_each_sequence_has_one_replica_over_rest_too(ask: Ask, ask_http: Ask) -> None:
    """Steps over gRPC and REST may alternate."""
    ids = [*range(301, 313), 2**31, 2**45]
    replicas: dict[int, str] = {}
    for n in range(1, 7):
        send = ask if n in (2, 5) else ask_http
        answers = send(*(step(id, 1, start=n == 1, end=n == 6) for id in ids))
        assert not [answer for answer in answers if isinstance(answer, list)], n
        assert [answer["total"] for answer in answers] == [n] * len(ids)
        for id, answer in zip(ids, answers, strict=True):
            assert replicas.setdefault(id, answer["replica"]) == answer["replica"], (id, n)
    assert set(replicas.values()) == {"local/infer-0", "local/infer-1"}, "they are spread"
    (refused,) = ask_http(step(320))
    assert START_IT in refused[1]


def test_streams(ask: Ask) -> None:
    steps = [step(id, 1, start=n == 1, end=n == 10) for n in range(1, 11) for id in (101, 102, 103)]
    answers = ask(stream=steps)
    assert [answer["total"] for answer in answers] == [n for n in range(1, 11) for _ in range(3)]
    refused, good = ask(stream=[step(104), step(104, 5, start=True, end=True)])
    assert START_IT in refused[1]
    assert good["total"] == 5


def test_a_lost_replica_ends_its_sequences_and_no_others(running: Any, ask: Ask) -> None:
    ids = range(201, 217)
    homes = dict(zip(ids, (a["replica"] for a in ask(*(step(id, id, start=True) for id in ids))), strict=True))
    lost = homes[ids[0]]
    others = [id for id in ids if homes[id] != lost]
    assert others, "all are in one replica"
    name = lost.partition("/")[2]
    pid = running.kill(name)
    for id in ids:
        if homes[id] != lost:
            assert ask(step(id, id)) == [{"total": 2 * id, "replica": homes[id]}]
            continue
        ((code, message),) = ask(step(id, id))
        while code == "StatusCode.UNAVAILABLE":  # It was on its way when the replica died: nobody may say how far.
            ((code, message),) = ask(step(id, id))
        assert code == "StatusCode.INVALID_ARGUMENT", message
        assert START_IT in message
        assert "the replica that had it was lost: start it again" in message
    again = ask(*(step(id, 1, start=True, end=True) for id in ids if homes[id] == lost))
    assert {answer["total"] for answer in again} == {1}, "they start again"
    running.wait_until_restarted(name, pid)
    answers = dict(zip(others, ask(*(step(id, id, end=True) for id in others)), strict=True))
    assert [answers[id]["total"] for id in others] == [3 * id for id in others]
