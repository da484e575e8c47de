"""The worker for files that wait gets those and no others, and nothing is left undone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.test_layers import ROOT
from tests.worker_assignment import LONG, NODES, PATIENT, SLOW, TOGETHER, PatientScheduling, is_slow


class Worker:
    """What the scheduler sees of a worker."""

    def __init__(self, name: str) -> None:
        self.gateway = SimpleNamespace(id=name)
        self.shutting_down = False
        self.queue: list[int] = []

    def send_runtest_some(self, indices: list[int]) -> None:
        assert not self.shutting_down
        self.queue += indices

    def shutdown(self) -> None:
        self.shutting_down = True


def run(files: dict[str, int], workers: int, together: list[set[str]] | None = None) -> dict[str, list[str]]:
    """Return the tests of each worker, for `files` with so many tests each, when all take the same time.

    `together` gets the tests that run at the same time.
    """
    tests = [f"{file}::test_{n}" for file, count in files.items() for n in range(count)]
    config: Any = SimpleNamespace(
        getvalue=lambda name: ["popen"] * workers, option=SimpleNamespace(loadscopereorder=True)
    )
    scheduling = PatientScheduling(config)
    nodes: list[Any] = [Worker(f"gw{n}") for n in range(workers)]
    for node in nodes:
        scheduling.add_node(node)
    for node in nodes:
        scheduling.add_node_collection(node, tests)
    scheduling.schedule()
    ran: dict[str, list[str]] = {node.gateway.id: [] for node in nodes}
    # A worker begins a test only when it has the next one, or is to end.
    while able := [node for node in nodes if len(node.queue) > 1 or (node.queue and node.shutting_down)]:
        if together is not None:
            together.append({tests[node.queue[0]] for node in able})
        for node in able:
            index = node.queue.pop(0)
            ran[node.gateway.id].append(tests[index])
            scheduling.mark_test_complete(node, index)
    assert all(node.shutting_down for node in nodes)
    assert sorted(test for some in ran.values() for test in some) == sorted(tests)
    return ran


def files_of(tests: list[str]) -> list[str]:
    return list(dict.fromkeys(test.partition("::")[0] for test in tests))


def test_the_files_are_there() -> None:
    assert [file for file in PATIENT + LONG if not (ROOT / file).is_file() and file not in TOGETHER] == []
    assert [path for path in SLOW if not (ROOT / path).exists()] == []
    assert [path for path in TOGETHER + NODES if not (ROOT / path).is_dir()] == []
    assert len({*PATIENT, *LONG}) == len(PATIENT) + len(LONG)


def test_who_waits_runs_what_waits_and_the_long_files_come_first() -> None:
    others = {f"tests/test_{n}.py": n for n in range(1, 40)}
    ran = run({**others, **dict.fromkeys(PATIENT, 10), **dict.fromkeys(LONG, 10)}, workers=3)
    assert files_of(ran["gw2"]) == list(PATIENT)
    for name in ("gw0", "gw1"):
        is_long = [file in LONG for file in files_of(ran[name])]
        assert True in is_long
        assert is_long == sorted(is_long, reverse=True)


def test_what_waits_is_run_by_others_too_when_they_have_nothing_else() -> None:
    ran = run({"tests/test_a.py": 1, **dict.fromkeys(PATIENT, 10)}, workers=3)
    assert len(files_of(ran["gw0"] + ran["gw1"])) > 1


def test_one_worker_runs_a_folder_whose_files_share_servers() -> None:
    shared = [f"{folder}/test_{n}.py" for folder in TOGETHER for n in range(4)]
    ran = run({**{f"tests/test_{n}.py": 3 for n in range(4)}, **dict.fromkeys(shared, 5)}, workers=3)
    for folder in TOGETHER:
        assert len([name for name, tests in ran.items() if any(test.startswith(folder) for test in tests)]) == 1


def test_one_worker_at_a_time_runs_whole_nodes_and_the_others_everything_else() -> None:
    nodes = [f"{folder}test_{n}.py" for folder in NODES for n in range(3)]
    together: list[set[str]] = []
    ran = run({**{f"tests/test_{n}.py": 20 for n in range(20)}, **dict.fromkeys(nodes, 10)}, 3, together)
    assert max(sum(test.startswith(NODES) for test in some) for some in together) == 1
    assert [test.startswith(NODES) for test in ran["gw0"][:150]] == [True] * 150
    # Nobody is idle meanwhile.
    assert abs(len(ran["gw0"]) - len(ran["gw1"])) < 30


def test_whole_nodes_that_are_left_alone_are_run_at_the_same_time() -> None:
    ran = run({f"{NODES[0]}test_{n}.py": 10 for n in range(10)}, 3)
    assert [len(ran[name]) for name in ("gw0", "gw1")] == [50, 50]


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
@pytest.mark.parametrize("files", [{"tests/a.py": 1}, {PATIENT[0]: 1}, {f"tests/{n}.py": n for n in range(1, 5)}])
def test_every_test_is_run_once(files: dict[str, int], workers: int) -> None:
    run(files, workers)


def test_make_test_fast_leaves_out_what_waits_what_is_long_and_folders_that_are_slow() -> None:
    assert all(map(is_slow, (*PATIENT, *LONG, "tests/node", "tests/node/test_serve.py")))
    assert not any(map(is_slow, ("tests", "tests/infer", "tests/test_layers.py", "tests/node_of_another_name.py")))
