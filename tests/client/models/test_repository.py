"""A folder of models: which are in it, and that an ensemble stands behind its models."""

from __future__ import annotations

from pathlib import Path

from shoal.client.models.repository import circles, models_in


def model(root: Path, name: str, config: str | None = None) -> None:
    (root / name / "1").mkdir(parents=True)
    if config is not None:
        (root / name / "config.pbtxt").write_text(config)


def ensemble(*models: str) -> str:
    steps = ", ".join(f'{{ model_name: "{model}" }}' for model in models)
    return f'platform: "ensemble" ensemble_scheduling {{ step [ {steps} ] }}'


def names(root: Path) -> list[str]:
    return [folder.name for folder in models_in(root)]


def test_an_ensemble_follows_its_models_and_inner_ensembles(tmp_path: Path) -> None:
    model(tmp_path, "all", ensemble("inner", "z", "served elsewhere"))
    model(tmp_path, "inner", ensemble("z", "zz"))
    model(tmp_path, "z")
    model(tmp_path, "zz", 'backend: "onnxruntime"')
    (tmp_path / "README.md").touch()
    (tmp_path / "notes").mkdir()
    order = names(tmp_path)
    assert sorted(order) == ["all", "inner", "z", "zz"]
    assert order.index("zz") < order.index("inner") < order.index("all")
    assert order.index("z") < order.index("inner")


def test_an_unreadable_configuration_is_ignored(tmp_path: Path) -> None:
    model(tmp_path, "broken", "platform: ensemble {")
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary/config.pbtxt").write_bytes(b"\xff\xfe")
    assert names(tmp_path) == ["binary", "broken"]


def test_paths_that_are_no_repository(tmp_path: Path) -> None:
    model(tmp_path, "m", "")
    assert names(tmp_path / "m") == []  # It is a model.
    assert names(tmp_path / "m/1") == []
    assert names(tmp_path / "m/config.pbtxt") == []
    assert names(tmp_path / "nothing") == []


def test_ensembles_that_contain_each_other_are_told_apart(tmp_path: Path) -> None:
    model(tmp_path, "a", ensemble("b", "m"))
    model(tmp_path, "b", ensemble("a"))
    model(tmp_path, "itself", ensemble("itself"))
    model(tmp_path, "m")
    model(tmp_path, "user", ensemble("a", "later"))
    model(tmp_path, "later", ensemble("m"))
    order = names(tmp_path)
    assert sorted(order[:3]) == ["a", "b", "itself"]
    assert order[3:] == ["m", "later", "user"]
    found = circles(models_in(tmp_path))
    assert found.pop("itself") == "itself -> itself"
    assert found in ({"a": circle, "b": circle} for circle in ("a -> b -> a", "b -> a -> b"))
