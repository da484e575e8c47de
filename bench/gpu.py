"""Checks and measurements of the kernels on a GPU, in one table with the card's name.

    python bench/gpu.py [--rounds 9] [--threads 1,4,16] [--no-sanitizer]

1  versions                installed packages, driver, card
2  correctness             new random ragged batches of every operation, the tests marked gpu, compute-sanitizer
3  floors                  copies in both directions, bandwidth, cost of a launch
4  resize_norm             with pixels on the device, beside torch and torchvision on the same device
5  from the host           CPU and upload of results, against upload and GPU, by the number of CPU threads

Exits with 1 when a check failed, and with 2 without a GPU. Times on the device are between CUDA events.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import gpu_checks
import numpy as np
from photographs import enlarged, photographs, synthetic
from rich.console import Console
from rich.table import Table
from side_by_side import MISSING, peer

from kernels import backend
from kernels.memory import CudaMemory
from kernels.resize_norm import Packed, pack, resize_norm

ROOT = Path(__file__).resolve().parent.parent
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PACKAGES = (
    "cupy-cuda12x",
    "cupy-cuda13x",
    "numba",
    "numba-cuda",
    "onnxruntime-gpu",
    "onnxruntime",
    "torch",
    "torchvision",
)
Row = tuple[str, str, str]
"""What, value, note."""


class Clock:
    """Timer for work on the device; results are medians of several rounds, in seconds."""

    def __init__(self, cupy: Any, rounds: int) -> None:
        self._cupy = cupy
        self.rounds = rounds

    def device_s(self, run: Callable[[], Any], repeats: int = 10) -> float:
        """Return the device time of one run, between events around `repeats` runs."""
        cuda = self._cupy.cuda
        run()
        taken = []
        for _ in range(self.rounds):
            start, stop = cuda.Event(), cuda.Event()
            start.record()
            for _ in range(repeats):
                run()
            stop.record()
            stop.synchronize()
            taken.append(cuda.get_elapsed_time(start, stop) / 1e3 / repeats)
        return statistics.median(taken)

    def wall_s(self, run: Callable[[], Any]) -> float:
        """Return the wall time of one run until the device has finished."""
        run()
        taken = []
        for _ in range(self.rounds):
            self._cupy.cuda.Device().synchronize()
            began = time.perf_counter()
            run()
            self._cupy.cuda.Device().synchronize()
            taken.append(time.perf_counter() - began)
        return statistics.median(taken)

    def host_s(self, run: Callable[[], Any], repeats: int = 200) -> float:
        """Return the time that the calling thread spends on one run, without waiting for the device."""
        run()
        taken = []
        for _ in range(self.rounds):
            self._cupy.cuda.Device().synchronize()
            began = time.perf_counter()
            for _ in range(repeats):
                run()
            taken.append((time.perf_counter() - began) / repeats)
        self._cupy.cuda.Device().synchronize()
        return statistics.median(taken)


def versions(cupy: Any) -> Iterator[Row]:
    for package in PACKAGES:
        try:
            yield package, importlib.metadata.version(package), ""
        except importlib.metadata.PackageNotFoundError:
            yield package, "not installed", ""
    runtime = cupy.cuda.runtime
    properties = runtime.getDeviceProperties(0)
    yield "CUDA: runtime, driver", f"{runtime.runtimeGetVersion()}, {runtime.driverGetVersion()}", ""
    capability = f"{properties['major']}.{properties['minor']}"
    yield "card", card(cupy), f"compute capability {capability}, {properties['multiProcessorCount']} multiprocessors"
    yield "processors", str(os.cpu_count()), ""


def correctness(seed: int, sanitizer: bool) -> Iterator[tuple[Row, bool]]:
    """Yield rows of the table, each with True when its check passed."""
    for operation, (what, off, allowed) in gpu_checks.run(seed):
        right = off <= allowed
        yield (f"{operation}: {what}", f"off by {off:.4f}", f"{allowed} allowed, seed {seed}"), right
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "tests/kernels",
        "tests/infer/runtimes/test_gpu_stream.py",
        "tests/infer/operators/test_places.py",
        "tests/infer/ensembles/test_on_one_gpu.py",
    ]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    last = ran.stdout.strip().splitlines()[-1] if ran.stdout.strip() else ran.stderr[-200:]
    passed = re.search(r"(\d+) passed", last)
    yield ("tests marked gpu", last, ""), ran.returncode == 0 and passed is not None
    tool = shutil.which("compute-sanitizer") if sanitizer else None
    for check in ("memcheck", "racecheck"):
        if tool is None:
            yield (f"compute-sanitizer {check}", "NOT RUN", "not on PATH" if sanitizer else "--no-sanitizer"), True
            continue
        script = [sys.executable, str(ROOT / "bench" / "gpu_checks.py"), str(seed)]
        ran = subprocess.run([tool, "--tool", check, "--error-exitcode", "9", *script], capture_output=True, text=True)
        summary = [line for line in ran.stdout.splitlines() if "SUMMARY" in line]
        yield (
            (f"compute-sanitizer {check}", summary[-1] if summary else f"exit {ran.returncode}", ""),
            ran.returncode == 0,
        )


def floors(cupy: Any, clock: Clock) -> Iterator[Row]:
    memory = CudaMemory()
    stream = cupy.cuda.get_current_stream()
    for megabytes in (1, 16, 64, 400):
        nbytes = megabytes * 2**20
        on_device = cupy.empty(nbytes, cupy.uint8)
        for kind, host in (("pinned", memory.pinned(nbytes)), ("pageable", np.empty(nbytes, np.uint8))):
            host[:] = 1
            up = clock.wall_s(partial(memory.copy_in, host, on_device, stream))
            down = clock.wall_s(partial(memory.copy_out, on_device, host, stream))
            rates = f"{nbytes / up / 1e9:.1f} GB/s up, {nbytes / down / 1e9:.1f} down"
            yield f"{kind} copy of {megabytes} MB", rates, f"{1e6 * up:.0f} us up, {1e6 * down:.0f} down"
    source, target = cupy.empty(400 * 2**20, cupy.uint8), cupy.empty(400 * 2**20, cupy.uint8)
    seconds = clock.device_s(partial(cupy.copyto, target, source))
    yield "bandwidth of the device, read and write", f"{2 * source.nbytes / seconds / 1e9:,.0f} GB/s", ""
    tiny = to_device(cupy, [np.zeros((4, 4, 3), np.uint8)], (2, 2))
    out = cupy.empty((1, 3, 2, 2), cupy.float16)
    seconds = clock.host_s(partial(resize_norm, tiny, out))
    yield "resize_norm of one tiny image: the caller's thread", f"{1e6 * seconds:.1f} us", "checks and launch"
    yield "the same, on the device", f"{1e6 * clock.device_s(partial(resize_norm, tiny, out)):.1f} us", ""


def replayed(cupy: Any, clock: Clock) -> Iterator[Row]:
    """Measure a launch from a CUDA graph, without checks and preparation."""
    stream = cupy.cuda.Stream(non_blocking=True)
    tiny = to_device(cupy, [np.zeros((4, 4, 3), np.uint8)], (2, 2))
    out = cupy.empty((1, 3, 2, 2), cupy.float16)
    resize_norm(tiny, out, stream=stream)
    stream.synchronize()
    with stream:
        stream.begin_capture()
        resize_norm(tiny, out, stream=stream)
        graph = stream.end_capture()
    seconds = clock.host_s(partial(graph.launch, stream))
    yield "the same, replayed from a CUDA graph: the caller's thread", f"{1e6 * seconds:.1f} us", ""


def to_device(cupy: Any, images: Sequence[np.ndarray], size: tuple[int, int], boxes: Any = None) -> Packed:
    return pack(images, size, boxes).moved(cupy.asarray)


def on_device(cupy: Any, clock: Clock) -> Iterator[Row]:
    """Measure pixels that are on the device already (from nvJPEG, a video decoder, another model).

    All batches exceed the L2 cache.
    """
    real = photographs() or synthetic(8)
    frames = [enlarged(real[n % len(real)], 1080, 1920) for n in range(64)]
    crop = (0.0625 * 1080, 420 + 0.0625 * 1080, 0.9375 * 1080, 1500 - 0.0625 * 1080)
    odd = [frame[:, :1917].copy() for frame in frames]
    cases = (
        ("64 frames 1920 x 1080", frames, None),
        ("64 frames 1917 x 1080: rows not aligned", odd, None),
        ("the same as resize to 256 and centre crop 224", frames, [crop] * 64),
        ("32 ragged, 512 to 2048 pixels a side", synthetic(32, 512, 2048), None),
    )
    bandwidth = (
        400
        * 2**21
        / clock.device_s(partial(cupy.copyto, cupy.empty(400 * 2**20, cupy.uint8), cupy.empty(400 * 2**20, cupy.uint8)))
    )
    for name, images, boxes in cases:
        packed = to_device(cupy, images, (224, 224), boxes)
        out = cupy.empty((len(images), 3, 224, 224), cupy.float16)
        ours = clock.device_s(partial(resize_norm, packed, out, mean=MEAN, std=STD))
        bytes_read = sum(_bytes_of(image, boxes[n] if boxes else None) for n, image in enumerate(images))
        floor = (bytes_read + out.nbytes) / bandwidth
        yield f"resize_norm, {name}, fp16", f"{1e3 * ours:.3f} ms", f"{floor / ours:.0%} of the bandwidth's floor"
        if boxes is None:
            for contender, run in torch_ways(images).items():
                seconds = clock.device_s(run, repeats=2)
                yield f"    {contender}", f"{1e3 * seconds:.3f} ms", f"{seconds / ours:.1f} times ours"
        del packed, out


def _bytes_of(image: np.ndarray, box: Any) -> float:
    return image.nbytes if box is None else 3 * (box[2] - box[0]) * (box[3] - box[1])


def torch_ways(images: Sequence[np.ndarray]) -> dict[str, Callable[[], Any]]:
    """Return the usual implementations in torch on the device; none if torch has no CUDA."""
    torch, functional = peer("torch"), peer("torchvision.transforms.v2.functional")
    if torch is None or not torch.cuda.is_available():
        return {}
    tensors = [torch.from_numpy(image).permute(2, 0, 1).contiguous().cuda() for image in images]
    mean, std = [255 * value for value in MEAN], [255 * value for value in STD]
    found: dict[str, Callable[[], Any]] = {}
    if functional is not None:

        def one_by_one() -> Any:
            small = [functional.resize(tensor, [224, 224], antialias=True) for tensor in tensors]
            return functional.normalize(torch.stack(small).float(), mean, std).half()

        found["torchvision v2, one by one, then stacked"] = one_by_one
    if len({tensor.shape for tensor in tensors}) == 1:
        batch = torch.stack(tensors)
        middle = torch.tensor(mean, device="cuda").view(1, 3, 1, 1)
        spread = torch.tensor(std, device="cuda").view(1, 3, 1, 1)

        def together() -> Any:
            small = torch.nn.functional.interpolate(batch.float(), (224, 224), mode="bilinear", antialias=True)
            return ((small - middle) / spread).half()

        found["torch interpolate(antialias=True), one batch"] = together
    return found


def from_host(cupy: Any, clock: Clock, thread_counts: Sequence[int]) -> Iterator[Row]:
    """Measure 64 decoded frames on the host until their fp16 tensors are on the device."""
    real = photographs() or synthetic(8)
    frames = [enlarged(real[n % len(real)], 1080, 1920) for n in range(64)]
    memory, stream = CudaMemory(), cupy.cuda.get_current_stream()
    out = cupy.empty((64, 3, 224, 224), cupy.float16)
    small = memory.pinned(out.nbytes).view(np.float16).reshape(out.shape)
    packed = pack(frames, (224, 224))
    pinned, pixels = memory.pinned(packed.pixels.nbytes), cupy.empty(packed.pixels.nbytes, cupy.uint8)
    pinned[:] = packed.pixels
    table = cupy.asarray(packed.table_bytes())

    def upload_then_gpu() -> None:
        memory.copy_in(pinned, pixels, stream)
        resize_norm(Packed(pixels, table), out, mean=MEAN, std=STD)

    def pack_then_gpu() -> None:
        pack(frames, (224, 224), out=pinned)
        upload_then_gpu()

    gpu = clock.wall_s(upload_then_gpu)
    yield (
        "upload, then resize on the GPU: frames in the slot",
        f"{64 / gpu:,.0f} frames/s",
        "decoders write into the slot",
    )
    packing = clock.wall_s(pack_then_gpu)
    yield "copy into the slot by one thread, upload, GPU", f"{64 / packing:,.0f} frames/s", ""
    for threads in thread_counts:
        with ThreadPoolExecutor(threads) as pool:

            def cpu_then_upload(pool: ThreadPoolExecutor = pool) -> None:
                resize_norm(frames, small, mean=MEAN, std=STD, pool=pool)
                memory.copy_in(small, out, stream)

            seconds = clock.wall_s(cpu_then_upload)
        note = f"{gpu / seconds:.2f} of the rate of upload and GPU"
        yield f"resize on the CPU, {threads} thread(s), upload results", f"{64 / seconds:,.0f} frames/s", note


def _right(rows: Iterator[Row]) -> Iterator[tuple[Row, bool]]:
    return ((row, True) for row in rows)


def _guarded(section: Iterator[tuple[Row, bool]]) -> Iterator[tuple[Row, bool]]:
    """Yield the rows of a section, or a FAILED row after an error, so that later sections still run."""
    try:
        yield from section
    except Exception as error:
        traceback.print_exc()
        yield ("FAILED", f"{type(error).__name__}: {error}", "the rest of this section did not run"), False


def card(cupy: Any) -> str:
    name = cupy.cuda.runtime.getDeviceProperties(0)["name"]
    return name.decode() if isinstance(name, bytes) else str(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", default="1,4,16", help="numbers of CPU threads, comma-separated")
    parser.add_argument("--no-sanitizer", action="store_true", help="do not run compute-sanitizer")
    args = parser.parse_args()
    if not backend.device_available():
        print(
            f"bench/gpu.py needs a CUDA device, but {backend.why_no_device()}. Nothing was measured.",
            file=sys.stderr,
        )
        sys.exit(2)
    import cupy

    clock = Clock(cupy, args.rounds)
    thread_counts = [int(count) for count in args.threads.split(",")]
    table = Table("what", "value", "note", title=f"kernels on {card(cupy)}")
    sections: list[Iterator[tuple[Row, bool]]] = [
        _right(versions(cupy)),
        correctness(time.time_ns() % 2**32, not args.no_sanitizer),
        _right(floors(cupy, clock)),
        _right(replayed(cupy, clock)),
        _right(on_device(cupy, clock)),
        _right(from_host(cupy, clock, thread_counts)),
    ]
    failed = 0
    for section in sections:
        for row, right in _guarded(section):
            failed += not right
            table.add_row(*row, style="" if right else "red")
        table.add_section()
    console = Console(width=150)
    console.print(table)
    if MISSING:
        console.print(f"not compared, because not installed: {', '.join(sorted(MISSING))}")
    if failed:
        console.print(f"{failed} checks FAILED")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
