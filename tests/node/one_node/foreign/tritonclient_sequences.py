"""Runs in the environment of an unmodified tritonclient: sends steps of sequences as it is told, line by line.

    python tritonclient_sequences.py HOST:PORT [http]     (model `steps`, x [1,1] FP32 -> total [1,1])

A line of stdin is a JSON list of steps, `{"id": 7, "x": 1, "start": true, "end": false}`. With `{"stream": ...}` before
them they go over one stream, else one after the other by unary calls, each over the next of several connections. Prints
one line for each: totals and who computed them, or `[status, message]`.
"""

from __future__ import annotations

import itertools
import json
import queue
import sys
from typing import Any

import numpy as np
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

PATIENCE_S = 60


triton: Any = tritonclient.http if sys.argv[2:] == ["http"] else tritonclient.grpc


def told(result: Any) -> dict[str, Any]:
    total = float(result.as_numpy("total")[0, 0])
    response = result.get_response()
    if isinstance(response, dict):
        return {"total": total, "replica": response["parameters"]["replica"]}
    return {"total": total, "replica": response.parameters["replica"].string_param}


def arguments(step: dict[str, Any]) -> dict[str, Any]:
    given = triton.InferInput("x", [1, 1], "FP32")
    given.set_data_from_numpy(np.full((1, 1), step.get("x", 1), np.float32))
    return {
        "model_name": "steps",
        "inputs": [given],
        "sequence_id": step["id"],
        "sequence_start": step.get("start", False),
        "sequence_end": step.get("end", False),
        "parameters": {"explain": True},
    }


def unary(client: Any, step: dict[str, Any]) -> Any:
    try:
        patience = {"client_timeout": PATIENCE_S} if triton is tritonclient.grpc else {}
        return told(client.infer(**arguments(step), **patience))
    except InferenceServerException as err:
        return [str(err.status()), str(err.message())]


def streamed(client: Any, steps: list[dict[str, Any]]) -> list[Any]:
    answers: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    for step in steps:
        client.async_stream_infer(**arguments(step))
    found = [answers.get(timeout=PATIENCE_S) for _ in steps]
    client.stop_stream()
    return [told(result) if error is None else ["error", str(error)] for result, error in found]


def main(url: str) -> None:
    if triton is tritonclient.http:
        clients = [triton.InferenceServerClient(url) for _ in range(3)]
    else:
        clients = [triton.InferenceServerClient(url, channel_args=[("own", n)]) for n in range(3)]
    turn = itertools.cycle(clients)
    for line in sys.stdin:
        steps = json.loads(line)
        if isinstance(steps, dict):
            print(json.dumps(streamed(next(turn), steps["stream"])), flush=True)
        else:
            print(json.dumps([unary(next(turn), step) for step in steps]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
