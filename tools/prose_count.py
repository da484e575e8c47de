"""Count prose that is hard to read: docstrings that open as riddles, comments below constants, ambiguous class names.

    .venv/bin/python tools/prose_count.py                    the project's packages, a line each
    .venv/bin/python tools/prose_count.py FOLDER ...         any other Python source
    .venv/bin/python tools/prose_count.py --list FOLDER ...  every finding, with its file and line

A riddle is a docstring whose first word is a question word, or a pronoun whose noun is missing. A comment is below its
constant when it follows the assignment without an empty line, and an empty line or the end of the file follows it.
Generated stubs are left out.
"""

from __future__ import annotations

import argparse
import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

PACKAGES = ("services/infer", "services/ingest", "services/store", "services/coord", "mesh", "kernels", "shoal")
RIDDLES = frozenset({"what", "who", "whose", "whether", "how", "where", "when", "which", "why"})
PRONOUNS = frozenset({"it", "they", "those", "these", "such", "this", "that", "them"})
GENERATED = ("_pb2.py", "_pb2_grpc.py")


@dataclass
class Count:
    """Counts of one source tree."""

    files: int = 0
    lines: int = 0
    docstrings: int = 0
    riddles: list[str] = field(default_factory=list)
    pronouns: list[str] = field(default_factory=list)
    below: list[str] = field(default_factory=list)
    functions: list[int] = field(default_factory=list)
    classes: Counter[str] = field(default_factory=Counter)


def sources(folder: Path) -> Iterator[Path]:
    """Python files below `folder`, without generated ones."""
    return (path for path in sorted(folder.rglob("*.py")) if not path.name.endswith(GENERATED))


def count(folder: Path) -> Count:
    """Read every source file below `folder`. Raises SyntaxError for a file that is no Python."""
    found = Count()
    for path in sources(folder):
        text = path.read_text()
        found.files += 1
        found.lines += text.count("\n")
        _count_definitions(path, ast.parse(text), found)
        found.below += [f"{path}:{line}" for line in _comments_below(text)]
    return found


def _count_definitions(path: Path, tree: ast.Module, found: Count) -> None:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node)
        if docstring:
            found.docstrings += 1
            finding = f"{path}:{getattr(node, 'lineno', 1)}: {docstring.splitlines()[0]}"
            first = docstring.split(maxsplit=1)[0].strip("*`\"',.:;").lower()
            if first in RIDDLES:
                found.riddles.append(finding)
            elif first in PRONOUNS:
                found.pronouns.append(finding)
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            found.classes[node.name] += 1
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            found.functions.append(length - (docstring.count("\n") + 1 if docstring else 0))


def _comments_below(text: str) -> Iterator[int]:
    """Yield the line numbers of constants with a comment below them."""
    lines = text.splitlines()
    for node in ast.parse(text).body:
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            continue
        at = node.end_lineno or node.lineno
        end = at
        while end < len(lines) and lines[end].startswith("#"):
            end += 1
        if end > at and (end == len(lines) or not lines[end].strip()):
            yield node.lineno


def _row(name: str, found: Count) -> str:
    functions = sorted(found.functions) or [0]
    longest = functions[-1]
    high = functions[int(len(functions) * 0.99) - 1] if len(functions) > 1 else longest
    ambiguous = sum(1 for times in found.classes.values() if times >= 3)
    share = 100 * len(found.riddles) / max(found.docstrings, 1)
    return (
        f"{name:32} {found.files:6} {found.lines:7} {median(functions):5.0f} {high:5} {longest:5} {found.docstrings:7}"
        f" {len(found.riddles):8} {share:5.1f} {len(found.pronouns):8} {len(found.below):6} {ambiguous:7}"
    )


def main() -> None:
    """Print the table, or with --list every finding."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, default=[Path(name) for name in PACKAGES])
    parser.add_argument("--list", action="store_true", help="print every finding instead of counts")
    options = parser.parse_args()
    if not options.list:
        print(
            f"{'folder':32} {'files':>6} {'lines':>7} {'f50':>5} {'f99':>5} {'fmax':>5} {'docstr':>7} {'riddles':>8}"
            f" {'%':>5} {'pronouns':>8} {'below':>6} {'3+names':>7}"
        )
    for folder in options.folders:
        found = count(folder)
        if options.list:
            print(*(f"riddle   {finding}" for finding in found.riddles), sep="\n")
            print(*(f"pronoun  {finding}" for finding in found.pronouns), sep="\n")
            print(*(f"below    {finding}" for finding in found.below), sep="\n")
        else:
            print(_row(str(folder), found))


if __name__ == "__main__":
    main()
