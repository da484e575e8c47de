"""Kernels on this machine's CPU beside the usual alternatives: OpenCV, Pillow, torchvision, ONNX Runtime.

    python bench/kernels_cpu.py [OPERATION ...] [--rounds 7] [--threads 1]

Installed alternatives are measured, missing ones listed. Ours is the first row. Every row shows the error of its result
against the float64 reference, or against ours, because an alternative may do less work. With one thread the CPU time is
measured, with more threads the wall time. Each operation has one function, in this file, in `before_models.py` or in
`after_models.py`.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
from after_models import nms_cases, pool_normalize_cases, quantize_rows_cases, softmax_topk_cases
from before_models import pad_tokens_cases, tabular_cases
from photographs import enlarged, photographs, synthetic
from rich.console import Console
from side_by_side import Case, onnx_model, peer, processor, session, show, wall

from kernels.resize_norm import reference, resize_norm

MEAN, STD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)


def resize_norm_cases(threads: int) -> Iterator[Case]:
    """Yield cases of ragged pictures to 224 x 224 float32 CHW, normalised: all steps between decoder and model."""
    real = photographs()
    sets = {
        "32 synthetic, 400 to 1200 pixels a side": synthetic(32),
        f"{len(real)} photographs, 300 to 1411 pixels a side": real,
        "4 photographs enlarged to 1920 x 1080": [enlarged(picture, 1080, 1920) for picture in real[:4]],
    }
    for name, pictures in sets.items():
        if pictures:
            for antialias in (True, False):
                yield _resize_case(name, pictures, antialias, threads)


def _resize_case(name: str, pictures: list[np.ndarray], antialias: bool, threads: int) -> Case:
    out = np.empty((len(pictures), 3, 224, 224), np.float32)
    pool = ThreadPoolExecutor(threads) if threads > 1 else None
    ours = partial(resize_norm, pictures, out, mean=MEAN, std=STD, antialias=antialias, pool=pool)
    one_by_one = _antialiased(pictures) if antialias else _bilinear(pictures)
    runs: dict[str, Callable[[], Any]] = {"shoal": ours}
    for peer_name, one in one_by_one.items():
        runs[peer_name] = partial(_each, one, out, pool)
    cv2 = peer("cv2")
    if cv2 is not None and not antialias:
        # blobFromImages only scales: it does not support a standard deviation.
        runs["OpenCV blobFromImages"] = partial(_blob, cv2, pictures, out)
    if antialias and peer("onnx") is not None and peer("onnxruntime") is not None:
        runs["ONNX Runtime Resize"] = partial(_each, _ort_resize(pictures, threads), out, None)
    truth = _truth(pictures[:8], antialias)
    notes = {}
    for contender, run in runs.items():
        run()
        grey = np.abs((out[: len(truth)] * STD[:, None, None] + MEAN[:, None, None]) * 255 - truth)
        notes[contender] = f"off by {grey.max():.2f} at most, {grey.mean():.2f} on average"
    title = f"resize_norm, antialias {'on' if antialias else 'off'}, {threads} thread(s): {name}"
    return Case(title, len(pictures), "images", runs, notes)


def _antialiased(pictures: list[np.ndarray]) -> dict[str, Callable[[int], np.ndarray]]:
    found: dict[str, Callable[[int], np.ndarray]] = {}
    pillow, torchvision, cv2 = peer("PIL.Image"), peer("torchvision.transforms.v2.functional"), peer("cv2")
    if torchvision is not None:
        torch = peer("torch")
        tensors = [torch.from_numpy(picture).permute(2, 0, 1) for picture in pictures]
        mean, std = (255 * MEAN).tolist(), (255 * STD).tolist()

        def tv(n: int) -> np.ndarray:
            small = torchvision.resize(tensors[n], [224, 224], antialias=True)
            return torchvision.normalize(small.float(), mean, std).numpy()

        found["torchvision v2, uint8"] = tv
    if pillow is not None:
        made = [pillow.fromarray(picture) for picture in pictures]
        found["Pillow + NumPy"] = lambda n: _normalised(
            np.asarray(made[n].resize((224, 224), pillow.Resampling.BILINEAR))
        )
    if cv2 is not None:
        found["OpenCV INTER_AREA + NumPy"] = lambda n: _normalised(
            cv2.resize(pictures[n], (224, 224), interpolation=cv2.INTER_AREA)
        )
    return found


def _bilinear(pictures: list[np.ndarray]) -> dict[str, Callable[[int], np.ndarray]]:
    cv2 = peer("cv2")
    if cv2 is None:
        return {}
    return {"OpenCV INTER_LINEAR + NumPy": lambda n: _normalised(cv2.resize(pictures[n], (224, 224)))}


def _normalised(small: np.ndarray) -> np.ndarray:
    return ((small * np.float32(1 / 255) - MEAN) / STD).transpose(2, 0, 1)


def _blob(cv2: Any, pictures: list[np.ndarray], out: np.ndarray) -> None:
    out[:] = cv2.dnn.blobFromImages(pictures, 1 / 255, (224, 224))
    out -= MEAN[:, None, None]
    out /= STD[:, None, None]


def _ort_resize(pictures: list[np.ndarray], threads: int) -> Callable[[int], np.ndarray]:
    """Return the runner of a preprocessing model such as users write: float, resize with antialias, normalise."""
    make, numbers = peer("onnx").helper, peer("onnx").numpy_helper.from_array
    model = onnx_model(
        [
            make.make_node("Cast", ["x"], ["f"], to=1),
            make.make_node("Transpose", ["f"], ["t"], perm=[0, 3, 1, 2]),
            make.make_node("Resize", ["t", "", "", "sizes"], ["r"], mode="linear", antialias=1),
            make.make_node("Mul", ["r", "scale"], ["m"]),
            make.make_node("Add", ["m", "bias"], ["y"]),
        ],
        [make.make_tensor_value_info("x", 2, [1, "h", "w", 3])],
        [make.make_tensor_value_info("y", 1, [1, 3, 224, 224])],
        [
            numbers(np.array([1, 3, 224, 224]), "sizes"),
            numbers((1 / (255 * STD)).reshape(1, 3, 1, 1), "scale"),
            numbers((-MEAN / STD).reshape(1, 3, 1, 1), "bias"),
        ],
    )
    made = session(model, threads)
    return lambda n: made.run(None, {"x": pictures[n][None]})[0][0]


def _each(one: Callable[[int], np.ndarray], out: np.ndarray, pool: Executor | None) -> None:
    def put(n: int) -> None:
        out[n] = one(n)

    list((pool.map if pool else map)(put, range(len(out))))


def _truth(pictures: Iterable[np.ndarray], antialias: bool) -> np.ndarray:
    made = []
    for picture in pictures:
        height, width = picture.shape[:2]
        down = reference.filter_matrix(height, 0, height / 224, 224, antialias)
        across = reference.filter_matrix(width, 0, width / 224, 224, antialias)
        made.append(np.einsum("yh,hwc,xw->cyx", down, picture.astype(np.float64), across, optimize=True))
    return np.stack(made)


OPERATIONS: dict[str, Callable[[int], Iterable[Case]]] = {
    "resize_norm": resize_norm_cases,
    "pad_tokens": pad_tokens_cases,
    "tabular": tabular_cases,
    "pool_normalize": pool_normalize_cases,
    "softmax_topk": softmax_topk_cases,
    "quantize_rows": quantize_rows_cases,
    "nms": nms_cases,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operations", nargs="*", choices=[*OPERATIONS, []], help="default: all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    # Our pool has one task per picture. A library's own thread pool would run in addition.
    os.environ["OMP_NUM_THREADS"] = "1"
    with suppress(AttributeError):
        peer("torch").set_num_threads(1)
    with suppress(AttributeError):
        peer("cv2").setNumThreads(args.threads)
    console = Console(width=130)
    clock = processor if args.threads == 1 else wall
    console.print(f"{os.cpu_count()} processors; {args.rounds} rounds, interleaved; medians of {clock.__name__} time")
    for name in args.operations or OPERATIONS:
        show(OPERATIONS[name](args.threads), args.rounds, console, clock)


if __name__ == "__main__":
    main()
