"""The list of releases agrees with the changelog."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path


def test_every_release_of_the_changelog_has_its_commit(repository_root: Path) -> None:
    releases = tomllib.loads((Path(__file__).parent / "releases.toml").read_text())["release"]
    headings = re.findall(
        r"^## (\d+\.\d+\.\d+) \(\d{4}-\d\d-\d\d\)$", (repository_root / "CHANGELOG.md").read_text(), re.M
    )
    assert [release["version"] for release in releases] == headings[::-1]
    assert all(re.fullmatch("[0-9a-f]{40}", release["commit"]) for release in releases)
