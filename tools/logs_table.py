"""Write the table of docs/logs.md from the calls of `log` in the code.

    python tools/logs_table.py [--check]

The table is placed between `<!-- events -->` and `<!-- end events -->`. With --check the script writes nothing, and
exits with 1 when the table is stale.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "logs.md"
SOURCES = ("mesh", "services", "shoal")
_LEVELS = {
    "info": "INFO",
    "warning": "WARNING",
    "error": "ERROR",
    "exception": "ERROR",
    "log": "by case",
}
_VALUE = re.compile(r"%%|%\((\w+)\)[-#0 +]*\d*(?:\.\d+)?([a-zA-Z])")


class NoEvent(Exception):
    """A call of `log` has no event in the form that mesh.process.logs shows."""


@dataclass(frozen=True)
class LogCall:
    """One call of `log` in the code that is at INFO or above."""

    place: str
    """`mesh/mongo.py:239`."""
    logger: str
    level: str
    event: str
    fields: tuple[str, ...]
    """Without those of every line."""
    numbers: frozenset[str]
    """Fields that the message shows as a number."""
    message: str
    """With the names of values in braces."""


def calls() -> Iterator[LogCall]:
    """Return the calls of `log` of all modules, but for those of `log.debug`. Raises NoEvent."""
    for source in SOURCES:
        for path in sorted((ROOT / source).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                    is_ours = isinstance(node.func.value, ast.Name) and node.func.value.id == "log"
                    if is_ours and node.func.attr in _LEVELS:
                        yield _call(path.relative_to(ROOT), node, node.func.attr)


def _call(path: Path, node: ast.Call, method: str) -> LogCall:
    place = f"{path}:{node.lineno}"
    match node.args[1:] if method == "log" else node.args:
        case [text, ast.Dict(keys=[ast.Constant("event"), *keys], values=[ast.Constant(str(event)), *_])]:
            fields = [key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str)]
        case _:
            raise NoEvent(f'{place}: expected log.{method}("... %(name)s", {{"event": "area.happened", "name": ...}})')
    messages = _texts(text)
    shown = {found[1]: found[2] for message in messages for found in _VALUE.finditer(message) if found[1]}
    if not messages or len(fields) != len(keys) or not set(shown) <= set(fields):
        raise NoEvent(f"{place}: the message is no constant, or shows a value that is no field")
    if method == "exception" or any(keyword.arg == "exc_info" for keyword in node.keywords):
        fields.append("exception")
    return LogCall(
        place,
        ".".join(path.with_suffix("").parts),
        _LEVELS[method],
        event,
        tuple(fields),
        frozenset(name for name, kind in shown.items() if kind in "dfge"),
        " / ".join(_VALUE.sub(lambda found: f"{{{found[1]}}}" if found[1] else "%", message) for message in messages),
    )


def _texts(node: ast.expr) -> list[str]:
    """Return the message of a call, or both of a conditional one."""
    if isinstance(node, ast.IfExp):
        return [*_texts(node.body), *_texts(node.orelse)]
    return [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []


def table(found: Sequence[LogCall]) -> str:
    """Return the events in Markdown, each with all its loggers and messages."""
    rows = ["| event | level | fields | message | logger |", "|---|---|---|---|---|"]
    for event in sorted({call.event for call in found}):
        here = [call for call in found if call.event == event]
        fields = ", ".join(f"`{name}`" for name in here[0].fields)
        messages = " / ".join(dict.fromkeys(call.message for call in here)).replace("|", "\\|")
        loggers = ", ".join(dict.fromkeys(f"`{call.logger}`" for call in here))
        rows.append(f"| `{event}` | {here[0].level} | {fields} | {messages} | {loggers} |")
    return "\n".join(rows) + "\n"


def filled(page: str, found: Sequence[LogCall]) -> str:
    """Return `page` with the table of the calls `found`. Raises SystemExit when it has no markers of one."""
    start, end = "<!-- events -->", "<!-- end events -->"
    if page.count(start) != 1 or page.count(end) != 1:
        sys.exit(f"{PAGE}: expected one line '{start}', and one line '{end}' below it")
    before, rest = page.split(start)
    return f"{before}{start}\n\n{table(found)}\n{end}{rest.split(end)[1]}"


if __name__ == "__main__":
    text = PAGE.read_text()
    new = filled(text, [*calls()])
    if "--check" not in sys.argv:
        PAGE.write_text(new)
    elif new != text:
        sys.exit(f"{PAGE} is stale: run tools/logs_table.py")
