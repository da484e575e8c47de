"""Small real models, trained on the data sets that scikit-learn brings, and saved as their users save them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib
import lightgbm
import numpy as np
import torch
import xgboost
from sklearn import cluster, datasets, ensemble, linear_model, neural_network, pipeline, preprocessing, svm, tree

IRIS, DIGITS = datasets.load_iris(), datasets.load_digits()
CANCER, DIABETES = datasets.load_breast_cancer(), datasets.load_diabetes()
NAMED = IRIS.target_names[IRIS.target]
GAPS = np.where(np.random.default_rng(0).random(DIABETES.data.shape) < 0.1, np.nan, DIABETES.data)
FOREST = {"n_estimators": 12, "random_state": 0}


def scaled(last: Any) -> Any:
    return pipeline.make_pipeline(preprocessing.StandardScaler(), last)


def sklearn_models() -> dict[str, Any]:
    """Fitted estimators by name."""
    return {
        "logistic": linear_model.LogisticRegression(max_iter=300).fit(IRIS.data, NAMED),
        "ridge": linear_model.Ridge().fit(DIABETES.data, DIABETES.target),
        "tree": tree.DecisionTreeClassifier(random_state=0).fit(CANCER.data, CANCER.target),
        "forest": ensemble.RandomForestClassifier(**FOREST).fit(DIGITS.data, DIGITS.target),
        "forest_regressor": ensemble.RandomForestRegressor(**FOREST).fit(GAPS, DIABETES.target),
        "boosting": ensemble.GradientBoostingRegressor(random_state=0, n_estimators=20).fit(
            DIABETES.data, DIABETES.target
        ),
        "histogram": ensemble.HistGradientBoostingClassifier(max_iter=10, random_state=0).fit(
            CANCER.data, CANCER.target
        ),
        "histogram_regressor": ensemble.HistGradientBoostingRegressor(max_iter=10, random_state=0).fit(
            GAPS, DIABETES.target
        ),
        "svc": svm.SVC().fit(IRIS.data, IRIS.target),
        "linear_svc": scaled(svm.LinearSVC(random_state=0)).fit(CANCER.data, CANCER.target),
        "perceptron": scaled(neural_network.MLPClassifier((16,), max_iter=30, random_state=0)).fit(
            DIGITS.data, DIGITS.target
        ),
        "kmeans": cluster.KMeans(3, n_init=1, random_state=0).fit(IRIS.data),
        "scaler": preprocessing.StandardScaler().fit(IRIS.data),
        "scaled_tree": scaled(tree.DecisionTreeClassifier(random_state=0)).fit(CANCER.data, CANCER.target),
        "scaled_lightgbm": scaled(lightgbm.LGBMClassifier(n_estimators=5, verbose=-1)).fit(
            CANCER.data, CANCER.target_names[CANCER.target]
        ),
        "scaled_xgboost": scaled(xgboost.XGBClassifier(n_estimators=5)).fit(CANCER.data, CANCER.target),
        "xgboost_wrapped": xgboost.XGBClassifier(n_estimators=5).fit(IRIS.data, IRIS.target),
        "lightgbm_wrapped": lightgbm.LGBMRegressor(n_estimators=5, verbose=-1).fit(GAPS, DIABETES.target),
    }


def save_sklearn(folder: Path) -> dict[str, Path]:
    models = sklearn_models()
    for name, model in models.items():
        joblib.dump(model, folder / f"{name}.joblib")
    return {name: folder / f"{name}.joblib" for name in models}


def save_xgboost(folder: Path) -> dict[str, Path]:
    def train(data: Any, target: Any, **parameters: Any) -> Any:
        return xgboost.train({"max_depth": 3, **parameters}, xgboost.DMatrix(data, target), 8)

    boosters = {
        "binary.json": train(CANCER.data, CANCER.target, objective="binary:logistic"),
        "several.ubj": train(IRIS.data, IRIS.target, objective="multi:softprob", num_class=3),
        "softmax.json": train(IRIS.data, IRIS.target, objective="multi:softmax", num_class=3),
        "gaps.json": train(GAPS, DIABETES.target),
        "counts.json": train(GAPS, DIABETES.target, objective="count:poisson"),
    }
    for name, booster in boosters.items():
        booster.save_model(folder / name)
    return {f"xgboost_{name}": folder / name for name in boosters}


def save_lightgbm(folder: Path) -> dict[str, Path]:
    def train(data: Any, target: Any, categorical: Any = "auto", **parameters: Any) -> Any:
        data_set = lightgbm.Dataset(data, target, categorical_feature=categorical)
        return lightgbm.train({"verbose": -1, **parameters}, data_set, 8)

    boosters = {
        "binary.txt": train(CANCER.data, CANCER.target, objective="binary"),
        "several.txt": train(IRIS.data, IRIS.target, objective="multiclass", num_class=3),
        "gaps.txt": train(GAPS, DIABETES.target, objective="regression"),
        "counts.txt": train(GAPS, DIABETES.target, objective="poisson"),
        "categories.txt": train(DIGITS.data, DIGITS.target, [20, 21], objective="multiclass", num_class=10),
    }
    for name, booster in boosters.items():
        booster.save_model(folder / name)
    return {f"lightgbm_{name}": folder / name for name in boosters}


class Convolutions(torch.nn.Module):
    """image [rows, 1, 8, 8] -> scores [rows, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.MaxPool2d(2)
        )
        self.head = torch.nn.Linear(64, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(image).flatten(1))


class Words(torch.nn.Module):
    """tokens, mask [rows, length] -> {logits [rows, 3], pooled [rows, 8]}."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = torch.nn.Embedding(50, 8), torch.nn.Linear(8, 3)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        pooled = (self.table(tokens) * mask.unsqueeze(-1)).sum(1)
        return {"logits": self.head(pooled), "pooled": pooled}


def save_torch(folder: Path) -> dict[str, Path]:
    torch.manual_seed(0)
    batch, length = torch.export.Dim("batch", min=1, max=32), torch.export.Dim("length", min=2, max=40)
    image = torch.randn(2, 1, 8, 8)
    tokens = (torch.randint(0, 50, (2, 5)), torch.ones(2, 5))
    plain = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).eval()
    export = torch.export.export
    programs = {
        "convolutions.pt2": export(Convolutions().eval(), (image,), dynamic_shapes=({0: batch},)),
        "fixed.pt2": export(Convolutions().eval(), (image[:1],)),
        "words.pt2": export(Words().eval(), tokens, dynamic_shapes=({0: batch, 1: length}, {0: batch, 1: length})),
        "plain.pt2": export(plain, (torch.randn(3, 4),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)),
    }
    for name, program in programs.items():
        torch.export.save(program, folder / name)
    return {f"torch_{name}": folder / name for name in programs}


SAVERS: tuple[Callable[[Path], dict[str, Path]], ...] = (save_sklearn, save_xgboost, save_lightgbm, save_torch)
