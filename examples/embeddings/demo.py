"""`make embeddings`: embed the paragraphs of this repository's documentation, and search them with a question.

    text ──> embed: tokenize ──> pad ──> all-MiniLM-L6-v2 ──> pool ──> vector of 384, of length 1       (models/)

Every vector is compared with that of the original package, sentence-transformers, which encodes the same texts one by
one. Exits with 0 when all cosines are above 0.9999, else with 1.
"""

from __future__ import annotations

import asyncio
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import shoal
from examples import originals
from examples.embeddings.build import build
from examples.node import with_node

MODEL = "embed"
AT_ONCE = 32
# The error of reordered float32 sums is below 1e-6. A wrong token, mask or truncation costs far more than 1e-4.
LEAST_COSINE = 0.9999

ODD = (
    "",
    " ",
    "fish",
    "Füße, 漢字, ελληνικά, 🐟🐠",
    "e\u0301 and \u00e9",
    "a\ttab\nand a line",
    "shoal " * 600,
    "x" * 5000,
)
"""Edge cases: empty texts, one word, other scripts, texts longer than the 256 tokens of the model."""

QUESTION = "What happens when a process is killed while a job runs?"

Vectors = NDArray[np.float32]


def paragraphs(most: int) -> list[str]:
    """Return paragraphs of the documentation: real texts of 3 to several hundred words."""
    files = [originals.ROOT / "README.md", *sorted(originals.ROOT.glob("docs/*.md"))]
    found = [part.strip() for file in files for part in re.split(r"\n\s*\n", file.read_text())]
    text = [part for part in found if len(part.split()) > 2 and part[0] not in "|`<#"]
    return text[:: max(1, len(text) // most)][:most]


async def embed(client: shoal.AsyncClient, texts: Sequence[str]) -> Vectors:
    """Return the vectors of `texts`, float32 [n, 384], with one request per text and `AT_ONCE` in flight."""
    slots = asyncio.Semaphore(AT_ONCE)

    async def one(text: str) -> Vectors:
        async with slots:
            answer = await client.infer(MODEL, {"text": np.array([[text.encode()]], object)})
            return answer["embedding"][0]

    return np.stack(await asyncio.gather(*map(one, texts)))


def cosines(ours: Vectors, theirs: Vectors) -> NDArray[np.float64]:
    """Return the cosine of each pair of rows, without the assumption that vectors have length 1."""
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    found: NDArray[np.float64] = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return found


def compare(texts: Sequence[str], ours: Vectors, theirs: Vectors) -> int:
    """Print the agreement; return 0 when all cosines are above LEAST_COSINE, else 1."""
    found = cosines(ours, theirs)
    # Negated, so that NaN counts as wrong.
    wrong = np.flatnonzero(~(found > LEAST_COSINE))
    for n in wrong:
        print(f"cosine {found[n]:.6f}: {texts[n][:80]!r}")
    print(
        f"{len(texts) - len(wrong)} of {len(texts)} vectors agree with sentence-transformers (least {found.min():.7f})"
    )
    return 1 if len(wrong) else 0


def main() -> int:
    """Run the example, and return the exit status."""
    originals.folder("sentence_transformers")
    return with_node(lambda gateway, folder: asyncio.run(_ask(gateway, folder)))


async def _ask(gateway: str, folder: Path) -> int:
    texts = [*paragraphs(60), *ODD]
    async with shoal.AsyncClient(gateway) as client:
        pushed = await client.models.push(build(folder / "models"))
        print(f"pushed {', '.join(each.model.name for each in pushed)}")
        start = time.monotonic()
        ours = await embed(client, texts)
        print(f"{len(texts)} texts in {time.monotonic() - start:.2f} s, {AT_ONCE} in flight")
        [question] = await embed(client, [QUESTION])
    print(f"\n{QUESTION}")
    for n in np.argsort(ours @ question)[::-1][:3]:
        print(f"  {ours[n] @ question:.2f}  {' '.join(texts[n].split())[:120]}")
    print()
    theirs = await asyncio.to_thread(originals.ask, Path(__file__).with_name("original.py"), texts)
    return compare(texts, ours, np.array(theirs, np.float32))


if __name__ == "__main__":
    sys.exit(main())
