"""Objectives of a policy: what a document may state, and what holds for a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shoal.access import policy as policies
from shoal.access import tokens
from shoal.access.objectives import DEFAULT, ModelObjective, described, objective_of
from shoal.access.policy import OBJECTIVE_MODELS, OBJECTIVES
from shoal.access.tokens import Signer
from shoal.errors import InvalidArgument
from tests.access.policies import policy


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    return tokens.create_signer(tmp_path_factory.mktemp("signer") / "signer.json")


def test_each_number_is_that_of_the_first_objective_that_states_it(signer: Signer) -> None:
    stated = [
        {"name": "ocr", "models": ["ocr*", "det"], "latency_ms": 50, "latency_percent": 95},
        {"name": "ocr-en", "models": ["ocr-en"], "latency_ms": 10, "availability_percent": 99.99},
        {"name": "all", "availability_percent": 99.9, "latency_percent": 90},
    ]
    found = policy(signer, objectives=stated).objectives
    assert objective_of(found, "ocr-en") == ModelObjective(0.9999, 0.95, 0.05)
    assert objective_of(found, "det") == ModelObjective(0.999, 0.95, 0.05)
    assert objective_of(found, "llm") == ModelObjective(0.999, 0.90, None)
    assert objective_of(found[:2], "llm") == objective_of((), "llm") == DEFAULT == ModelObjective(0.999, 0.99, None)


def test_objectives_are_said_in_words() -> None:
    assert described(ModelObjective(0.9995, 0.95, 0.05)) == (
        "99.95 % of the requests succeed, 95 % of these within 50 ms"
    )
    assert described(DEFAULT).endswith("99 % of these within its own latency goal")


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"models": ["*"]}, "an objective needs a number: availability_percent, latency_ms or latency_percent"),
    ({"availability_percent": 100}, "less than 100"),
    ({"availability_percent": 49.9}, "greater than or equal to 50"),
    ({"latency_percent": 0.99}, "greater than or equal to 50"),
    ({"latency_percent": "nan"}, "objectives[0].latency_percent"),
    ({"latency_ms": 0}, "greater than 0"),
    ({"latency_ms": 3_600_001}, "less than or equal to 3600000"),
    ({"latency_s": 1}, "objectives[0].latency_s: there is no such key"),
    ({"models": [], "latency_ms": 1}, "objectives[0].models"),
    ({"models": ["m"] * (OBJECTIVE_MODELS + 1), "latency_ms": 1}, f"at most {OBJECTIVE_MODELS} items"),
]


@pytest.mark.parametrize(("changes", "error"), WRONG)
def test_an_objective_that_cannot_hold_is_refused(signer: Signer, changes: dict[str, Any], error: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        policy(signer, objectives=[{"name": "o", **changes}])
    assert error in refused.value.message


def test_objectives_have_different_names_and_are_bounded(signer: Signer) -> None:
    one = {"name": "o", "latency_ms": 1}
    with pytest.raises(InvalidArgument, match="the objective 'o' occurs twice"):
        policy(signer, objectives=[one, {**one}])
    with pytest.raises(InvalidArgument, match=f"at most {OBJECTIVES} items"):
        policy(signer, objectives=[{**one, "name": f"o{n}"} for n in range(OBJECTIVES + 1)])


def test_the_schema_and_the_page_about_policies_have_them() -> None:
    assert policies.json_schema()["$defs"]["Objective"]["properties"].keys() == {
        *("name", "models", "availability_percent", "latency_ms", "latency_percent")
    }
    page = (Path(__file__).resolve().parents[2] / "docs" / "policy.md").read_text()
    assert "objectives:" in page
