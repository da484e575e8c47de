"""Answers of silero-vad, in an environment that has it: paths of recordings on stdin (JSON), answers on stdout."""

from __future__ import annotations

import json
import sys
import wave

import numpy as np
import silero_vad
import torch


def read(path: str) -> torch.Tensor:
    """Return the samples, between -1 and 1. The package's own reader would need torchaudio."""
    with wave.open(path) as sound:
        return torch.from_numpy(np.frombuffer(sound.readframes(sound.getnframes()), "<i2").astype(np.float32) / 32768)


def main() -> None:
    model = silero_vad.load_silero_vad(onnx=True)
    answers = []
    for path in json.load(sys.stdin):
        sound = read(path)
        found = silero_vad.get_speech_timestamps(sound, model)
        probabilities = model.audio_forward(sound, 16_000)[0].tolist()
        answers.append({"segments": [[each["start"], each["end"]] for each in found], "probabilities": probabilities})
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
