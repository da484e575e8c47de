"""Write the tables of docs/metrics.md from the families in the code.

    python tools/metrics_table.py [--check]

A table is placed between `<!-- metrics NAME -->` and `<!-- end NAME -->`. With --check the script writes nothing, and
exits with 1 when a table is stale.
"""

from __future__ import annotations

import sys
from pathlib import Path

from mesh.metrics import process
from mesh.metrics.families import Family, Kind
from services.coord import metrics as coord
from services.infer import metrics as infer
from services.ingest import metrics as ingest
from services.store import metrics as store
from shoal.node import admin

PAGE = Path(__file__).resolve().parent.parent / "docs" / "metrics.md"
TABLES: dict[str, tuple[Family, ...]] = {
    "process": process.FAMILIES,
    "infer": infer.OWN,
    "triton": infer.TRITONS,
    "ingest": ingest.FAMILIES,
    "store": store.FAMILIES,
    "coord": coord.FAMILIES,
    "node": admin.FAMILIES,
}


def prometheus_name(family: Family) -> str:
    """Return the name as it stands in a page of metrics; that of a histogram without `_bucket`, `_sum`, `_count`."""
    is_counted = family.kind is Kind.COUNTER and not family.verbatim
    return f"{family.prometheus}_total" if is_counted else family.prometheus


def filled(page: str) -> str:
    """Return `page` with every table rendered anew. Raises SystemExit when it has no markers of a table."""
    for name, families in TABLES.items():
        start, end = f"<!-- metrics {name} -->", f"<!-- end {name} -->"
        if page.count(start) != 1 or page.count(end) != 1:
            sys.exit(f"{PAGE}: expected one line '{start}', and one line '{end}' below it")
        before, rest = page.split(start)
        page = f"{before}{start}\n\n{table(families)}\n{end}{rest.split(end)[1]}"
    return page


def table(families: tuple[Family, ...]) -> str:
    """Return one table in Markdown."""
    rows = ["| Prometheus | OpenTelemetry | kind | labels | meaning |", "|---|---|---|---|---|"]
    for family in families:
        otel = "" if family.verbatim else f"`{family.name}`" + (f" ({family.unit})" if family.unit else "")
        labels = ", ".join(f"`{label}`" for label in family.labels)
        help = family.help.replace("|", "\\|")
        rows.append(f"| `{prometheus_name(family)}` | {otel} | {family.kind} | {labels} | {help} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    text = PAGE.read_text()
    new = filled(text)
    if "--check" not in sys.argv:
        PAGE.write_text(new)
    elif new != text:
        sys.exit(f"{PAGE} is stale: run tools/metrics_table.py")
