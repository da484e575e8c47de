"""`shoal models push` of a folder of models: what is said at the end, and the exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Shoal
from tests.client.models.test_push import Store, folder_of
from tests.client.served import Served


@pytest.fixture
def kept(served: Served) -> Store:
    return Store(served)


def test_a_folder_is_pushed_and_each_model_listed(kept: Store, shoal: Shoal, tmp_path: Path) -> None:
    folder = str(folder_of(tmp_path / "models", "a", "b"))
    done = shoal("models", "push", folder, "--no-wait")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "a version 1: registered, 1 B sent",
        "b version 1: registered, 1 B sent",
        "2 of 2 models pushed: 2 versions; 2 B sent",
    ]
    again = shoal("models", "push", folder, "--no-wait").stdout
    assert again.endswith("2 of 2 models pushed: 2 versions, 2 of them registered before; 0 B sent\n")


def test_the_models_that_were_not_pushed_are_named_with_reasons(kept: Store, shoal: Shoal, tmp_path: Path) -> None:
    names = [f"m{number}" for number in range(30)]
    folder = str(folder_of(tmp_path / "models", *names))
    kept.trials["m7"] = ["no luck"] * 2
    done = shoal("models", "push", folder, "--no-wait")
    assert done.returncode == 1
    assert done.stderr == "m7: not pushed: m7 version 1 cannot be loaded: no luck\n"
    assert done.stdout == "29 of 30 models pushed: 29 versions; 78 B sent\n"
    as_json = shoal("models", "push", folder, "--no-wait", "--json")
    *pushed, failed = json.loads(as_json.stdout)
    assert as_json.returncode == 1
    assert [each["existed"] for each in pushed] == [True] * 29
    assert failed == {
        "name": "m7",
        "error": "m7 version 1 cannot be loaded: no luck",
        "code": "FAILED_PRECONDITION",
    }
    assert shoal("models", "push", folder, "--no-wait", "--no-check").returncode == 0
