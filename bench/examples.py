"""The examples beside the packages whose models they serve, called for each request.

    python -m bench.examples [--rounds 5] [--texts 128] [--pages 16] [--threads 1] [--only ocr]

`embeddings`: texts of this repository's documentation through `shoal serve` (the ensemble of examples/embeddings, 32
requests in flight, one text each), and through sentence-transformers, one call for each text. `ocr`: the images of
examples/ocr, 4 in flight, and rapidocr-onnxruntime with its own settings, one call for each image. Both have as many
threads for the model and take turns in each round; figures are medians of rounds. CPU is that of the server's processes
without the client's, and of the package's process: on a machine with other load it is the figure to trust.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

import shoal
from examples import originals
from examples.embeddings import demo
from examples.embeddings.build import build
from examples.ocr.build import build as build_ocr
from examples.ocr.pages import gather
from examples.serving import serving

PAGES_AT_ONCE = 4

TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Took:
    """Seconds, and seconds of processor time, of each round."""

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    def add(self, wall: float, processor: float) -> None:
        self.wall.append(wall)
        self.processor.append(processor)


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
    kinds = {
        "phrases of 2 to 7 words": sentences(texts, 2, 7),
        "sentences of 8 to 40 words": sentences(texts, 8, 40),
        "paragraphs": demo.paragraphs(texts),
    }
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(build(Path(folder) / "models"), SHOAL_INFER_THREADS=str(threads)) as (address, pid),
    ):
        with _package("examples_original.py", "sentence_transformers", threads) as package:
            for kind, asked in kinds.items():
                ours, theirs = asyncio.run(
                    _rounds(address, pid, package, partial(demo.embed, texts=asked), asked, rounds)
                )
                _show(f"{len(asked)} {kind}, {threads} threads", "embedding", len(asked), ours, theirs, out)


def ocr(rounds: int, pages: int, threads: int, out: Console) -> None:
    """The images of examples/ocr, again and again: through Shoal, and by the package itself."""
    found = list(gather().values())
    images = [found[n % len(found)] for n in range(pages)]
    places = asyncio.Semaphore(PAGES_AT_ONCE)

    async def read(client: shoal.AsyncClient) -> None:
        async def one(image: bytes) -> None:
            async with places:
                await client.infer("ocr", {"image": np.array([[image]], object)}, timeout=120)

        await asyncio.gather(*map(one, images))

    sent = [base64.b64encode(image).decode() for image in images]
    settings = {"SHOAL_INFER_THREADS": str(threads)}
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(build_ocr(Path(folder) / "models"), **settings) as (address, pid),
    ):
        with _package("examples_ocr_original.py", "rapidocr_onnxruntime", threads) as package:
            ours, theirs = asyncio.run(_rounds(address, pid, package, read, sent, rounds))
    _show(f"{pages} pages, {threads} threads, {PAGES_AT_ONCE} in flight", "page", pages, ours, theirs, out)


@contextmanager
def _package(script: str, package: str, threads: int) -> Iterator[subprocess.Popen[str]]:
    """The original package in a process of its own, which answers a line of JSON with what it took."""
    python = originals.folder(package) and originals.VENV / "bin/python"
    environ = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [python, Path(__file__).with_name(script), str(threads)]
    with subprocess.Popen(command, stdin=-1, stdout=-1, stderr=subprocess.DEVNULL, text=True, env=environ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


async def _rounds(
    address: str,
    pid: int,
    package: subprocess.Popen[str],
    ask: Callable[[shoal.AsyncClient], Awaitable[object]],
    sent: Sequence[str],
    rounds: int,
) -> tuple[Took, Took]:
    ours, theirs = Took(), Took()
    assert package.stdin is not None
    assert package.stdout is not None
    async with shoal.AsyncClient(address) as client:
        for number in range(rounds + 1):  # The first one warms both up.
            start, processor = time.perf_counter(), processor_s(pid)
            await ask(client)
            took = time.perf_counter() - start, processor_s(pid) - processor
            package.stdin.write(json.dumps(sent) + "\n")
            package.stdin.flush()
            original = json.loads(package.stdout.readline())
            if number:
                ours.add(*took)
                theirs.add(*original)
    return ours, theirs


def _show(title: str, item: str, count: int, ours: Took, theirs: Took, out: Console) -> None:
    table = Table(title=title)
    for column in ("what", f"{item}s/s", f"CPU ms/{item}"):
        table.add_column(column, justify="left" if column == "what" else "right")
    rates = [count / statistics.median(took.wall) for took in (ours, theirs)]
    costs = [statistics.median(took.processor) * 1000 / count for took in (ours, theirs)]
    table.add_row("Shoal", f"{rates[0]:.1f}", f"{costs[0]:.1f}")
    table.add_row("the package, called per request", f"{rates[1]:.1f}", f"{costs[1]:.1f}")
    per_round = [b / a for a, b in zip(ours.wall, theirs.wall, strict=True)]
    cost = [b / a for a, b in zip(ours.processor, theirs.processor, strict=True)]
    table.add_row("median ratio", f"{statistics.median(per_round):.2f}", f"{statistics.median(cost):.2f}")
    out.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--texts", type=int, default=128)
    parser.add_argument("--pages", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=("embeddings", "ocr"))
    asked = parser.parse_args()
    out = Console(width=110)
    if asked.only != "ocr":
        embeddings(asked.rounds, asked.texts, asked.threads, out)
    if asked.only != "embeddings":
        ocr(asked.rounds, asked.pages, asked.threads, out)


if __name__ == "__main__":
    main()
