"""Attacker, in a process of its own.

    python -m bench.siege.attacker ATTACK ADDRESS

Prints "ready", reads {"start": s, "end": s} (time.monotonic) from its standard input, attacks meanwhile, and prints its
counts.
"""

from __future__ import annotations

import json
import resource
import sys
import time

from bench.siege.attack import Siege
from bench.siege.catalogue import CATALOGUE
from bench.siege.wire import pin_to_client_core


def main() -> None:
    name, address = sys.argv[1:]
    pin_to_client_core(has_precedence=False)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    siege = Siege(CATALOGUE[name], address)
    print("ready", flush=True)
    times = json.loads(sys.stdin.readline())
    time.sleep(max(0.0, times["start"] - time.monotonic()))
    json.dump(siege.run(times["end"]), sys.stdout)


if __name__ == "__main__":
    main()
