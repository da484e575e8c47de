"""Resume tokens of MongoDB's change streams in the form for clients: encoding, validation, and errors about them.

A token is opaque to clients: base64 of BSON. A client may send anything as a token, so only tokens in MongoDB's own
form are passed to MongoDB.
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

NOTHING: list[Document] = [{"$match": {"operationType": "none of these"}}]
"""Pipeline of a watch that is opened only for its start token: pymongo has that token only before the first event."""

_MAX_TOKEN_CHARACTERS = 8_192
# https://github.com/mongodb/mongo/blob/v6.0/src/mongo/base/error_codes.yml
# ChangeStreamHistoryLost, CappedPositionLost.
_HISTORY_LOST = frozenset({286, 136})
# ChangeStreamFatalError: the token's position is not in the stream, or no longer.
_FATAL = 280
_BAD_TOKEN = frozenset({2, 9, 14, 260, 50811, 40649, 40647, 8704900})


def encode(document: Mapping[str, Any]) -> str:
    """Return a document as text for clients."""
    return base64.urlsafe_b64encode(bson.encode(document)).decode()


def decode(text: str) -> Document:
    """Return the document that `encode` converted to `text`.

    Raises:
        InvalidArgument: `text` is not a result of `encode`.
    """
    try:
        if len(text) > _MAX_TOKEN_CHARACTERS:
            raise ValueError("too long")
        return dict(bson.decode(base64.b64decode(text.encode("ascii"), altchars=b"-_", validate=True)))
    except (ValueError, BSONError, binascii.Error) as err:
        raise _not_ours() from err


def validated(token: object) -> Document:
    """Return a change stream's token after a check of its form.

    Raises:
        InvalidArgument: the token does not have MongoDB's form.
    """
    if not isinstance(token, Mapping) or not isinstance(token.get("_data"), str):
        raise _not_ours()
    if not token.keys() <= {"_data", "_typeBits"} or not isinstance(token.get("_typeBits", b""), bytes | Binary):
        raise _not_ours()
    return dict(token)


def client_error(err: OperationFailure) -> Exception:
    """Return the error for the client if MongoDB's error is about the token, else `err` itself."""
    if err.code in _HISTORY_LOST or err.code == _FATAL:
        return OutOfRange(
            "resume_token: its position is no longer in MongoDB's log: query the missed changes, then watch anew"
        )
    if err.code in _BAD_TOKEN:
        return InvalidArgument("resume_token: not a token of this watch: leave it out to watch from now on")
    return err


def _not_ours() -> InvalidArgument:
    return InvalidArgument("resume_token: not a token of this service: leave it out to watch from now on")
