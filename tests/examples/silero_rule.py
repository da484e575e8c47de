"""Runs where silero-vad is installed: probabilities and samples in (JSON, stdin), the package's own segments out."""

from __future__ import annotations

import json
import sys

import silero_vad


def main() -> None:
    answers = []
    for probabilities, samples in json.load(sys.stdin):
        found = silero_vad.get_speech_timestamps_from_probs(probabilities, audio_length_samples=samples)
        answers.append([[each["start"], each["end"]] for each in found])
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
