"""Preprocessing of JPEGs of mixed sizes for an image model: decode_image and resize_norm beside other libraries.

    python bench/operations.py [--rounds 7] [--images 32] [--threads 2]

All contenders run in this process, without a transport: sessions of the runtime `kernels` as an ensemble calls them,
OpenCV and Pillow in handwritten code, torchvision if installed. Rounds are interleaved; figures are medians. On a
machine with other load, trust the CPU time. The table shows the difference of each contender's pixels to Pillow's:
OpenCV's resizes use other filters.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from services.infer.operators.kernels_runtime import KernelsRuntime, OperationSession
from services.infer.runtimes.runtime import About, SessionOptions
from shoal.inference.v2 import model_config_pb2 as pb

SIZE = 224
MEAN, STD = np.array((0.485, 0.456, 0.406), np.float32), np.array((0.229, 0.224, 0.225), np.float32)

Work = Callable[[Sequence[bytes]], Any]


def jpegs(count: int) -> list[bytes]:
    """Return JPEGs of 400 to 1200 pixels per side: waves, edges and noise."""
    rng = np.random.default_rng(0)
    files = []
    for _ in range(count):
        height, width = rng.integers(400, 1200, 2)
        y, x = np.mgrid[0:height, 0:width].astype(np.float32)
        waves = [127 + 100 * np.sin(x / 37 + y / 91), 127 + 100 * np.cos(x / 53), 127 + 80 * np.sign(np.sin(y / 29))]
        image = np.stack(waves, -1) + rng.normal(0, 6, (height, width, 3))
        files.append(
            cv2.imencode(".jpg", image.clip(0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()
        )
    return files


def session(operation: str, threads: int, **parameters: str) -> OperationSession:
    values = {"operation": operation, **parameters}
    config = pb.ModelConfig(parameters={key: {"string_value": value} for key, value in values.items()})
    return KernelsRuntime().load(Path("1"), SessionOptions(threads, about=About("m", config=config)))


def operations(threads: int, batch: int) -> Work:
    decode = session("decode_image", threads)
    affine = {"mean": ",".join(map(str, MEAN)), "std": ",".join(map(str, STD))}
    resize = session("resize_norm", threads, size=str(SIZE), **affine)

    def work(files: Sequence[bytes]) -> Any:
        results = []
        for at in range(0, len(files), batch):
            data = np.array(files[at : at + batch], object).reshape(-1, 1)
            pixels = decode.run_rows({"image": data}, ["image"]).values[0]
            results.append(resize.run_rows({"image": pixels}, ["image"]).values[0])
        return np.concatenate(results)

    return work


def normalised(pixels: np.ndarray) -> np.ndarray:
    return ((pixels.astype(np.float32) / np.float32(255) - MEAN) / STD).transpose(2, 0, 1)


def with_opencv(data: bytes, how: int) -> np.ndarray:
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    return normalised(cv2.resize(pixels, (SIZE, SIZE), interpolation=how))


def with_pillow(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data)).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return normalised(np.asarray(image))


def with_torchvision(data: bytes) -> np.ndarray:
    import torch
    from torchvision.io import decode_jpeg
    from torchvision.transforms.v2 import functional

    pixels = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    resized = functional.resize(pixels, [SIZE, SIZE], antialias=True)
    unit = functional.to_dtype(resized, torch.float32, scale=True)
    made: np.ndarray = functional.normalize(unit, MEAN.tolist(), STD.tolist()).numpy()
    return made


def each(pool: ThreadPoolExecutor, one: Callable[[bytes], np.ndarray], files: Sequence[bytes]) -> Any:
    return np.stack(list(pool.map(one, files)))


def contenders(threads: int, images: int, pool: ThreadPoolExecutor) -> dict[str, Work]:
    found: dict[str, Work] = {
        f"operations, batches of {images}": operations(threads, images),
        "operations, one by one": operations(threads, 1),
        "OpenCV, INTER_AREA": partial(each, pool, partial(with_opencv, how=cv2.INTER_AREA)),
        "OpenCV, INTER_LINEAR (no antialias)": partial(each, pool, partial(with_opencv, how=cv2.INTER_LINEAR)),
        "Pillow": partial(each, pool, with_pillow),
    }
    if importlib.util.find_spec("torchvision") is not None:
        import torch

        # The pool provides the threads.
        torch.set_num_threads(1)
        found["torchvision v2"] = partial(each, pool, with_torchvision)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    files = jpegs(options.images)
    with ThreadPoolExecutor(options.threads) as pool:
        works = contenders(options.threads, options.images, pool)
        results = {name: work(files) for name, work in works.items()}
        took: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
        for _ in range(options.rounds):
            for name, work in works.items():
                start, processor = time.perf_counter(), time.process_time()
                work(files)
                took[name].append((time.perf_counter() - start, time.process_time() - processor))
    show(files, results, took, options.threads)


def show(
    files: Sequence[bytes], results: dict[str, Any], took: dict[str, list[tuple[float, float]]], threads: int
) -> None:
    shape = [len(files), 3, SIZE, SIZE]
    table = Table(title=f"{len(files)} JPEGs, {sum(map(len, files)) / 1e6:.1f} MB, to {shape}; {threads} threads")
    columns = ("what", "images/s", "CPU ms/image", "CPU ratio", "levels off Pillow: most", "mean")
    for column in columns:
        table.add_column(column, justify="left" if column == "what" else "right")
    first = statistics.median(processor for _, processor in next(iter(took.values())))
    scale = 255 * STD.reshape(3, 1, 1)
    for name, pairs in took.items():
        seconds, processor = (statistics.median(column) for column in zip(*pairs, strict=True))
        off = np.abs(results[name] - results["Pillow"]) * scale
        figures = processor * 1000 / len(files), processor / first, off.max(), off.mean()
        table.add_row(name, f"{len(files) / seconds:,.0f}", *(f"{figure:.2f}" for figure in figures))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
