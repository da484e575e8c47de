"""`shoal trace`: the waterfall, the ids that it takes, and where spans cannot be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from typer.testing import CliRunner

from shoal.cli.diagnosis import waterfall
from shoal.cli.main import app
from shoal.cli.trace import _show_latest
from shoal.cli.traced import traced
from shoal.errors import Internal, InvalidArgument, ShoalError

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


def span(id: str, parent: str, start_ms: int, end_ms: int, **more: Any) -> dict[str, Any]:
    return {
        "trace": TRACE,
        "span": id,
        "parent": parent,
        "instance": "local/infer-0",
        "name": f"shoal.X/{id}",
        "start_ns": start_ms * 1_000_000,
        "end_ns": end_ms * 1_000_000,
        "error": "",
        "attributes": {},
        "links": [],
        **more,
    }


def test_spans_stand_below_their_parents_in_the_order_of_their_begins() -> None:
    spans = [
        span("c", "a", 60, 120),
        span("b", "a", 20, 50, error="no memory", attributes={"shoal.job": "J"}),
        span("d", "b", 30, 40),
        # The caller's span is not there.
        span("a", "caller", 0, 120),
        span("a", "caller", 0, 120),
    ]
    found = waterfall.lines(spans)
    assert [line.name for line in found] == ["X/a", "  X/b", "    X/d", "  X/c"]
    assert [line.offset_ms for line in found] == [0, 20, 30, 60]
    assert [line.bar for line in found] == [
        "█" * 24,
        "    " + "█" * 6 + " " * 14,
        " " * 6 + "██" + " " * 16,
        " " * 12 + "█" * 12,
    ]
    assert (found[1].about, found[1].has_failed) == ("job=J  no memory", True)


def test_a_span_without_duration_has_a_bar_and_one_of_itself_does_not_hang() -> None:
    found = waterfall.lines([span("a", "", 0, 100), span("b", "a", 100, 100), span("loop", "loop", 0, 1)])
    assert [(line.name, line.bar) for line in found] == [("X/a", "█" * 24), ("  X/b", " " * 23 + "█")]
    assert waterfall.lines([]) == []


@pytest.mark.parametrize("id", ["digits", "4bf92f3", "x" * 32, f"{TRACE}0", " "])
def test_what_is_no_id_is_refused(id: str) -> None:
    done = CliRunner().invoke(app, ["trace", id, "--admin", "127.0.0.1:1"])
    assert "neither a trace" in str(done.exception)


@pytest.mark.parametrize(
    ("command", "what"), [(("top", "--once", "--by", "execution"), "metrics"), (("logs",), "logs")]
)
@pytest.mark.parametrize("by", ["flag", "variable"])
def test_what_only_another_machine_has_is_said_to_be_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: tuple[str, ...], what: str, by: str
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    if by == "variable":
        monkeypatch.setenv("SHOAL_GATEWAY", "node-7:8080")
    done = CliRunner().invoke(app, [*command, *(["--gateway", "node-7:8080"] if by == "flag" else [])])
    assert isinstance(done.exception, InvalidArgument)
    said = str(done.exception)
    assert f"node-7:8080 is no node of this user on this machine, and {what} are on the node's own" in said
    assert "shoal serve" in said


def test_a_failed_call_names_the_command_with_the_gateway_that_was_given(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[trace.SpanContext] = []

    def failing(error: ShoalError, gateway: str | None) -> None:
        with traced(gateway):
            seen.append(trace.get_current_span().get_span_context())
            raise error

    with pytest.raises(Internal):
        failing(Internal("broken"), "node-7:8080")
    assert seen[0].trace_flags.sampled
    command = f"shoal trace {seen[0].trace_id:032x} --gateway node-7:8080"
    assert capsys.readouterr().err == f"trace: {command}\n"
    assert not trace.get_current_span().get_span_context().is_valid
    with pytest.raises(InvalidArgument):
        failing(InvalidArgument("clear"), None)
    assert capsys.readouterr().err == ""


def test_the_latest_calls_have_their_traces_and_methods_whole_in_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("COLUMNS", "80"), ("FORCE_COLOR", "1"), ("TTY_COMPATIBLE", "1")):
        monkeypatch.setenv(name, value)
    about = {"shoal.model": "digits", "shoal.tenant": "acme"}
    call = "inference.GRPCInferenceService/ModelInfer"
    _show_latest([span("a", "", 0, 1_234, name=call, error="no memory " * 9, attributes=about)])
    shown = capsys.readouterr().out.splitlines()
    first = next(line for line in shown if TRACE[:16] in line)
    assert "infer-0  ModelInfer  digits  acme" in first.replace("   ", "  ")
    assert len(first) <= 80
