"""Import of a file `model.py` and choice of the model class in it; errors tell the author what to do."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from services.infer.model_process.hosted import (
    LoadFailed,
    print_error,
    text_of,
)

TRITON_CLASS = "TritonPythonModel"
_OWN_CLASS = "Model"


def import_module(file: Path, name: str) -> ModuleType:
    """Import `file` as the module `name`. The file's folder is added to `sys.path`.

    Raises:
        LoadFailed: the file cannot be imported.
    """
    folder = str(file.parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise LoadFailed(f"{file.name} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except SyntaxError as err:
        raise LoadFailed(f"{file.name}: {err.msg} ({Path(err.filename or file).name}, line {err.lineno})") from err
    except SystemExit as err:
        raise LoadFailed(f"{file.name} called sys.exit({err.code!r}) while it was imported") from err
    except BaseException as err:
        print_error(err)
        raise LoadFailed(f"{file.name} cannot be imported: {error_line(err, file)}") from err
    return module


def model_class(module: ModuleType, file: Path) -> type[Any]:
    """Return the model's class: `TritonPythonModel`, `Model`, or the only class with a method `predict`.

    Raises:
        LoadFailed: the module has no such class, or several.
    """
    for name in (TRITON_CLASS, _OWN_CLASS):
        found = getattr(module, name, None)
        if isinstance(found, type):
            return found
    own = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == module.__name__ and callable(getattr(value, "predict", None))
    ]
    if len(own) == 1:
        return own[0]
    if own:
        names = ", ".join(sorted(each.__name__ for each in own))
        raise LoadFailed(f"{file.name} has several classes with predict ({names}): name one of them {_OWN_CLASS}")
    raise LoadFailed(
        f"{file.name} has no model: expected a class {_OWN_CLASS} with predict(self, batch), or {TRITON_CLASS} "
        "with execute(self, requests)"
    )


def error_line(error: BaseException, file: Path) -> str:
    """Return an error as one line: its class, its message, and the line of the model's file that raised it."""
    text = f"it called sys.exit({error.code!r})" if isinstance(error, SystemExit) else text_of(error)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    where = f" ({file.name}, line {lines[-1]})" if lines else ""
    return " ".join(text.split())[:1000] + where
