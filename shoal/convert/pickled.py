"""Objects out of joblib, pickle and skops files.

A pickle runs what code it likes as it is opened; nothing of this module looks at one before somebody has said that
it may.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shoal.convert.extras import SKLEARN, needed, versions
from shoal.errors import FailedPrecondition, InvalidArgument


def load(path: Path, *, trusts: bool) -> Any:
    """The object in the file. Only with `trusts` anything that may run code is opened.

    Raises:
        FailedPrecondition: it may run code and `trusts` is False, or a package that it needs is missing.
        InvalidArgument: it is no such file.
    """
    needed("sklearn", SKLEARN, f"converting {path.name}")
    if path.suffix == ".skops":
        return _load_skops(path, trusts=trusts)
    joblib = needed("joblib", SKLEARN, f"opening {path.name}")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = joblib.load(path)
    except ModuleNotFoundError as err:
        raise FailedPrecondition(f"{path.name} holds objects of the package {err.name}: install it here first") from err
    except Exception as err:  # A pickle raises whatever the code in it raises.
        raise InvalidArgument(f"{path}: cannot be opened as a pickle: {type(err).__name__}: {err}") from err
    _refuse_other_version(path, said)
    return found


def _refuse_other_version(path: Path, said: Sequence[warnings.WarningMessage]) -> None:
    """scikit-learn promises nothing of a model that another version saved: its answers may be others."""
    for warning in said:
        if warning.category.__name__ == "InconsistentVersionWarning":
            raise FailedPrecondition(
                f"{path.name} was saved by scikit-learn {getattr(warning.message, 'original_sklearn_version', '?')}; "
                f"here is {versions('scikit-learn')['scikit-learn']}: convert it where it was made, or save it anew"
            )


def _load_skops(path: Path, *, trusts: bool) -> Any:
    skops = needed("skops.io", SKLEARN, f"opening {path.name}")
    try:
        unknown = skops.get_untrusted_types(file=path)
        if unknown and not trusts:
            raise FailedPrecondition(
                f"{path.name} holds types that skops does not know to be harmless ({', '.join(unknown)}): "
                "--trust-pickle, if you know where the file is from"
            )
        return skops.load(path, trusted=unknown)
    except FailedPrecondition:
        raise
    except Exception as err:
        raise InvalidArgument(f"{path}: skops cannot open it: {type(err).__name__}: {err}") from err
