"""Attack suite: bystanders call a small model at a steady rate while attack after attack runs.

    python -m bench.siege [--only NAME,...] [--front serve|gateway] [--seconds 2.5] [--repeat N]
                           [--whole-machine] [--before FOLDER] [--out FILE]

docs/benchmarks.md says how to read the table. `--before` runs the same attacks against another checkout with a .venv.
Exits with 1 when a goal is missed by this checkout.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bench.siege import models, servers, table
from bench.siege.catalogue import CATALOGUE, attacks_at
from bench.siege.job_attacks import BATCHES_FOLDER
from bench.siege.row import Phases, Row, besiege, stop_under_attack
from bench.siege.servers import Checkout, Server

Prepare = Callable[[Server], None]


def attacked_by_each(
    checkout: Checkout, repository: Path, attacks: Sequence[str], phases: Phases, prepare: Prepare
) -> Iterator[Row]:
    """Attack `shoal serve`: each attack has a server of its own, which gets SIGTERM under the attack."""
    for attack in attacks:
        with tempfile.TemporaryDirectory(prefix="shoal-siege-") as folder:
            with servers.serve(checkout, repository, Path(folder)) as server:
                prepare(server)
                row = besiege(server, attack, checkout.name, phases)
                row.stop_s = stop_under_attack(server, attack)
        yield row


def attacked_by_all(
    checkout: Checkout, repository: Path, attacks: Sequence[str], phases: Phases, prepare: Prepare
) -> Iterator[Row]:
    """Attack the gateway of a node, which starts again only after its infer or Envoy has ended."""
    waiting = list(attacks)
    while waiting:
        with tempfile.TemporaryDirectory(prefix="shoal-siege-") as folder:
            with servers.node(checkout, repository, Path(folder)) as server:
                prepare(server)
                is_usable = True
                while waiting and is_usable:
                    row = besiege(server, waiting.pop(0), checkout.name, phases)
                    is_usable = row.is_alive
                    if not waiting or not is_usable:
                        row.stop_s = stop_under_attack(server, row.attack)
                    yield row


def unprepared(server: Server) -> None:
    """Leave a server as it is."""


RUNS = {"serve": attacked_by_each, "gateway": attacked_by_all}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME,...", help=f"of {', '.join(CATALOGUE)}")
    parser.add_argument("--front", choices=tuple(RUNS), help="default: both")
    parser.add_argument("--seconds", type=float, default=2.5, help="of each attack")
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="run each attack so many times")
    parser.add_argument("--before", type=Path, metavar="FOLDER", help="another checkout, with a .venv")
    parser.add_argument("--precedence", action="store_true", help="before other work of the machine (root)")
    parser.add_argument("--whole-machine", action="store_true", help="servers run on processor 1, too, as attackers do")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the tables there, too")
    args = parser.parse_args()
    attacks = args.only.split(",") if args.only else list(CATALOGUE)
    if unknown := [name for name in attacks if name not in CATALOGUE]:
        parser.error(f"--only: unknown attacks {', '.join(unknown)}")
    attacks = [name for name in attacks for _ in range(args.repeat)]
    if args.only and args.front and (astray := [name for name in attacks if name not in attacks_at(args.front)]):
        parser.error(f"--only: {', '.join(astray)} need a node: --front gateway")
    phases = Phases(quiet=1.5, during=args.seconds, after=1.5)
    checkouts = [servers.here(), *([servers.other(args.before.resolve())] if args.before else [])]
    checkouts = [dataclasses.replace(one, uses_whole_machine=args.whole_machine) for one in checkouts]
    rows: dict[str, list[Row]] = {front: [] for front in ([args.front] if args.front else RUNS)}
    prepare = Server.take_precedence if args.precedence else unprepared
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, BATCHES_FOLDER, ignore_errors=True)
        repository = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shoal-siege-"))) / "models"
        models.write(repository)
        for front, found in rows.items():
            some = [name for name in attacks if name in attacks_at(front)]
            for checkout in checkouts:
                for row in RUNS[front](checkout, repository, some, phases, prepare):
                    found.append(row)
                    print(table.brief(front, row), file=sys.stderr, flush=True)
    text = table.document(rows, phases, sys.argv[1:], uses_whole_machine=args.whole_machine)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")
    with contextlib.suppress(BrokenPipeError):
        sys.exit(any(row.server == "now" and table.missed(row) for found in rows.values() for row in found))


if __name__ == "__main__":
    main()
