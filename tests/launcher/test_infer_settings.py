"""Settings of infer that `shoal up` passes on to every start of an instance."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from shoal.errors import InvalidArgument
from shoal.node import plan
from shoal.node.options import checked
from shoal.node.plan import Layout


def settings(
    folder: Path, environ: Mapping[str, str] | None = None, host: str = "127.0.0.1", **options: object
) -> dict[str, str]:
    """Return the settings of model control and code that an instance of infer gets, with the gateway at `host`."""
    chosen = checked(data_dir=folder, **options)  # type: ignore[arg-type]
    groups = plan.groups(chosen, Layout(folder / "run", 1, 2, gateway_host=host), environ or {}, 1)
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
    everywhere = "0.0.0.0"
    assert settings(tmp_path, host=everywhere)["ALLOW_CODE"] == "false"
    assert settings(tmp_path, host=everywhere, allow_code=True)["ALLOW_CODE"] == "true"
    assert settings(tmp_path, {"SHOAL_INFER_ALLOW_CODE": "true"}, everywhere)["ALLOW_CODE"] == "true"
    assert settings(tmp_path, {"SHOAL_INFER_ALLOW_CODE": "false"}, everywhere, allow_code=True)["ALLOW_CODE"] == "true"


def test_files_of_the_machine_are_not_open_to_other_machines(tmp_path: Path) -> None:
    for host, is_open in (("127.0.0.1", True), ("0.0.0.0", False)):
        groups = plan.groups(checked(data_dir=tmp_path), Layout(tmp_path / "run", 1, 2, gateway_host=host), {}, 1)
        env = {name: value for group in groups for spec in group for name, value in spec.env.items()}
        for variable in ("SHOAL_STORE_BACKUPS", "SHOAL_INGEST_BATCH_URLS"):
            places = env[variable].split(",")
            assert ("file:///" in places) is is_open
            assert any(place.startswith(f"file://{tmp_path}/") for place in places) is not is_open


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_with_authentication_each_tenant_has_its_folders_and_no_bucket(tmp_path: Path, host: str) -> None:
    layout = Layout(tmp_path / "run", 1, 2, gateway_host=host)
    groups = plan.groups(checked(data_dir=tmp_path, auth=True), layout, {}, 1)
    env = {name: value for group in groups for spec in group for name, value in spec.env.items()}
    assert env["SHOAL_INGEST_BATCH_URLS"] == f"file://{tmp_path}/batches/{{tenant}}"
    assert env["SHOAL_STORE_EXPORTS"] == f"file://{tmp_path}/exports/{{tenant}}"
    assert env["SHOAL_STORE_BACKUPS"] == f"file://{tmp_path}/backups"


@pytest.mark.parametrize(
    ("options", "named"), [({"model_control": "explicit"}, "--model-control"), ({"allow_code": True}, "--allow-code")]
)
def test_an_option_of_infer_without_infer_is_a_mistake(tmp_path: Path, options: dict[str, object], named: str) -> None:
    with pytest.raises(InvalidArgument, match=f"{named} is for infer, which --services leaves out"):
        checked(data_dir=tmp_path, services="store", **options)  # type: ignore[arg-type]
