"""The examples beside the packages whose models they serve, called for each request.

    python -m bench.examples [--rounds 5] [--texts 128] [--threads 1]

`embeddings`: texts of this repository's documentation through `shoal serve` (the ensemble of examples/embeddings, 32
requests in flight, one text each), and through sentence-transformers, one call for each text. Both have as many threads
for the model and take turns in each round; figures are medians of rounds. CPU is that of the server's processes without
the client's, and of the package's process: on a machine with other load it is the figure to trust.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

import shoal
from examples import originals
from examples.embeddings import demo
from examples.embeddings.build import build

TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Took:
    """Seconds, and seconds of processor time, of each round."""

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    def add(self, wall: float, processor: float) -> None:
        self.wall.append(wall)
        self.processor.append(processor)


@contextmanager
def serving(models: Path, threads: int) -> Iterator[tuple[str, int]]:
    """`shoal serve`: its address and process id."""
    command = [sys.executable, "-m", "shoal.cli.main", "serve", str(models), "--port", "0", "--json"]
    environ = {**os.environ, "SHOAL_INFER_THREADS": str(threads)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environ) as server:
        try:
            assert server.stdout is not None
            said = ""
            for line in server.stdout:
                said += line
                if address := re.search(r"127\.0\.0\.1:\d+", said):
                    yield address[0], server.pid
                    break
            else:
                raise RuntimeError(f"shoal serve ended before it served: {said}")
        finally:
            server.terminate()


def processor_s(pid: int) -> float:
    """Of a process and all that it started, by /proc."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return (int(fields[11]) + int(fields[12])) / TICKS + sum(processor_s(int(child)) for child in children)


def sentences(most: int, least_words: int, most_words: int) -> list[str]:
    """Single sentences and parts of them: what a chat sends, and short ones what a search box does."""
    found = [part.strip() for text in demo.paragraphs(10_000) for part in re.split(r"(?<=[.:;])\s+", text)]
    fit = [" ".join(part.split()) for part in found if least_words <= len(part.split()) <= most_words]
    return fit[:: max(1, len(fit) // most)][:most]


def embeddings(rounds: int, texts: int, threads: int, out: Console) -> None:
    """Through Shoal, and by the package itself."""
    python = originals.folder("sentence_transformers") and originals.VENV / "bin/python"
    command = [python, Path(__file__).with_name("examples_original.py"), str(threads)]
    environ = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    kinds = {
        "phrases of 2 to 7 words": sentences(texts, 2, 7),
        "sentences of 8 to 40 words": sentences(texts, 8, 40),
        "paragraphs": demo.paragraphs(texts),
    }
    with tempfile.TemporaryDirectory() as folder, serving(build(Path(folder) / "models"), threads) as (address, pid):
        with subprocess.Popen(
            command, stdin=-1, stdout=-1, stderr=subprocess.DEVNULL, text=True, env=environ
        ) as package:
            for kind, asked in kinds.items():
                ours, theirs = asyncio.run(_rounds(address, pid, package, asked, rounds))
                _show(f"{len(asked)} {kind}, {threads} threads", len(asked), ours, theirs, out)
            assert package.stdin is not None
            package.stdin.close()


async def _rounds(
    address: str, pid: int, package: subprocess.Popen[str], texts: Sequence[str], rounds: int
) -> tuple[Took, Took]:
    ours, theirs = Took(), Took()
    assert package.stdin is not None
    assert package.stdout is not None
    async with shoal.AsyncClient(address) as client:
        for number in range(rounds + 1):  # The first one warms both up.
            start, processor = time.perf_counter(), processor_s(pid)
            await demo.embed(client, texts)
            took = time.perf_counter() - start, processor_s(pid) - processor
            package.stdin.write(json.dumps(texts) + "\n")
            package.stdin.flush()
            original = json.loads(package.stdout.readline())
            if number:
                ours.add(*took)
                theirs.add(*original)
    return ours, theirs


def _show(title: str, count: int, ours: Took, theirs: Took, out: Console) -> None:
    table = Table(title=title)
    for column in ("what", "embeddings/s", "CPU ms/embedding"):
        table.add_column(column, justify="left" if column == "what" else "right")
    rates = [count / statistics.median(took.wall) for took in (ours, theirs)]
    costs = [statistics.median(took.processor) * 1000 / count for took in (ours, theirs)]
    table.add_row(f"Shoal, {demo.AT_ONCE} in flight", f"{rates[0]:.1f}", f"{costs[0]:.1f}")
    table.add_row("sentence-transformers, called per request", f"{rates[1]:.1f}", f"{costs[1]:.1f}")
    per_round = [b / a for a, b in zip(ours.wall, theirs.wall, strict=True)]
    cost = [b / a for a, b in zip(ours.processor, theirs.processor, strict=True)]
    table.add_row("median ratio", f"{statistics.median(per_round):.2f}", f"{statistics.median(cost):.2f}")
    out.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--texts", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    embeddings(asked.rounds, asked.texts, asked.threads, Console(width=110))


if __name__ == "__main__":
    main()
