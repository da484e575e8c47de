"""`shoal logs --set-level` goes by what the node's page says of each process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shoal.cli import admin_page, log_levels
from shoal.errors import NotFound, Unavailable


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The logs of a node that has infer-0 and store-0; a log of infer-1 is left from an earlier start."""
    monkeypatch.setattr(log_levels, "_WAIT_S", 0.0)
    (tmp_path / "node.json").write_text(json.dumps({"admin": "127.0.0.1:1"}))
    (tmp_path / "logs").mkdir()
    return tmp_path / "logs"


def page(folder: Path, taken: dict[str, float | None], down: tuple[str, ...] = ()) -> str:
    """The page of processes whose files are this much older than the present one; None: they do not say."""
    now = (folder.parent / "log_levels.json").stat().st_mtime
    of = {name: f'{{service="{name.partition("-")[0]}",instance="{name}"}}' for name in (*taken, *down)}
    lines = [f"shoal_process_up{of[name]} {int(name not in down)}.0" for name in of]
    lines += [
        f"shoal_log_levels_time_seconds{of[name]} {now - age!r}" for name, age in taken.items() if age is not None
    ]
    return "\n".join(lines)


def set_debug(folder: Path) -> log_levels.Levels:
    return log_levels.set_levels(folder, None, ["envoy", "infer-0", "infer-1", "store-0"], "DEBUG", "", "10m")


def test_each_process_that_has_not_taken_the_level_is_named_with_the_reason(
    node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = [
        lambda: page(node, {"infer-0": 0.0, "store-0": 0.0}),
        lambda: page(node, {"infer-0": 0.0, "store-0": 3.0}),
        lambda: page(node, {"infer-0": 0.0, "store-0": None}),
        lambda: page(node, {"infer-0": 0.0}, down=("store-0",)),
    ]
    reasons = [
        "",
        "not in force: it answers, but",
        "unknown: a process of its version",
        "not in force: it does not answer",
    ]
    for made, reason in zip(pages, reasons, strict=True):
        monkeypatch.setattr(admin_page, "read", lambda *_, made=made, **__: made())
        found = set_debug(node)
        if not reason:
            assert (found.in_force, found.not_in_force) == (["infer-0", "store-0"], [])
            continue
        (one,) = found.not_in_force
        assert (found.in_force, one.process) == (["infer-0"], "store-0")
        assert one.reason.startswith(reason)
        assert found.summary.splitlines()[1:] == [f"store-0: {one.reason}", f"        {one.command}"]


def test_without_an_answer_of_the_node_it_is_not_known(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object, **__: object) -> str:
        raise Unavailable("nobody listens")

    monkeypatch.setattr(admin_page, "read", away)
    found = set_debug(node)
    assert (found.in_force, [one.process for one in found.not_in_force]) == ([], ["infer-0", "infer-1", "store-0"])
    assert {one.reason.partition(";")[0] for one in found.not_in_force} == {"unknown: nobody listens"}


def test_a_process_that_the_node_does_not_have_is_refused(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin_page, "read", lambda *_, **__: page(node, {"infer-0": 0.0}))
    with pytest.raises(NotFound, match="no process infer-1: there are infer-0"):
        log_levels.set_levels(node, ["infer-1"], ["infer-1"], "DEBUG", "", "10m")
