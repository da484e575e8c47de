"""File formats of models, their frameworks, and the opening of a file.

.pt2                        PyTorch, torch.export.save        may run code: needs consent
.joblib .pkl .pickle        scikit-learn, XGBoost, LightGBM   may run code: needs consent
.skops                      scikit-learn                      types that skops does not know need consent
.json .ubj                  XGBoost
.txt                        LightGBM
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.convert.extras import LIGHTGBM, SKLEARN, TORCH, XGBOOST, needed
from shoal.errors import FailedPrecondition, InvalidArgument, NotFound

if TYPE_CHECKING:
    from shoal.convert.original import Original

SUFFIXES = (".pt2", ".joblib", ".pkl", ".pickle", ".skops", ".json", ".ubj", ".txt")

_RUNS_CODE = (".pt2", ".joblib", ".pkl", ".pickle")

# Other formats of models, with advice for their users.
_OTHERS = {
    (".pt", ".pth", ".ckpt", ".safetensors"): "weights or TorchScript: in Python, use torch.export.export(model, ...) "
    "and torch.export.save(program, 'model.pt2'), and convert the .pt2 file",
    (".h5", ".keras", ".pb", ".tflite"): "TensorFlow models are not supported: convert them with tf2onnx",
    (".model", ".bin"): "an old or unknown format: use XGBoost's save_model('model.json') or LightGBM's "
    "save_model('model.txt')",
}


def is_brought(path: Path) -> bool:
    """Return True when `path` is a file that is converted before a push."""
    return path.is_file() and path.suffix in SUFFIXES


def advice(path: Path) -> str:
    """Return advice for a model file of an unsupported format; empty for other files."""
    return next((what for suffixes, what in _OTHERS.items() if path.suffix in suffixes), "")


def open_original(path: Path, *, trusts: bool = False, float64: bool = False) -> Original:
    """Open the file with its framework and return the model.

    Args:
        trusts: open also a file that can run code when it is opened.
        float64: serve float64 inputs; supported for scikit-learn only.

    Raises:
        NotFound: no such file.
        InvalidArgument: the format is not supported, or the content does not match the file's name.
        FailedPrecondition: `trusts` is needed, or a package is missing.
    """
    if not path.is_file():
        raise NotFound(f"{path}: no such file")
    if path.suffix == ".onnx":
        raise InvalidArgument(f"{path}: the file is ONNX already: push it with `shoal models push`")
    if path.suffix not in _OPENERS:
        raise InvalidArgument(f"{path}: {advice(path) or 'expected one of ' + ', '.join(SUFFIXES)}")
    if path.suffix in _RUNS_CODE and not trusts:
        raise FailedPrecondition(
            f"{path.name} may run any code when it is opened (it holds pickles): "
            "use --trust-pickle if you trust the source of the file"
        )
    extra, opens = _OPENERS[path.suffix]
    needed("onnx", extra, f"converting {path.name}")
    original = opens(path, trusts, float64)
    if float64 and original.framework != "scikit-learn":
        raise InvalidArgument(f"--float64 is supported for scikit-learn only; this model is of {original.framework}")
    return original


def _torch(path: Path, trusts: bool, float64: bool) -> Original:
    needed("torch", TORCH, f"converting {path.name}")
    from shoal.convert import torch_program

    return torch_program.TorchProgram(torch_program.load(path))


def _pickled(path: Path, trusts: bool, float64: bool) -> Original:
    needed("skl2onnx", SKLEARN, f"converting {path.name}")
    from shoal.convert import lightgbm_trees, pickled, sklearn_estimator, xgboost_trees

    found = pickled.load(path, trusts=trusts)
    kind = f"{type(found).__module__.partition('.')[0]}.{type(found).__name__}"
    if kind == "xgboost.Booster":
        return xgboost_trees.XgboostTrees(xgboost_trees.of_booster(found))
    if kind == "lightgbm.Booster":
        return lightgbm_trees.LightgbmTrees(found)
    return sklearn_estimator.SklearnEstimator(found, float64=float64)


def _xgboost(path: Path, trusts: bool, float64: bool) -> Original:
    from shoal.convert import xgboost_trees

    return xgboost_trees.XgboostTrees(xgboost_trees.load(path))


def _lightgbm(path: Path, trusts: bool, float64: bool) -> Original:
    from shoal.convert import lightgbm_trees

    return lightgbm_trees.LightgbmTrees(lightgbm_trees.load(path))


_OPENERS: dict[str, tuple[str, Callable[[Path, bool, bool], Original]]] = {
    ".pt2": (TORCH, _torch),
    ".joblib": (SKLEARN, _pickled),
    ".pkl": (SKLEARN, _pickled),
    ".pickle": (SKLEARN, _pickled),
    ".skops": (SKLEARN, _pickled),
    ".json": (XGBOOST, _xgboost),
    ".ubj": (XGBOOST, _xgboost),
    ".txt": (LIGHTGBM, _lightgbm),
}
