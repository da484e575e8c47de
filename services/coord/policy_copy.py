"""Copy of the applied policy and of the revoked keys in the node's data folder, for an etcd that has lost them.

The copy holds no secret, and no key is needed to read it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from mesh.process.files import write_atomically
from services.coord.policies import Applied
from shoal.errors import FailedPrecondition


@dataclass(frozen=True)
class Saved:
    """Content of a copy."""

    applied: Applied
    revoked: Mapping[str, float]
    """Expiry by the id of a key."""


# Users mend copies by hand: each field is checked.
_SAVED = TypeAdapter(Saved)


class PolicyCopy:
    """Copy in the file `path`. All methods block."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> Saved | None:
        """Return the copy; None when there is none.

        Raises:
            FailedPrecondition: the file cannot be read, or is no copy.
        """
        try:
            return _SAVED.validate_json(self.path.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as err:
            first = err.errors()[0]
            raise self._unreadable(": ".join((*map(str, first["loc"]), first["msg"]))) from err
        except OSError as err:
            raise self._unreadable(str(err)) from err

    def _unreadable(self, reason: str) -> FailedPrecondition:
        return FailedPrecondition(
            f"{self.path}, the copy of the last policy, cannot be read ({reason}): mend it, or remove it to begin with "
            "the first policy, in which every role has its groups"
        )

    def write(self, saved: Saved) -> None:
        """Replace the copy as a whole, durably. Raises OSError."""
        document = {"applied": asdict(saved.applied), "revoked": dict(saved.revoked)}
        write_atomically(self.path, json.dumps(document), is_private=True)
