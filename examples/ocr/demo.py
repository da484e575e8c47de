"""`make ocr`: read the text on real images with one ensemble, and compare it with the original package's text.

    bytes ──> decode ──> detect ──> boxes ──> crop ─┬─> angle ──> turn ──> recognise ──> text      (models/)
                                                    └─ each line on its own, batched with lines of other images

The default images are a photographed page and several drawn ones. Exits with 0 when all agree with
rapidocr-onnxruntime, else with 1. Texts must be equal, corners within 2 pixels, scores within 0.02.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import shoal
from examples import originals
from examples.ocr import pages
from examples.ocr.build import build
from examples.ocr.reading import Line, by_the_package, compare, read
from examples.serving import serving
from shoal.errors import ShoalError

AT_ONCE = 4


def main() -> int:
    """Run the example, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="images of your own")
    files: list[Path] = parser.parse_args().files
    originals.folder("rapidocr_onnxruntime")
    try:
        images = {str(file): file.read_bytes() for file in files} or pages.gather()
        with tempfile.TemporaryDirectory(prefix="shoal-ocr-") as folder:
            print("starting shoal serve ...", flush=True)
            with serving(build(Path(folder) / "models")) as (address, _):
                ours = read_all(address, images)
    except ShoalError as err:
        print(f"the example failed: {err.message}", file=sys.stderr)
        return 1
    except (OSError, RuntimeError) as err:
        print(f"the example failed: {err}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: the server is stopped")
        return 130
    return report(images, ours)


def read_all(address: str, images: Mapping[str, bytes]) -> list[list[Line]]:
    """Return Shoal's lines on each image, with several requests in flight."""
    with shoal.Client(address) as client, ThreadPoolExecutor(AT_ONCE) as pool:
        found = list(pool.map(partial(read, client), images.values()))
        for model in ("ocr_detect", "ocr_angle", "ocr_recognise"):
            [seen] = client.models.statistics(model)
            print(f"{model}: {seen.inference_count} rows in {seen.execution_count} executions")
    return found


def report(images: Mapping[str, bytes], ours: list[list[Line]]) -> int:
    """Print the lines and the differences from the package; return 0 when there are none, else 1."""
    theirs = by_the_package(list(images.values()))
    compared = [compare(*pair) for pair in zip(ours, theirs, strict=True)]
    for name, lines, found in zip(images, ours, compared, strict=True):
        print(f"\n{name}: {len(lines) or 'no'} lines")
        for line in lines:
            corners = " ".join(f"{x:.0f},{y:.0f}" for x, y in line.box)
            print(f"  {line.score:.3f}  {line.text:<40} {corners}")
        for wrong in found.wrong:
            print(f"  DIFFERS: {wrong}")
    wrong = sum(bool(found.wrong) for found in compared)
    print(
        f"\n{len(images) - wrong} of {len(images)} images agree with rapidocr-onnxruntime (corners within "
        f"{max(found.off_px for found in compared):.0f} pixels, scores within "
        f"{max(found.off_score for found in compared):.4f})"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
