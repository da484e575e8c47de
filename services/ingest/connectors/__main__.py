"""`python -m services.ingest.connectors FILE`: validates a connector file; prints its errors and exits with 2."""

from __future__ import annotations

import sys
from pathlib import Path

from mesh.process.exits import WRONG_SETTINGS
from services.ingest.connectors import settings


def main(arguments: list[str]) -> int:
    """Validate the file and return the exit status."""
    if len(arguments) != 1:
        print("expected one argument, the file", file=sys.stderr)
        return WRONG_SETTINGS
    try:
        settings.read(Path(arguments[0]))
    except ValueError as err:
        print(err, file=sys.stderr)
        return WRONG_SETTINGS
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
