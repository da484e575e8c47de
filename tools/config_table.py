"""Write the tables of configuration variables in docs/running.md from the services' config classes.

    python tools/config_table.py [--check]

A table is placed between `<!-- config NAME -->` and `<!-- end NAME -->`. With --check the script writes nothing, and
exits with 1 when a table is stale.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
import typing
from itertools import pairwise
from pathlib import Path

from pydantic.fields import FieldInfo

from mesh.process.config import ServiceConfig
from services.coord.config import CoordConfig
from services.infer.config import InferConfig
from services.ingest.config import IngestConfig
from services.store.config import StoreConfig

PAGE = Path(__file__).resolve().parent.parent / "docs" / "running.md"
TABLES: dict[str, type[ServiceConfig]] = {
    "service": ServiceConfig,
    "infer": InferConfig,
    "ingest": IngestConfig,
    "store": StoreConfig,
    "coord": CoordConfig,
}
"""Tables of the page: `service` has the variables of all services, the others those of one service."""


def filled(page: str) -> str:
    """Return `page` with every table rendered anew.

    Raises:
        SystemExit: the page has no markers of a table, or a field has no docstring.
    """
    for name in TABLES:
        start, end = f"<!-- config {name} -->", f"<!-- end {name} -->"
        if page.count(start) != 1 or page.count(end) != 1:
            sys.exit(f"{PAGE}: expected one line '{start}', and one line '{end}' below it")
        before, rest = page.split(start)
        page = f"{before}{start}\n\n{table(name)}\n{end}{rest.split(end)[1]}"
    return page


def table(name: str) -> str:
    """Return one table in Markdown. A variable that all services have is repeated only where its default differs."""
    config = TABLES[name]
    shared = ServiceConfig.model_fields if config is not ServiceConfig else {}
    rows = ["| variable | default | meaning |", "|---|---|---|"]
    for field, info in config.model_fields.items():
        if field not in shared or _default(info) != _default(shared[field]):
            variable = f"SHOAL_{'<SERVICE>' if name == 'service' else name.upper()}_{field.upper()}"
            size = _readable(field, info.default)
            default = _default(info) + (f" ({size})" if size else "")
            rows.append(f"| `{variable}` | {default} | {_meaning(config, field, info)} |")
    return "\n".join(rows) + "\n"


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    value = info.default
    if value is None or value in ("", ()):
        return "unset"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`"


def _meaning(config: type[ServiceConfig], field: str, info: FieldInfo) -> str:
    texts = [found for cls in config.__mro__ if (found := _docstrings(cls).get(field))]
    if not texts:
        sys.exit(f"{config.__name__}.{field} has no docstring: write one below it")
    choices = typing.get_args(info.annotation) if typing.get_origin(info.annotation) is typing.Literal else ()
    listed = f" One of {', '.join(f'`{choice}`' for choice in choices)}." if choices else ""
    return (texts[0] + listed).replace("|", "\\|")


def _docstrings(cls: type) -> dict[str, str]:
    """Return the string below each annotated field of the class's own body."""
    if cls.__module__.partition(".")[0] not in ("mesh", "services"):
        return {}
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    return {
        field.target.id: " ".join(str(text.value.value).split())
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    }


def _readable(field: str, value: object) -> str:
    """Return a size or a time in its largest whole unit; empty where the number is clear by itself."""
    if not isinstance(value, int) or isinstance(value, bool) or value == 0:
        return ""
    units = {"_bytes": (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))}
    units["_ms"] = (("days", 86_400_000), ("hours", 3_600_000), ("minutes", 60_000), ("s", 1_000))
    for suffix, steps in units.items():
        for unit, size in steps if field.endswith(suffix) else ():
            if value % size == 0 and (value > size or unit in ("s", "KiB", "MiB", "GiB")):
                return f"{value // size} {unit}"
    return ""


def main() -> None:
    """Rewrite the page, or check it."""
    page = PAGE.read_text()
    fresh = filled(page)
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(fresh)
    elif fresh != page:
        sys.exit(f"stale tables in {PAGE}: run `python tools/config_table.py`")


if __name__ == "__main__":
    main()
