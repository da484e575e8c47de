"""resize_norm: every version against the reference, and the CPU's against Pillow.

Tolerances, in grey levels of 255 where not said otherwise:
    cpu             0.002   float32 sums of at most some hundred taps; weights are made in float64
    cuda            0.02    coordinates are float32: half a last place at 1,000 pixels, in both directions, times 255
    float16 out     0.0005 of the value more: its own rounding is 2^-11
    cuda, not float32   0.05 more: bytes are added to 2^15 before they are summed (resize_norm.cu)
    uint8 out       1       values beside a half round either way
    Pillow          1       it rounds to uint8 between its two passes
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kernels.resize_norm import IMAGE, Packed, cpu, pack, packed_bytes, reference, resize_norm
from tests.kernels.conftest import Place

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = [(1, 1), (1, 17), (23, 1), (2, 3), (40, 37), (7, 64), (31, 33), (64, 48), (5, 300), (90, 16)]


def image(rng: np.random.Generator, height: int, width: int, channels: int = 3) -> np.ndarray:
    """Noise with hard edges: nothing is more sensitive to a wrong weight."""
    pixels = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
    pixels[height // 2 :, : width // 2] = 255
    return pixels


def poisoned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    return np.full(shape, 77 if np.dtype(dtype) == np.uint8 else np.nan, dtype)


def truth(images: list[np.ndarray], size: tuple[int, int], boxes: Any, antialias: bool) -> np.ndarray:
    """float64 [n, h, w, c], 0 to 255, straight from the definition."""
    made = []
    for pixels, box in zip(images, boxes or [None] * len(images), strict=True):
        y0, x0, y1, x1 = box or (0, 0, *pixels.shape[:2])
        down = reference.filter_matrix(pixels.shape[0], y0, (y1 - y0) / size[0], size[0], antialias)
        across = reference.filter_matrix(pixels.shape[1], x0, (x1 - x0) / size[1], size[1], antialias)
        made.append(np.einsum("yh,hwc,xw->yxc", down, pixels.astype(np.float64), across))
    return np.stack(made)


def tolerance(place: Place, dtype: Any) -> float:
    if np.dtype(dtype) == np.uint8:
        return 1.0
    if place.name in ("reference", "cpu"):
        return 0.002
    return 0.02 if np.dtype(dtype) == np.float32 else 0.07


def run(place: Place, images: list[np.ndarray], boxes: Any = None, **options: Any) -> np.ndarray:
    """Through the public operation, packed, as the versions for a device take them."""
    out = place.put(options.pop("out"))
    layout = options.get("layout", "CHW")
    size = out.shape[2:] if layout == "CHW" else out.shape[1:3]
    packed = pack(images, size, boxes)
    table = packed.table_bytes() if place.name == "device" else packed.table
    given = Packed(place.put(packed.pixels), place.put(table))
    assert resize_norm(given, out, channels=images[0].shape[2], **options) is out
    return place.get(out)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("size", [(1, 1), (8, 32), (9, 33), (20, 70)])
def test_any_sizes_to_any_size(place: Place, size: tuple[int, int], antialias: bool) -> None:
    rng = np.random.default_rng(size[0])
    images = [image(rng, *shape) for shape in SIZES]
    out = run(place, images, out=poisoned((len(images), 3, *size), np.float32), antialias=antialias)
    expected = truth(images, size, None, antialias).transpose(0, 3, 1, 2)
    assert np.abs(out * 255 - expected).max() <= tolerance(place, np.float32)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint8])
@pytest.mark.parametrize("layout", ["CHW", "HWC"])
@pytest.mark.parametrize("channels", [1, 3])
def test_outputs_of_every_kind(place: Place, dtype: Any, layout: str, channels: int) -> None:
    rng = np.random.default_rng(5)
    images = [image(rng, *shape, channels) for shape in SIZES]
    swap = channels == 3
    options: dict[str, Any] = {"layout": layout, "swap": swap}
    mean, std = np.array(MEAN[:channels]), np.array(STD[:channels])
    if dtype != np.uint8:
        options.update(mean=mean, std=std)
    shape = (channels, 12, 19) if layout == "CHW" else (12, 19, channels)
    out = run(place, images, out=poisoned((len(images), *shape), dtype), **options).astype(np.float64)
    out = out.transpose(0, 2, 3, 1) if layout == "CHW" else out
    out = out[..., ::-1] if swap else out
    rounding = 0.0005 * np.abs(out) * 255 * std if dtype == np.float16 else 0
    grey = out if dtype == np.uint8 else (out * std + mean) * 255
    assert (np.abs(grey - truth(images, (12, 19), None, True)) <= tolerance(place, dtype) + rounding).all()


def test_boxes_at_edges_and_between_pixels(place: Place) -> None:
    rng = np.random.default_rng(8)
    images = [image(rng, 40, 61) for _ in range(6)]
    boxes = [
        None,
        (0, 0, 1, 1),
        (39, 60, 40, 61),
        (0.25, 3.5, 17.75, 4.25),
        (20, 0, 40, 61),
        (1e-3, 1e-3, 39.999, 60.9),
    ]
    out = run(place, images, boxes, out=poisoned((6, 3, 10, 35), np.float32))
    assert np.abs(out * 255 - truth(images, (10, 35), boxes, True).transpose(0, 3, 1, 2)).max() <= 4 * tolerance(
        place, np.float32
    )  # Boxes are float32 in the table.


def test_rows_of_a_multiple_of_16_bytes_and_strips_wider_than_one(place: Place) -> None:
    """The two ways of the CUDA version to load, and widths that need several strips."""
    rng = np.random.default_rng(9)
    images = [image(rng, 19, width) for width in (16, 32, 112, 1040, 1041, 2000)]
    out = run(place, images, out=poisoned((6, 3, 9, 40), np.float16))
    expected = truth(images, (9, 40), None, True).transpose(0, 3, 1, 2)
    assert np.abs(out.astype(np.float64) * 255 - expected).max() <= tolerance(place, np.float16) + 0.0005 * 255


@pytest.mark.parametrize("width", [16, 19])
@pytest.mark.parametrize("offset", [1, 5, 15])
def test_an_image_anywhere_in_the_buffer(place: Place, offset: int, width: int) -> None:
    """`pack` begins images at multiples of 16 bytes; a table of the caller's own need not."""
    picture = image(np.random.default_rng(offset), 12, width)
    packed = pack([picture], (6, 6))
    packed.table["offset"] = offset
    pixels = np.zeros(-(-(offset + picture.size) // 16) * 16, np.uint8)
    pixels[offset : offset + picture.size] = picture.ravel()
    table = packed.table_bytes() if place.name == "device" else packed.table
    out = place.put(poisoned((1, 3, 6, 6), np.float32))
    resize_norm(Packed(place.put(pixels), place.put(table)), out)
    expected = truth([picture], (6, 6), None, True).transpose(0, 3, 1, 2)
    assert np.abs(place.get(out) * 255 - expected).max() <= tolerance(place, np.float32)


def test_one_launch_for_a_ragged_batch(place: Place) -> None:
    rng = np.random.default_rng(3)
    run(place, [image(rng, *shape) for shape in SIZES], out=poisoned((len(SIZES), 3, 8, 8), np.float32))
    if place.name.startswith("shim"):
        assert place.launches == ["resize_norm<float, 3>"]


@settings(max_examples=60)
@given(st.data())
def test_random_ragged_batches_on_the_cpu(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    shapes = data.draw(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=5))
    images = [image(rng, *shape) for shape in shapes]
    boxes = []
    for height, width in shapes:
        y0, x0 = rng.uniform(0, height - 0.5), rng.uniform(0, width - 0.5)
        boxes.append((y0, x0, rng.uniform(y0 + 0.4, height), rng.uniform(x0 + 0.4, width)))
    size = data.draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    antialias = data.draw(st.booleans())
    out = poisoned((len(images), 3, *size), np.float32)
    resize_norm(images, out, boxes=boxes, antialias=antialias)
    assert np.abs(out * 255 - truth(images, size, boxes, antialias).transpose(0, 3, 1, 2)).max() <= 0.01


@pytest.mark.parametrize("box", [None, (3.0, 10.0, 200.0, 170.5)])
def test_within_a_grey_level_of_pillow(box: Any) -> None:
    rng = np.random.default_rng(4)
    images = [image(rng, 211, 173), image(rng, 240, 320)]
    made = resize_norm(images, size=(56, 64), dtype=np.uint8, layout="HWC", boxes=[box, box])
    for pixels, out in zip(images, made, strict=True):
        crop = (box[1], box[0], box[3], box[2]) if box else None
        theirs = np.asarray(Image.fromarray(pixels).resize((64, 56), Image.Resampling.BILINEAR, box=crop))
        assert np.abs(out.astype(int) - theirs).max() <= 1


def test_without_a_pack_with_views_and_two_dimensions(place: Place) -> None:
    rng = np.random.default_rng(6)
    whole = image(rng, 50, 60)
    views = [whole[10:40, 5:50], whole[..., ::-1], whole[::2, ::3]]
    out = poisoned((3, 3, 16, 16), np.float32)
    if place.name == "device":
        pytest.skip("arrays one by one are for the host")
    resize_norm(views, out)
    assert np.abs(out * 255 - truth(views, (16, 16), None, True).transpose(0, 3, 1, 2)).max() <= 0.02
    grey = resize_norm([whole[..., 0]], size=(16, 16))
    assert grey.shape == (1, 1, 16, 16)


def test_a_pool_gives_the_same_numbers() -> None:
    rng = np.random.default_rng(7)
    with ThreadPoolExecutor(4) as pool:
        for count in (1, 3, 9):
            images = [image(rng, *shape) for shape in SIZES[:count]]
            alone = resize_norm(images, size=(13, 21), dtype=np.float16)
            assert np.array_equal(resize_norm(images, size=(13, 21), dtype=np.float16, pool=pool), alone)


def test_a_low_wide_image_is_filtered_across_once_and_not_for_each_row_of_the_output() -> None:
    images = [np.zeros((1, 65_536, 3), np.uint8)]

    def seconds(height: int) -> float:
        times = []
        for _ in range(4):
            begun = time.thread_time()
            resize_norm(images, size=(height, 8))
            times.append(time.thread_time() - begun)
        return min(times)

    assert seconds(736) < 10 * seconds(1)


def test_many_threads_at_once() -> None:
    """What ends a process with numba's own threading layer."""
    rng = np.random.default_rng(2)
    images = [image(rng, *shape) for shape in SIZES]
    expected = resize_norm(images, size=(17, 31))
    wrong: list[int] = []

    def call() -> None:
        with ThreadPoolExecutor(2) as pool:
            for _ in range(5):
                if not np.array_equal(resize_norm(images, size=(17, 31), pool=pool), expected):
                    wrong.append(1)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_forked_child_runs_too() -> None:
    """What numba's OpenMP layer answers with a dead child."""
    code = """
import os
import numpy as np
from concurrent.futures import ThreadPoolExecutor
from kernels.resize_norm import resize_norm
pictures = [np.full((40, 40, 3), 9, np.uint8)] * 9
with ThreadPoolExecutor(2) as pool:
    resize_norm(pictures, size=(8, 8), dtype=np.uint8, pool=pool)
child = os.fork()
if child == 0:
    with ThreadPoolExecutor(2) as pool:
        os._exit(int((resize_norm(pictures, size=(8, 8), dtype=np.uint8, pool=pool) != 9).any()))
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_table_that_cannot_be_written_compiles_nothing_anew() -> None:
    picture = np.zeros((4, 4, 3), np.uint8)
    resize_norm([picture], size=(2, 2))
    before = len(cpu.resize_images.signatures)
    packed = pack([picture], (2, 2))
    packed.table.flags.writeable = False
    resize_norm(packed, size=(2, 2))
    assert len(cpu.resize_images.signatures) == before


def test_nothing_of_the_packing_is_left_to_chance() -> None:
    rng = np.random.default_rng(1)
    images = [image(rng, 5, 7), image(rng, 3, 3)]
    room = np.full(400, 99, np.uint8)
    packed = pack(images, (4, 4), out=room)
    assert packed.pixels.size == packed_bytes(images) == 112 + 32
    assert packed.pixels.base is room or packed.pixels is room
    assert packed.pixels[105:112].tolist() == [0] * 7
    assert packed.table["offset"].tolist() == [0, 112]
    assert (room[144:] == 99).all()


class OnDevice:
    __cuda_array_interface__ = None


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"images": []}, ValueError, "no images"),
    ({"images": [np.zeros((4, 4, 3), np.float32)]}, ValueError, r"image 0 is float32\[4, 4, 3\]"),
    ({"images": [np.zeros((4, 4, 4), np.uint8)]}, ValueError, r"image 0 is uint8\[4, 4, 4\]"),
    ({"images": [np.zeros((0, 4, 3), np.uint8)]}, ValueError, r"image 0 is uint8\[0, 4, 3\]"),
    ({"images": [OnDevice()]}, TypeError, "image 0 is on a GPU; pass images on a GPU as Packed"),
    ({"images": ["a.jpg"]}, TypeError, "image 0 must be a NumPy array, not str"),
    ({"images": [np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.uint8)]}, ValueError, "of 1 and of 3 channels"),
    ({"size": None}, ValueError, "without out, size must be"),
    ({"size": (0, 4)}, ValueError, "without out, size must be"),
    ({"layout": "NHWC"}, ValueError, "layout 'NHWC' is neither CHW nor HWC"),
    ({"mean": (1, 2)}, ValueError, "mean must be 3 finite numbers"),
    ({"std": (1, 2, float("nan"))}, ValueError, "std must be 3 finite numbers"),
    ({"std": (1, 0, 1)}, ValueError, "std must not be 0"),
    ({"dtype": np.uint8, "mean": (0, 0, 0)}, ValueError, "take no mean"),
    ({"dtype": np.float64}, ValueError, r"out is float64\[1, 3, 4, 4\]"),
    ({"boxes": [(0, 0, 5, 4)]}, ValueError, r"box 0 \(0, 0, 5, 4\) is not"),
    ({"boxes": [(2, 0, 2, 4)]}, ValueError, "box 0"),
    ({"boxes": []}, ValueError, "0 boxes for 1 images"),
    ({"out": np.zeros((1, 3, 4), np.float32)}, ValueError, "out must have 4 dimensions"),
    ({"out": np.zeros((2, 3, 4, 4), np.float32)}, ValueError, r"out is float32\[2, 3, 4, 4\]; expected"),
    ({"out": np.zeros((1, 3, 4, 8), np.float32)[..., ::2]}, ValueError, "not contiguous"),
    ({"out": np.frombuffer(bytes(192), np.float32).reshape(1, 3, 4, 4)}, ValueError, "out is read-only"),
    ({"out": np.frombuffer(bytearray(193), np.float32, 48, 1).reshape(1, 3, 4, 4)}, ValueError, "a multiple of its 4"),
    ({"out": np.zeros((1, 3, 6, 6), np.float32)}, ValueError, "size .* is not that of out"),
    ({"swap": True, "images": [np.zeros((4, 4), np.uint8)]}, ValueError, "swap is for three channels"),
    ({"stream": object()}, TypeError, "stream= is for arrays on a GPU"),
]


@pytest.mark.parametrize(("change", "error", "told"), BAD)
def test_what_is_wrong_is_named(change: dict[str, Any], error: type[Exception], told: str) -> None:
    options: dict[str, Any] = {"images": [np.zeros((4, 4, 3), np.uint8)], "size": (4, 4), **change}
    with pytest.raises(error, match=told):
        resize_norm(options.pop("images"), options.pop("out", None), **options)


def packed_of(**changes: Any) -> Packed:
    packed = pack([np.zeros((4, 4, 3), np.uint8)], (2, 2))
    for name, value in changes.items():
        packed.table[name] = value
    return packed


@pytest.mark.parametrize(
    ("packed", "told"),
    [
        (packed_of(offset=16), "row 0 of the table"),
        (packed_of(offset=-16), "row 0 of the table"),
        (packed_of(height=2**31 - 1, width=2**31 - 1), "row 0 of the table"),
        (packed_of(height=0), "row 0 of the table"),
        (packed_of(sy=np.nan), "row 0 of the table"),
        (packed_of(y0=4), "row 0 of the table"),
        (Packed(np.zeros(40, np.uint8), packed_of().table), "no multiple of 16"),
        (Packed(np.zeros((3, 16), np.uint8), packed_of().table), r"pixels must be uint8 \[bytes\]"),
        (Packed(np.zeros(48, np.uint8), np.zeros((1, 32), np.uint8)), r"the table must be \[n\] of IMAGE"),
    ],
)
def test_a_table_cannot_point_outside(packed: Packed, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        resize_norm(packed, size=(2, 2))


def test_packed_images_carry_their_boxes() -> None:
    with pytest.raises(ValueError, match=r"give boxes to pack\(\)"):
        resize_norm(packed_of(), size=(2, 2), boxes=[None])
    assert resize_norm(Packed(np.zeros(0, np.uint8), np.zeros(0, IMAGE)), size=(2, 2)).shape == (0, 3, 2, 2)
