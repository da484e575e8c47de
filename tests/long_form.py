"""The short and the long form of a test: `make test` runs the short one, `make test-long` the long one.

A test has a long form where more of the same (examples, kills, minutes) costs minutes and finds little in one run.
The short form goes through the same code and makes the same assertions.
"""

from __future__ import annotations

import os
from typing import TypeVar

T = TypeVar("T")

IS_LONG = os.environ.get("SHOAL_TEST_LONG", "") not in ("", "0")


def by_form(short: T, long: T) -> T:
    """Return `long` in `make test-long`, else `short`: a number of examples, rounds or seconds, or the cases to run."""
    return long if IS_LONG else short
