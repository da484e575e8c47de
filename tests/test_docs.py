"""The documents match the repository: links and anchors resolve, named files exist, generated tables are fresh."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from typer.main import get_command

from mesh.xds import web
from shoal.cli import up

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("bench", "docs", "examples", "kernels", "locks", "mesh", "proto", "services", "shoal", "tests", "tools")
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("bench/results/*.md")])
DATED = ("CHANGELOG.md", "bench/results/")
"""Pages about the past: their links must resolve, but the files that they name may have moved since."""

_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6} (.+?)\s*$", re.MULTILINE)
_FILE = re.compile(r"(?<![\w/<>~.$-])((?:[\w-]+/)+[\w-]+\.(?:md|proto|py|sh|txt|in))(?![\w/*])")
"""A path of two or more parts that ends like a source file."""
_FOLDER = re.compile(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*)`")
_FOLDER_NAME = re.compile(r"`([\w-]+)/`")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_and_anchor_resolves(page: Path) -> None:
    broken = []
    for target in _LINK.findall(_without_code(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        if not found.exists() or (anchor and anchor not in anchors(found)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if not str(page.relative_to(ROOT)).startswith(DATED)],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text()
    missing = [name for name in _FILE.findall(_without_links(text)) if not is_file_of_ours(name)]
    missing += [name for name in _FOLDER.findall(text) if not any(ROOT.glob(name.rstrip("/")))]
    assert not missing


def test_a_page_that_may_call_may_send_each_header_that_the_page_about_rest_names() -> None:
    text = (ROOT / "docs/rest.md").read_text()
    table = text.partition("\n## Headers\n")[2].partition("\n## ")[0]
    named = [name.lower() for name in re.findall(r"^\| `([\w-]+)", table, re.MULTILINE)]
    assert "idempotency-key" in named
    allowed = web.virtual_hosts(web.Web(origins=("https://app.example.com",)), {})[0]["typed_per_filter_config"]
    headers = allowed["envoy.filters.http.cors"]["allow_headers"].split(",")
    assert not {*named, "content-encoding", "content-type", "tracestate"} - set(headers)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/architecture.md"])
def test_every_single_folder_that_a_page_about_the_source_names_exists(page: str) -> None:
    assert not set(_FOLDER_NAME.findall((ROOT / page).read_text())) - folder_names()


def test_every_page_of_docs_is_listed_in_the_readme() -> None:
    linked = set(_LINK.findall((ROOT / "README.md").read_text()))
    assert not {f"docs/{page.name}" for page in ROOT.glob("docs/*.md")} - {link.partition("#")[0] for link in linked}


def test_the_tables_of_configuration_variables_are_fresh() -> None:
    done = subprocess.run(
        [sys.executable, "tools/config_table.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_every_setting_of_a_limit_is_on_the_page_of_limits_with_its_default() -> None:
    limits = [line for line in (ROOT / "docs/limits.md").read_text().splitlines() if line.startswith("|")]
    settings = re.findall(
        r"^\| `(SHOAL_\S+)` \| `(\d+)`(?: \((.*?)\))?", (ROOT / "docs/running.md").read_text(), re.MULTILINE
    )
    wrong = []
    for variable, number, readable in settings:
        if re.search(r"_(MAX|QUEUE|STREAM|RUN|MIN)_|_BYTES$", variable):
            default = readable or f"{int(number):,}"
            if not any(f"`{variable}`" in line and default in line for line in limits):
                wrong.append(f"{variable}: {default}")
    assert len(settings) > 40
    assert not wrong


def test_every_option_of_shoal_up_is_described() -> None:
    table = (ROOT / "docs/running.md").read_text().partition("### Options of shoal up")[2].partition("\n#")[0]
    described = set(re.findall(r"^\| `(--[\w-]+)", table, re.MULTILINE))
    assert described == {option for parameter in get_command(up.app).params for option in parameter.opts}


@cache
def anchors(page: Path) -> frozenset[str]:
    """Return the anchors of a page's headings, as GitHub makes them; a repeated heading gets -1, -2, ..."""
    found: list[str] = []
    for heading in _HEADING.findall(_without_code(page)):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        count = sum(re.fullmatch(rf"{re.escape(anchor)}(-\d+)?", other) is not None for other in found)
        found.append(f"{anchor}-{count}" if count else anchor)
    return frozenset(found)


def is_file_of_ours(name: str) -> bool:
    """Return whether a file of the repository has this path, counted from the root or from a folder within."""
    return any(path == name or path.endswith(f"/{name}") for path in files())


@cache
def files() -> tuple[str, ...]:
    """Return the path of every file in the repository's own folders."""
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if "node_modules" not in path.parts]
    return tuple(str(path.relative_to(ROOT)) for path in found if path.is_file())


@cache
def folder_names() -> frozenset[str]:
    """Return the name of every folder that holds one of the repository's files."""
    return frozenset(part for path in files() for part in path.split("/")[:-1])


def _without_code(page: Path) -> str:
    return _FENCE.sub("", page.read_text())


def _without_links(text: str) -> str:
    """Return `text` without link targets: these are relative to the page, and the test of links has them."""
    return _LINK.sub("", text)
