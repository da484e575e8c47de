"""Settings of infer that `shoal up` passes on to every start of an instance."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from shoal.errors import InvalidArgument
from shoal.node import plan
from shoal.node.options import checked
from shoal.node.plan import Layout


def settings(folder: Path, environ: Mapping[str, str] | None = None, **options: object) -> dict[str, str]:
    """Return the settings of model control and code that an instance of infer gets."""
    chosen = checked(data_dir=folder, **options)  # type: ignore[arg-type]
    layout = Layout(folder / "run", 1, 2, gateway_host=chosen.gateway_host)
    groups = plan.groups(chosen, layout, environ or {}, 1)
    (infer,) = (spec for group in groups for spec in group if spec.name == "infer-0")
    found = {**(environ or {}), **infer.env}
    names = ("MODEL_CONTROL", "LOAD_MODELS", "ALLOW_CODE")
    return {name: found[f"SHOAL_INFER_{name}"] for name in names if f"SHOAL_INFER_{name}" in found}


def test_a_node_allows_code_at_its_own_gateway_and_no_requests_to_load(tmp_path: Path) -> None:
    assert settings(tmp_path) == {"ALLOW_CODE": "true"}
    assert settings(tmp_path, model_control="none") == {"ALLOW_CODE": "true", "MODEL_CONTROL": "none"}


@pytest.mark.parametrize("by", ["option", "variable"])
def test_pushed_models_are_served_in_explicit_mode(tmp_path: Path, by: str) -> None:
    expected = {"ALLOW_CODE": "true", "MODEL_CONTROL": "explicit", "LOAD_MODELS": "*"}
    environ = {"SHOAL_INFER_MODEL_CONTROL": "explicit" if by == "variable" else "none"}
    options = {"model_control": "explicit"} if by == "option" else {}
    assert settings(tmp_path, environ, **options) == expected
    assert settings(tmp_path, {**environ, "SHOAL_INFER_LOAD_MODELS": "a"}, **options)["LOAD_MODELS"] == "a"


def test_code_needs_the_option_where_other_machines_reach_the_gateway(tmp_path: Path) -> None:
    listens = {"listen": "0.0.0.0:8443", "is_insecure": True}
    no, yes = {"SHOAL_INFER_ALLOW_CODE": "false"}, {"SHOAL_INFER_ALLOW_CODE": "true"}
    assert settings(tmp_path, **listens)["ALLOW_CODE"] == "false"
    assert settings(tmp_path, **listens, allow_code=True)["ALLOW_CODE"] == "true"
    assert settings(tmp_path, yes, **listens)["ALLOW_CODE"] == "true"
    assert settings(tmp_path, no, **listens, allow_code=True)["ALLOW_CODE"] == "true"


@pytest.mark.parametrize(
    ("options", "named"), [({"model_control": "explicit"}, "--model-control"), ({"allow_code": True}, "--allow-code")]
)
def test_an_option_of_infer_without_infer_is_a_mistake(tmp_path: Path, options: dict[str, object], named: str) -> None:
    with pytest.raises(InvalidArgument, match=f"{named} is for infer, which --services leaves out"):
        checked(data_dir=tmp_path, services="store", **options)  # type: ignore[arg-type]
