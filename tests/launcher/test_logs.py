"""Logs of a node: the formats of its processes, their order, selection, and following."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shoal.cli.main import app
from shoal.node.logs import Follower, LogFilter, latest, parse

EVERYTHING = LogFilter()


def ours(second: int, message: str, level: str = "INFO", **fields: object) -> str:
    return json.dumps({"time": f"2026-11-28T12:00:{second:02d}.000Z", "level": level, "message": message, **fields})


@pytest.mark.parametrize(
    ("line", "level", "logger", "summary"),
    [
        (ours(0, "serving", logger="services.app", jobs=3, instance="a"), "INFO", "services.app", "serving  jobs=3"),
        (
            ours(0, "at a:1", logger="a", event="service.serving", address="a:1"),
            "INFO",
            "a",
            "at a:1  event=service.serving",
        ),
        (ours(0, "no", "ERROR", exception="Traceback\n ...\nOSError: gone"), "ERROR", "", "no (OSError: gone)"),
        (
            '{"t":{"$date":"2026-11-28T12:00:00.000+00:00"},"s":"W","c":"NETWORK","msg":"slow","attr":{"ms":9}}',
            "WARNING",
            "NETWORK",
            "slow  ms=9",
        ),
        (
            '{"level":"warn","ts":"2026-11-28T12:00:00.000Z","caller":"a.go:1","msg":"tick","n":1}',
            "WARNING",
            "a.go:1",
            "tick  n=1",
        ),
    ],
)
def test_each_structured_format_is_read(line: str, level: str, logger: str, summary: str) -> None:
    entry = parse(line, "p")
    assert entry is not None
    assert entry.at == datetime(2026, 11, 28, 12, tzinfo=UTC)
    assert (entry.process, entry.level, entry.logger, entry.summary) == ("p", level, logger, summary)


def test_lines_of_envoy_and_of_go_have_the_machine_s_time() -> None:
    envoy = parse("[2026-11-28 12:00:00.250][77][critical][main] [server.cc:1] caught SIGTERM", "envoy")
    go = parse("WARNING: 2026/11/28 12:00:00 [core] refused", "etcd")
    local = datetime(2026, 11, 28, 12).astimezone()
    assert envoy is not None
    assert (envoy.level, envoy.logger, envoy.message) == ("ERROR", "main", "caught SIGTERM")
    assert (envoy.at - local).total_seconds() == 0.25
    assert go is not None
    assert (go.at, go.level, go.message) == (local, "WARNING", "[core] refused")


@pytest.mark.parametrize("line", ["", "Traceback:", "{", "[1, 2]", "{}", '{"time": "x", "level": "", "message": ""}'])
def test_other_lines_are_no_entry(line: str) -> None:
    assert parse(line, "p") is None


def test_entries_are_merged_by_time_and_foreign_lines_stay_with_theirs(tmp_path: Path) -> None:
    (tmp_path / "a.log.1").write_text(ours(1, "a1") + "\n")
    (tmp_path / "a.log").write_text("\n".join((ours(3, "a3"), "  line one", "  line two", ours(5, "a5"))))
    (tmp_path / "b.log").write_text("\n".join((ours(2, "b2"), ours(4, "b4"), "")))
    found = latest(tmp_path, ["a", "b", "none"], 100, EVERYTHING)
    assert [entry.message for entry in found] == ["a1", "b2", "a3\n  line one\n  line two", "b4", "a5"]
    assert [entry.message for entry in latest(tmp_path, ["a", "b"], 2, EVERYTHING)] == ["b4", "a5"]


def test_a_file_is_read_from_its_end_and_no_further_than_needed(tmp_path: Path) -> None:
    old = (ours(1, "old" + "x" * 900) + "\n") * 2_000
    # Read whole, the bytes in front would be an entry each: they are not valid.
    (tmp_path / "a.log").write_text("y" * (3 << 20) + "\n" + old + ours(50, "ä" * 70_000) + "\n" + ours(59, "new"))
    assert [entry.at.second for entry in latest(tmp_path, ["a"], 3, EVERYTHING)] == [1, 50, 59]
    since = LogFilter(since=datetime(2026, 11, 28, 12, 0, 40, tzinfo=UTC))
    found = latest(tmp_path, ["a"], 1_000, since)
    assert [entry.message for entry in found] == ["ä" * 70_000, "new"]


def test_entries_are_selected_by_level_trace_and_text(tmp_path: Path) -> None:
    lines = [
        ours(1, "one", "WARNING", trace_id="abc123"),
        ours(2, "two", "DEBUG", job="j-7"),
        ours(3, "three", "ERROR"),
    ]
    (tmp_path / "a.log").write_text("\n".join(lines))

    def seconds(chosen: LogFilter) -> list[int]:
        return [entry.at.second for entry in latest(tmp_path, ["a"], 10, chosen)]

    assert seconds(LogFilter(level="WARNING")) == [1, 3]
    assert seconds(LogFilter(trace_id="abc")) == [1]
    assert seconds(LogFilter(contains="j-7")) == [2]
    assert seconds(LogFilter(warnings_only=frozenset({"a"}))) == [1, 3]
    assert seconds(LogFilter(warnings_only=frozenset({"b"}))) == [1, 2, 3]


def test_a_process_that_ended_before_it_logged_is_in_the_logs(tmp_path: Path) -> None:
    (tmp_path / "p.log").write_text("Traceback:\nModuleNotFoundError: No module named 'x'\n")
    [entry] = latest(tmp_path, ["p"], 9, LogFilter(since=datetime.now(UTC) - timedelta(minutes=1)))
    assert entry.message.endswith("No module named 'x'")


def test_text_of_a_field_is_found_in_any_language(tmp_path: Path) -> None:
    (tmp_path / "p.log").write_text(ours(0, "loaded", model="größe"))
    assert len(latest(tmp_path, ["p"], 9, LogFilter(contains="größe"))) == 1


def test_following_survives_the_bound_of_a_log_and_a_restart_of_its_process(tmp_path: Path) -> None:
    log, former = tmp_path / "a.log", tmp_path / "a.log.1"
    log.write_text(ours(1, "before") + "\n")
    follower = Follower(tmp_path, lambda name: name != "other", EVERYTHING)
    try:
        assert follower.poll() == []
        with log.open("a") as file:
            file.write(ours(2, "two") + "\n" + ours(3, "thr"))
            file.flush()
            assert [entry.message for entry in follower.poll()] == ["two"]
        # The supervisor copies a log beyond its bound, and cuts the file.
        with log.open("a") as file:
            file.write("\n" + ours(4, "four") + "\n")
        former.write_bytes(log.read_bytes())
        log.write_text(ours(5, "five") + "\n")
        assert [entry.message for entry in follower.poll()] == ["thr", "four", "five"]
        # A process that starts again has a new file.
        with log.open("a") as file:
            file.write(ours(6, "six") + "\n")
        log.replace(former)
        log.write_text(ours(7, "seven") + "\n")
        (tmp_path / "b.log").write_text(ours(8, "eight") + "\n")
        (tmp_path / "other.log").write_text(ours(9, "nine") + "\n")
        assert [entry.message for entry in follower.poll()] == ["six", "seven", "eight"]
        with (tmp_path / "b.log").open("a") as file:
            file.write("  a line of a traceback\n")
        assert [(entry.process, entry.message) for entry in follower.poll()] == [("b", "  a line of a traceback")]
    finally:
        follower.close()


def test_the_command_prints_what_was_asked_for(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "infer-0.log").write_text(ours(1, "loaded", model="m\x1b[31m") + "\n" + ours(3, "slow", "WARNING") + "\n")
    (logs / "mongod.log").write_text('{"t":{"$date":"2026-11-28T12:00:02Z"},"s":"I","c":"N","msg":"connection"}\n')

    def run(*args: str) -> str:
        done = CliRunner().invoke(app, ["logs", "--data-dir", str(tmp_path), *args], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    lines = run().splitlines()
    assert [line.split()[2:4] for line in lines] == [["infer-0", "INFO"], ["infer-0", "WARNING"]]
    assert "\x1b" not in lines[0], "control characters of a caller's name do not reach the terminal"
    assert [json.loads(line)["message"] for line in run("infer", "mongod", "--json").splitlines()] == [
        "loaded",
        "connection",
        "slow",
    ]
    assert run("-n", "0") == ""
