"""The examples beside the packages of their models, with one call of the package per request.

    python bench/beside_originals.py [--rounds 5] [--texts 128] [--pages 16] [--threads 1] [--only ocr]
                                      [--triton-venv FOLDER]

`embeddings`: texts of this repository's documentation through `shoal serve` (the ensemble of examples/embeddings, 32
requests in flight, one text each), and through sentence-transformers, one call per text. `ocr`: the images of
examples/ocr, 4 in flight, and through rapidocr-onnxruntime with its default settings, one call per image.

--triton-venv names an environment with nvidia-pytriton and the imports of the steps. Both workloads then also run in an
ensemble of a real Triton's python backend (beside_originals_triton.py), with the same client. All contenders have equal
numbers of threads for the model and run interleaved; figures are medians of rounds. CPU is the time of the server's
processes without the client, or of the package's process. On a machine with other load, trust the CPU time.
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
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import beside_originals_triton
import numpy as np
from rich.console import Console
from rich.table import Table

import shoal
from examples import originals
from examples.embeddings import demo
from examples.embeddings.build import build
from examples.ocr.build import build as build_ocr
from examples.ocr.pages import gather
from examples.ocr.reading import LARGEST_OFF_PX, LEAST_SCORE, Line
from examples.serving import serving

PAGES_AT_ONCE = 4

SHOAL, PACKAGE = "Shoal", "the package, called per request"

TRITONS = {"batch": "Triton, a batch padded together", "own": "Triton, each length by itself"}
"""Contenders by the padding mode of beside_originals_triton.py."""

TRITONS_READING = {6: "Triton, six lines padded together", 1: "Triton, each line by itself"}
"""Contenders by the number of lines that are recognised together; six is the package's default."""

Servers = dict[str, tuple[str, int]]
"""Address and pid by contender; Shoal is the first."""

TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Took:
    """Wall time and CPU time of each round, in seconds."""

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    def add(self, wall: float, processor: float) -> None:
        self.wall.append(wall)
        self.processor.append(processor)


