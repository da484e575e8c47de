"""docs/logs.md names every event in the code, and nothing else."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from functools import cache

from tests.test_layers import ROOT, modules, nodes_of, source_of
from tools import logs_table

OF_EVERY_LINE = {"time", "level", "logger", "message", "instance", "event", "trace_id", "span_id", "exception", "stack"}


@cache
def calls() -> list[logs_table.LogCall]:
    return [*logs_table.calls()]


def test_every_call_has_an_event_and_the_table_is_fresh() -> None:
    assert len(calls()) > 200
    page = logs_table.PAGE.read_text()
    assert logs_table.filled(page, calls()) == page, "docs/logs.md is stale: run tools/logs_table.py"


def test_every_logger_is_called_log() -> None:
    """The table has the calls of `log`."""
    logging = [name for name in modules() if "logging" in source_of(name).read_text()]
    assert len(logging) > 100
    named = [
        name
        for name in logging
        for node in nodes_of(name)
        if isinstance(node, ast.Assign | ast.AnnAssign)
        and node.value is not None
        and ast.unparse(node.value) == "logging.getLogger(__name__)"
        and ast.unparse(node) != "log = logging.getLogger(__name__)"
    ]
    assert not named
    on_the_module = [
        name
        for name in logging
        for node in nodes_of(name)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and re.fullmatch(r"logging\.(debug|info|warning|error|exception|critical|log)", ast.unparse(node.func))
    ]
    assert not on_the_module


def test_an_event_has_the_same_level_and_fields_wherever_it_is_logged() -> None:
    forms = defaultdict(set)
    for call in calls():
        forms[call.event].add((call.level, call.fields))
    assert not {event: found for event, found in forms.items() if len(found) > 1}
    assert not [event for event in forms if not re.fullmatch(r"[a-z0-9_]+\.[a-z0-9_]+", event)]


def test_a_field_of_an_event_is_none_of_the_fields_of_every_line() -> None:
    wrong = [(call.place, call.fields) for call in calls() if OF_EVERY_LINE & {*call.fields} - {"exception"}]
    assert not wrong


def test_a_field_is_a_number_in_every_event_or_in_none() -> None:
    """An index has one type for a field."""
    numbers, texts = defaultdict(list), defaultdict(list)
    for call in calls():
        for name in call.fields:
            (numbers if name in call.numbers else texts)[name].append(call.place)
    assert not {name: (numbers[name], texts[name]) for name in numbers.keys() & texts.keys()}


def test_every_event_and_field_that_the_pages_name_is_in_the_code() -> None:
    found = calls()
    areas = {call.event.partition(".")[0] for call in found}
    known = {call.event for call in found}
    for page in ("logs.md", "observability.md", "running.md"):
        text = (ROOT / "docs" / page).read_text()
        named = {name for name in re.findall(r"`([a-z0-9_]+\.[a-z0-9_]+)`", text) if name.partition(".")[0] in areas}
        assert named <= known | {"service.name"}
    fields = {name for call in found for name in call.fields} | OF_EVERY_LINE
    listed = re.findall(r"^\| `(\w+)` \| ", (ROOT / "docs/logs.md").read_text(), re.MULTILINE)
    assert listed
    assert {*listed} <= fields
