"""examples/ocr: pages are read as the original package reads them, by one server, many at once."""

from __future__ import annotations

import asyncio

import cv2
import pytest

import shoal
from examples.ocr import demo
from examples.ocr.build import build
from examples.ocr.pages import pages
from shoal.errors import InvalidArgument
from tests.infer.conformance.instance import Instance


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    root = tmp_path_factory.mktemp("ocr")
    with Instance.serving(build(root / "models"), "h2", root / "log") as instance:
        yield instance.address


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return pages(tmp_path_factory.mktemp("pages"))


def read(address: str, given: list[bytes]) -> list[list[demo.Line]]:
    async def go():
        async with shoal.AsyncClient(address) as client:
            return await demo.read_all(client, given)

    return asyncio.run(go())


def test_every_page_is_read_as_the_original_package_reads_it(address, files):
    ours = read(address, [file.read_bytes() for file in files.values()])
    theirs = demo.original(list(files.values()))
    assert sum(map(len, theirs)) > 30
    assert [demo.differences(*pair) for pair in zip(ours, theirs, strict=True)] == [[]] * len(files)
    # What is not there is not read, and who looks for it is not disappointed.
    by_name = dict(zip(files, ours, strict=True))
    assert by_name["an empty page"] == by_name["a cat, and no text"] == []
    assert any("INV" in line.text for line in by_name["a letter upside down"])


def test_answers_belong_to_their_requests_and_crops_of_several_pages_are_looked_at_together(address, files):
    async def go():
        async with shoal.AsyncClient(address) as client:
            before = await client.models.statistics("ocr_angle")
            lines = await demo.read_all(client, [file.read_bytes() for file in mixed])
            after = await client.models.statistics("ocr_angle")
            return lines, before, after

    names = ["a letter, 400 by 640", "an empty page", "white on black"]
    mixed = [files[name] for name in names] * 4
    lines, before, after = asyncio.run(go())
    alone = read(address, [files[name].read_bytes() for name in names])
    for n, page in enumerate(lines):
        assert demo.differences(page, alone[n % 3]) == []
    crops = after[0].inference_count - before[0].inference_count
    assert crops >= sum(map(len, lines))
    assert after[0].execution_count - before[0].execution_count < crops


@pytest.mark.parametrize("broken", [b"", b"no image", "cut"])
def test_a_broken_file_is_named_and_harms_no_other(address, files, broken):
    page = files["a letter, 400 by 640"].read_bytes()
    given = page[: len(page) // 2] if broken == "cut" else broken

    async def go():
        async with shoal.AsyncClient(address) as client:
            return await asyncio.gather(
                demo.read(client, page), demo.read(client, given), demo.read(client, page), return_exceptions=True
            )

    first, wrong, last = asyncio.run(go())
    assert isinstance(wrong, InvalidArgument)
    assert "step 0, model 'ocr_decode'" in wrong.message
    assert len(first) == len(last) == 6


def test_differences_are_seen():
    box = ((0.0, 0.0), (9.0, 0.0), (9.0, 5.0), (0.0, 5.0))
    line = demo.Line("Shoal: many requests", 0.9, box)
    moved = demo.Line(line.text, 0.9, tuple((x + 3, y) for x, y in box))
    other = demo.Line("Shoal: few requests", 0.9, box)
    assert demo.differences([line], [line]) == []
    assert len(demo.differences([], [line])) == 1
    assert len(demo.differences([line], [])) == 1
    assert len(demo.differences([moved], [line])) == 2
    assert len(demo.differences([other], [line])) == 1


def test_pages_are_images(files):
    assert all(cv2.imread(str(file)) is not None for file in files.values())
