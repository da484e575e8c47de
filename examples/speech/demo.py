"""`make speech`: detect speech in twelve concurrent streams of sound, each with its own state in the server.

    recording ── 32 ms ──> ModelStreamInfer, a sequence each ──> speech (silero-vad) ──> probability ──> segments

Segments and probabilities are compared with those of the original package, which processes the recordings one by one.
Exits with 0 when all agree, else with 1. recordings/make.sh generated the recordings.
"""

from __future__ import annotations

import asyncio
import sys
import time
import wave
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import shoal
from examples import originals
from examples.node import with_node
from examples.speech.build import CHUNK, RATE, build
from examples.speech.segments import Segment, segments
from shoal.client import InferRequest

MODEL = "speech"
HERE = Path(__file__).parent
STREAMS = 12
# Chunks of a stream in flight. A microphone sends one at a time; a file can be sent slightly ahead.
AHEAD = 4

# Tolerance of a probability: a batch adds float32 in another order than a single row, and the state carries the error.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class StreamResult:
    """Answers of the server to the chunks of one stream."""

    probabilities: list[float]
    batch_sizes: list[int]


def read(path: Path) -> NDArray[np.float32]:
    """Return the samples of a WAV file, between -1 and 1.

    Raises:
        ValueError: the file is not mono, 16 bits, 16 kHz.
    """
    with wave.open(str(path)) as sound:
        kind = sound.getnchannels(), sound.getsampwidth() * 8, sound.getframerate()
        if kind != (1, 16, RATE):
            raise ValueError(
                f"{path}: expected 1 channel of 16 bits at {RATE} Hz, got {kind}: sox IN -r 16000 -c 1 OUT"
            )
        return np.frombuffer(sound.readframes(sound.getnframes()), "<i2").astype(np.float32) / 32768


async def listen(client: shoal.AsyncClient, sound: NDArray[np.float32], sequence: int) -> StreamResult:
    """Stream the sound chunk by chunk, with the last chunk padded with zeros, and return the answers."""
    chunks = np.pad(sound, (0, -len(sound) % CHUNK)).reshape(-1, 1, CHUNK)
    in_flight = asyncio.Semaphore(AHEAD)

    async def requests() -> AsyncIterator[InferRequest]:
        for number, chunk in enumerate(chunks):
            await in_flight.acquire()
            step = {
                "sequence_id": sequence,
                "sequence_start": number == 0,
                "sequence_end": number == len(chunks) - 1,
                "explain": True,
            }
            yield InferRequest(MODEL, {"audio": chunk}, parameters=step)

    result = StreamResult([], [])
    # The answers of a sequence arrive in the order of its steps.
    async for answer in client.infer_stream(requests()):
        result.probabilities.append(answer["speech"].item())
        result.batch_sizes.append(int(answer.parameters["batch_size"]))
        in_flight.release()
    return result


def compare(name: str, result: StreamResult, samples: int, original: dict[str, Any]) -> bool:
    """Print a comparison with the original package, and return True when the answers agree."""
    ours = segments(result.probabilities, samples)
    theirs = [Segment(*each) for each in original["segments"]]
    same_length = len(result.probabilities) == len(original["probabilities"])
    off = np.abs(np.subtract(result.probabilities, original["probabilities"])).max() if same_length else np.inf
    # False for NaN.
    agrees = ours == theirs and bool(off <= TOLERANCE)
    spoken = ", ".join(f"{each.start / RATE:.2f}-{each.end / RATE:.2f} s" for each in ours)
    batch = sum(result.batch_sizes) / max(len(result.batch_sizes), 1)
    print(
        f"{name}: {spoken}; probabilities within {off:.1e}; batches of {batch:.1f}: {'agrees' if agrees else 'DIFFERS'}"
    )
    if ours != theirs:
        print(f"    the original: {theirs}\n    Shoal:        {ours}")
    return agrees


def main() -> int:
    """Run the example, and return the exit status."""
    originals.folder("silero_vad")
    return with_node(lambda gateway, folder: asyncio.run(_ask(gateway, folder)))


async def _ask(gateway: str, folder: Path) -> int:
    recordings = sorted(HERE.glob("recordings/*.wav"))
    theirs = originals.ask(HERE / "original.py", [str(path) for path in recordings])
    sounds = [read(path) for path in recordings]
    played = [n % len(recordings) for n in range(STREAMS)]
    async with shoal.AsyncClient(gateway) as client:
        await client.models.push(build(folder / "models"))
        start = time.monotonic()
        results = await _listen_to_all(client, [sounds[n] for n in played])
        took = time.monotonic() - start
    seconds = sum(len(sounds[n]) for n in played) / RATE
    print(f"{STREAMS} streams, {seconds:.0f} s of sound in {took:.1f} s")
    agree = [
        compare(f"stream {k + 1}, {recordings[n].stem}", results[k], len(sounds[n]), theirs[n])
        for k, n in enumerate(played)
    ]
    print(f"{sum(agree)} of {STREAMS} streams agree with silero-vad")
    return 0 if all(agree) else 1


async def _listen_to_all(client: shoal.AsyncClient, sounds: Sequence[NDArray[np.float32]]) -> list[StreamResult]:
    return await asyncio.gather(*(listen(client, sound, n + 1) for n, sound in enumerate(sounds)))


if __name__ == "__main__":
    sys.exit(main())
