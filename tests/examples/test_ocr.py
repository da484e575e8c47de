"""examples/ocr on a real server: what it reads is what rapidocr-onnxruntime reads, and each answer is its request's."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import shoal
from examples.ocr import demo, pages
from examples.ocr.build import build
from examples.ocr.reading import Line, compare, read
from examples.serving import serving
from shoal.errors import InvalidArgument
from tests.long_form import by_form

IMAGES = by_form(8, 16)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """The address and the pid of a server with the models of the example."""
    models = build(tmp_path_factory.mktemp("ocr") / "models")
    # Two threads for the models, whatever the machine has.
    with serving(models, SHOAL_INFER_THREADS="2") as address_and_pid:
        yield address_and_pid


@pytest.fixture(scope="module")
def client(served: tuple[str, int]) -> Iterator[shoal.Client]:
    with shoal.Client(served[0]) as client:
        yield client


def texts(lines: list[Line]) -> list[str]:
    return [line.text for line in lines]


def test_the_example_agrees_with_the_original_package(repository_root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "examples.ocr.demo"], cwd=repository_root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 of 8 images agree with rapidocr-onnxruntime" in done.stdout
    assert "histogram of grey values:" in done.stdout
    assert "Handle with care" in done.stdout


def test_the_example_fails_when_a_file_is_no_image(
    served: tuple[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.png").write_bytes(pages.gather()["receipt.png"][:2000])
    # The server of these tests instead of one more.
    monkeypatch.setattr(demo, "serving", lambda _: contextlib.nullcontext(served))
    monkeypatch.setattr(sys, "argv", ["demo", str(tmp_path / "broken.png")])
    assert demo.main() == 1
    said = capsys.readouterr().err
    assert "the example failed: in ensemble 'ocr', step 0, model 'ocr_decode': " in said
    assert "Traceback" not in said


def test_an_image_without_text_has_no_lines(client: shoal.Client) -> None:
    answer = client.infer("ocr", {"image": np.array([[pages.gather()["empty.png"]]], object)})
    shapes = {name: answer[name].shape for name in ("texts", "scores", "boxes")}
    assert shapes == {"texts": (0, 1), "scores": (0, 1), "boxes": (1, 0, 4, 2)}


def test_an_upside_down_line_reads_as_the_upright_one(client: shoal.Client) -> None:
    image = pages.drawn(["Handle with care"], (640, 160), 48)
    upright, turned = (read(client, pages.png(each)) for each in (image, image.rotate(180)))
    assert texts(upright) == texts(turned) == ["Handle with care"]


@pytest.mark.parametrize("broken", [b"", b"no image", pages.png(pages.drawn(["cut"], (99, 99), 30))[:400]])
def test_what_is_no_image_is_refused_and_says_why(client: shoal.Client, broken: bytes) -> None:
    with pytest.raises(InvalidArgument, match=r"in ensemble 'ocr', step 0, model 'ocr_decode': .*image"):
        read(client, broken)


def test_images_at_once_get_their_own_lines(client: shoal.Client) -> None:
    # Of one size, and lines of at most 320 pixels, so that images and lines may share executions where that saves time.
    images = [pages.png(pages.drawn([f"No. {n * 37}", f"{n * 1234} km"], (320, 200), 36)) for n in range(1, IMAGES + 1)]
    alone = [read(client, image) for image in images]
    before = recognised(client)
    with ThreadPoolExecutor(len(images)) as pool:
        together = list(pool.map(partial(read, client), images))
    for n, (one, other) in enumerate(zip(alone, together, strict=True), 1):
        assert str(n * 37) in texts(one)[0]
        assert compare(one, other).wrong == ()
    assert recognised(client) - before == sum(map(len, alone))


def recognised(client: shoal.Client) -> int:
    """Return the number of lines that were recognised."""
    [seen] = client.models.statistics("ocr_recognise")
    return seen.inference_count
