"""`make speech`: who speaks when, while it is spoken. Twelve streams at once, each with its own state in the server.

    recording ── 32 ms ──> ModelStreamInfer, a sequence each ──> speech (silero-vad) ──> probability ──> segments

Segments and probabilities are compared with those of the original package, which hears the recordings one by one.
Exits 0 when all agree, 1 when one does not. recordings/make.sh says how the recordings were made.
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
AHEAD = 4
# Chunks of a stream that are under way: a microphone sends one at a time, a file may run ahead a little.

TOLERANCE = 1e-4
# Of a probability: a batch adds float32 in another order than a row alone, and the state carries that on.


@dataclass(frozen=True)
class Heard:
    """What the server said of one stream."""

    probabilities: list[float]
    batch_sizes: list[int]


def read(path: Path) -> NDArray[np.float32]:
    """The samples of a WAV file, between -1 and 1.

    Raises:
        ValueError: it is not mono, of 16 bits, at 16 kHz.
    """
    with wave.open(str(path)) as sound:
        kind = sound.getnchannels(), sound.getsampwidth() * 8, sound.getframerate()
        if kind != (1, 16, RATE):
            raise ValueError(
                f"{path}: expected 1 channel of 16 bits at {RATE} Hz, got {kind}: sox IN -r 16000 -c 1 OUT"
            )
        return np.frombuffer(sound.readframes(sound.getnframes()), "<i2").astype(np.float32) / 32768


async def listen(client: shoal.AsyncClient, sound: NDArray[np.float32], sequence: int) -> Heard:
    """Streams the sound chunk by chunk, the last one filled up with zeros."""
    chunks = np.pad(sound, (0, -len(sound) % CHUNK)).reshape(-1, 1, CHUNK)
    under_way = asyncio.Semaphore(AHEAD)

    async def requests() -> AsyncIterator[InferRequest]:
        for number, chunk in enumerate(chunks):
            await under_way.acquire()
            step = {
                "sequence_id": sequence,
                "sequence_start": number == 0,
                "sequence_end": number == len(chunks) - 1,
                "explain": True,
            }
            yield InferRequest(MODEL, {"audio": chunk}, parameters=step)

    heard = Heard([], [])
    async for answer in client.infer_stream(requests()):  # A sequence's answers come in the order of its steps.
        heard.probabilities.append(answer["speech"].item())
        heard.batch_sizes.append(int(answer.parameters["batch_size"]))
        under_way.release()
    return heard


def compare(name: str, heard: Heard, samples: int, original: dict[str, Any]) -> bool:
    """Says whether the server's answers are the original package's."""
    ours = segments(heard.probabilities, samples)
    theirs = [Segment(*each) for each in original["segments"]]
    same_length = len(heard.probabilities) == len(original["probabilities"])
    off = np.abs(np.subtract(heard.probabilities, original["probabilities"])).max() if same_length else np.inf
    agrees = ours == theirs and bool(off <= TOLERANCE)  # NaN is no agreement.
    spoken = ", ".join(f"{each.start / RATE:.2f}-{each.end / RATE:.2f} s" for each in ours)
    batch = sum(heard.batch_sizes) / max(len(heard.batch_sizes), 1)
    print(
        f"{name}: {spoken}; probabilities within {off:.1e}; batches of {batch:.1f}: {'agrees' if agrees else 'DIFFERS'}"
    )
    if ours != theirs:
        print(f"    the original: {theirs}\n    here:         {ours}")
    return agrees


def main() -> int:
    """Runs the example; returns the exit status."""
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
        heard = await _listen_to_all(client, [sounds[n] for n in played])
        took = time.monotonic() - start
    seconds = sum(len(sounds[n]) for n in played) / RATE
    print(f"{STREAMS} streams, {seconds:.0f} s of sound in {took:.1f} s")
    agree = [
        compare(f"stream {k + 1}, {recordings[n].stem}", heard[k], len(sounds[n]), theirs[n])
        for k, n in enumerate(played)
    ]
    print(f"{sum(agree)} of {STREAMS} streams agree with silero-vad")
    return 0 if all(agree) else 1


async def _listen_to_all(client: shoal.AsyncClient, sounds: Sequence[NDArray[np.float32]]) -> list[Heard]:
    return await asyncio.gather(*(listen(client, sound, n + 1) for n, sound in enumerate(sounds)))


if __name__ == "__main__":
    sys.exit(main())
