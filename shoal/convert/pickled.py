"""Loading of objects from joblib, pickle and skops files.

A pickle can run any code when it is opened, so callers need the user's consent first (`trusts`).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shoal.convert.extras import SKLEARN, needed, versions
from shoal.errors import FailedPrecondition, InvalidArgument


def load(path: Path, *, trusts: bool) -> Any:
    """Return the object in the file. With `trusts`, files that can run code are opened too.

    Raises:
        FailedPrecondition: the file can run code and `trusts` is False, or a needed package is missing.
        InvalidArgument: the file has another format.
    """
    needed("sklearn", SKLEARN, f"converting {path.name}")
    if path.suffix == ".skops":
        return _load_skops(path, trusts=trusts)
    joblib = needed("joblib", SKLEARN, f"opening {path.name}")
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            found = joblib.load(path)
    except ModuleNotFoundError as err:
        raise FailedPrecondition(f"{path.name} holds objects of the package {err.name}: install it here first") from err
    except Exception as err:
        # The code in a pickle can raise any error.
        raise InvalidArgument(f"{path}: cannot be opened as a pickle: {type(err).__name__}: {err}") from err
    _refuse_other_version(path, warned)
    return found


def _refuse_other_version(path: Path, warned: Sequence[warnings.WarningMessage]) -> None:
    """Reject models saved by another version of scikit-learn, which does not guarantee equal outputs."""
    for warning in warned:
        if warning.category.__name__ == "InconsistentVersionWarning":
            raise FailedPrecondition(
                f"{path.name} was saved by scikit-learn {getattr(warning.message, 'original_sklearn_version', '?')}; "
                f"installed is {versions('scikit-learn')['scikit-learn']}: use that version, or save it again"
            )


def _load_skops(path: Path, *, trusts: bool) -> Any:
    skops = needed("skops.io", SKLEARN, f"opening {path.name}")
    try:
        unknown = skops.get_untrusted_types(file=path)
        if unknown and not trusts:
            raise FailedPrecondition(
                f"{path.name} holds types that skops does not know to be safe ({', '.join(unknown)}): "
                "use --trust-pickle if you trust the source of the file"
            )
        return skops.load(path, trusted=unknown)
    except FailedPrecondition:
        raise
    except Exception as err:
        raise InvalidArgument(f"{path}: skops cannot open it: {type(err).__name__}: {err}") from err