def processor_s(pid: int) -> float:
    """Return the CPU seconds of a process and its descendants, from /proc."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS + sum(map(processor_s, _children(pid)))


def _children(pid: int) -> list[int]:
    """Return the child processes of all threads of a process."""
    found: list[int] = []
    for listed in Path(f"/proc/{pid}/task").glob("*/children"):
        # The children of a thread that has ended are listed at another thread.
        with suppress(FileNotFoundError, ProcessLookupError):
            found += map(int, listed.read_text().split())
    return found


def sentences(most: int, least_words: int, most_words: int) -> list[str]:
    """Return single sentences and parts of them: such as a chat sends, and short ones such as a search box sends."""
    found = [part.strip() for text in demo.paragraphs(10_000) for part in re.split(r"(?<=[.:;])\s+", text)]
    fit = [" ".join(part.split()) for part in found if least_words <= len(part.split()) <= most_words]
    return fit[:: max(1, len(fit) // most)][:most]


def embeddings(rounds: int, texts: int, threads: int, triton: Path | None, out: Console) -> None:
    """Measure texts through Shoal, through Triton if there is one, and with the package itself."""
    kinds = {
        "phrases of 2 to 7 words": sentences(texts, 2, 7),
        "sentences of 8 to 40 words": sentences(texts, 8, 40),
        "paragraphs": demo.paragraphs(texts),
    }
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        models = build(work / "models")
        servers = {SHOAL: stack.enter_context(serving(models, SHOAL_INFER_THREADS=str(threads)))}
        for padded, name in TRITONS.items() if triton else ():
            ensemble = beside_originals_triton.embeddings(models, padded, threads)
            servers[name] = stack.enter_context(beside_originals_triton.serving(triton, ensemble, work / padded))
        package = stack.enter_context(_package("beside_originals_embeddings.py", "sentence_transformers", threads))
        asyncio.run(_agree(servers, [*demo.ODD, *kinds["paragraphs"]]))
        for kind, some in kinds.items():
            taken = asyncio.run(_rounds(servers, package, partial(demo.embed, texts=some), some, rounds))
            _show(f"{len(some)} {kind}, {threads} threads", "embedding", len(some), taken, _left_out(triton), out)


def _left_out(triton: Path | None) -> str:
    return "" if triton else "Triton left out: no --triton-venv"


async def _agree(servers: Servers, texts: Sequence[str]) -> None:
    """Raise RuntimeError when a server's embeddings differ from Shoal's."""
    answers = {}
    for name, (address, _) in servers.items():
        async with shoal.AsyncClient(address) as client:
            answers[name] = await demo.embed(client, texts)
    for name, vectors in answers.items():
        least = demo.cosines(answers[SHOAL], vectors).min()
        if not least > demo.LEAST_COSINE:
            raise RuntimeError(f"{name}: embeddings differ from Shoal's: least cosine {least:.6f} of {len(texts)}")


def ocr(rounds: int, pages: int, threads: int, triton: Path | None, out: Console) -> None:
    """Measure the images of examples/ocr, repeated, as `embeddings` measures texts."""
    found = gather()
    images = [list(found.values())[n % len(found)] for n in range(pages)]
    sent = [base64.b64encode(image).decode() for image in images]
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        models = build_ocr(work / "models")
        servers = {SHOAL: stack.enter_context(serving(models, SHOAL_INFER_THREADS=str(threads)))}
        for together, name in TRITONS_READING.items() if triton else ():
            ensemble = beside_originals_triton.ocr(together, threads)
            started = beside_originals_triton.serving(triton, ensemble, work / str(together))
            servers[name] = stack.enter_context(started)
        package = stack.enter_context(_package("beside_originals_ocr.py", "rapidocr_onnxruntime", threads))
        asyncio.run(_read_the_same(servers, found))
        taken = asyncio.run(_rounds(servers, package, partial(_read, images=images), sent, rounds))
    title = f"{pages} pages, {threads} threads, {PAGES_AT_ONCE} in flight"
    _show(title, "page", pages, taken, _left_out(triton), out)


async def _read(client: shoal.AsyncClient, images: Iterable[bytes]) -> list[list[Line]]:
    """Return the lines on each image."""
    slots = asyncio.Semaphore(PAGES_AT_ONCE)

    async def one(image: bytes) -> list[Line]:
        async with slots:
            answer = await client.infer("ocr", {"image": np.array([[image]], object)}, timeout=120)
        texts, scores = answer["texts"].reshape(-1), answer["scores"].reshape(-1)
        lines = zip(texts, scores, answer["boxes"].reshape(-1, 4, 2), strict=True)
        return [Line(text.decode(), float(score), box) for text, score, box in lines if score >= LEAST_SCORE]

    return await asyncio.gather(*map(one, images))


async def _read_the_same(servers: Servers, images: Mapping[str, bytes]) -> None:
    """Raise RuntimeError when a server's text differs from Shoal's. Spaces may differ where padding affects them."""
    read = {}
    for name, (address, _) in servers.items():
        async with shoal.AsyncClient(address) as client:
            read[name] = await _read(client, images.values())
    for name, pages in read.items():
        spaceless = name == TRITONS_READING[6]
        for image, ours, theirs in zip(images, read[SHOAL], pages, strict=True):
            if _texts(ours, spaceless) != _texts(theirs, spaceless):
                raise RuntimeError(f"{name}: the text of {image} differs from Shoal's: {theirs}, not {ours}")
            if any(np.abs(a.box - b.box).max() > LARGEST_OFF_PX for a, b in zip(ours, theirs, strict=True)):
                raise RuntimeError(f"{name}: the boxes of {image} differ from Shoal's: {theirs}, not {ours}")


def _texts(lines: Sequence[Line], spaceless: bool) -> list[str]:
    return [line.text.replace(" ", "") if spaceless else line.text for line in lines]


@contextmanager
def _package(script: str, package: str, threads: int) -> Iterator[subprocess.Popen[str]]:
    """Run the original package in a process of its own, which answers a line of JSON with its wall and CPU time."""
    python = originals.folder(package) and originals.VENV / "bin/python"
    environ = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [python, Path(__file__).with_name(script), str(threads)]
    with subprocess.Popen(command, stdin=-1, stdout=-1, stderr=subprocess.DEVNULL, text=True, env=environ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


async def _rounds(
    servers: Servers,
    package: subprocess.Popen[str],
    ask: Callable[[shoal.AsyncClient], Awaitable[object]],
    sent: Sequence[str],
    rounds: int,
) -> dict[str, Took]:
    taken = {name: Took() for name in (*servers, PACKAGE)}
    assert package.stdin is not None
    assert package.stdout is not None
    async with AsyncExitStack() as stack:
        clients = {
            name: await stack.enter_async_context(shoal.AsyncClient(address)) for name, (address, _) in servers.items()
        }
        # The first round warms up.
        for number in range(rounds + 1):
            took = {name: await _server(clients[name], pid, ask) for name, (_, pid) in servers.items()}
            package.stdin.write(json.dumps(sent) + "\n")
            package.stdin.flush()
            took[PACKAGE] = json.loads(package.stdout.readline())
            for name, (wall, processor) in took.items() if number else ():
                taken[name].add(wall, processor)
    return taken


async def _server(
    client: shoal.AsyncClient, pid: int, ask: Callable[[shoal.AsyncClient], Awaitable[object]]
) -> tuple[float, float]:
    start, processor = time.perf_counter(), processor_s(pid)
    await ask(client)
    return time.perf_counter() - start, processor_s(pid) - processor


def _show(title: str, item: str, count: int, taken: dict[str, Took], left_out: str, out: Console) -> None:
    """Print one row per contender; ratios are medians of the rounds' ratios."""
    table = Table(title=title, caption=left_out)
    for column in ("what", f"{item}s/s", f"CPU ms/{item}", "Shoal's rate to it", "its CPU to Shoal's"):
        table.add_column(column, justify="left" if column == "what" else "right")
    ours = taken[SHOAL]
    for name, theirs in taken.items():
        rate = count / statistics.median(theirs.wall)
        cost = statistics.median(theirs.processor) * 1000 / count
        times = statistics.median(b / a for a, b in zip(ours.wall, theirs.wall, strict=True))
        costs = statistics.median(b / a for a, b in zip(ours.processor, theirs.processor, strict=True))
        table.add_row(name, f"{rate:.1f}", f"{cost:.1f}", f"{times:.2f}", f"{costs:.2f}")
    out.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--texts", type=int, default=128)
    parser.add_argument("--pages", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=("embeddings", "ocr"))
    parser.add_argument("--triton-venv", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    if options.triton_venv:
        beside_originals_triton.check(options.triton_venv)
    out = Console(width=120)
    if options.only != "ocr":
        embeddings(options.rounds, options.texts, options.threads, options.triton_venv, out)
    if options.only != "embeddings":
        ocr(options.rounds, options.pages, options.threads, options.triton_venv, out)


if __name__ == "__main__":
    main()
