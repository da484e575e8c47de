"""Resume tokens of MongoDB's change streams, as clients carry them: checked when they come back, errors explained.

A token is opaque to clients: base64 of BSON. What comes back may be anything, so only the form that MongoDB gives out
is passed on to it.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

import bson
from bson import Binary
from bson.errors import BSONError
from pymongo.errors import OperationFailure

from mesh.mongo import Document
from shoal.errors import InvalidArgument, OutOfRange

_MAX_TOKEN_CHARACTERS = 8_192
# https://github.com/mongodb/mongo/blob/v6.0/src/mongo/base/error_codes.yml
_HISTORY_LOST = frozenset({286, 136})  # ChangeStreamHistoryLost, CappedPositionLost.
_FATAL = 280  # ChangeStreamFatalError: the token's place is not in the stream (any more).
_BAD_TOKEN = frozenset({2, 9, 14, 260, 50811, 40649, 40647, 8704900})


def written(document: Mapping[str, Any]) -> str:
    """A document as a client carries it."""
    return base64.urlsafe_b64encode(bson.encode(document)).decode()


def read(text: str) -> Document:
    """The document that `written` made a text of.

    Raises:
        InvalidArgument: it did not.
    """
    try:
        if len(text) > _MAX_TOKEN_CHARACTERS:
            raise ValueError("too long")
        return dict(bson.decode(base64.b64decode(text.encode("ascii"), altchars=b"-_", validate=True)))
    except (ValueError, BSONError, binascii.Error) as err:
        raise _not_ours() from err


def checked(token: object) -> Document:
    """A change stream's token, in the form that MongoDB gives out.

    Raises:
        InvalidArgument: it has another.
    """
    if not isinstance(token, Mapping) or not isinstance(token.get("_data"), str):
        raise _not_ours()
    if not token.keys() <= {"_data", "_typeBits"} or not isinstance(token.get("_typeBits", b""), bytes | Binary):
        raise _not_ours()
    return dict(token)


def explained(err: OperationFailure) -> Exception:
    """What MongoDB says about a token, as its client should hear it; `err` itself when it is about something else."""
    if err.code in _HISTORY_LOST or err.code == _FATAL:
        return OutOfRange("resume_token: its place is no longer in MongoDB's log: query what was missed, watch anew")
    if err.code in _BAD_TOKEN:
        return InvalidArgument("resume_token: not a token of this watch: leave it out to watch from now on")
    return err


def _not_ours() -> InvalidArgument:
    return InvalidArgument("resume_token: not a token of this service: leave it out to watch from now on")
