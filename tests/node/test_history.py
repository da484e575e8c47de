"""History of a node under load: `shoal top` has the past at once, and it begins anew after a failover of coord."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import shoal
from shoal.client import History
from shoal.errors import ShoalError

PATIENCE_S = 120.0


@contextmanager
def load(gateway: str) -> Iterator[None]:
    """Call the model until the end of the block; calls that fail count for nothing."""
    stop = threading.Event()

    def call() -> None:
        with shoal.Client(gateway) as client:
            while not stop.wait(0.05):
                try:
                    client.infer("double", {"x": np.ones((1, 4), np.float32)}, timeout=10)
                except ShoalError:
                    continue

    thread = threading.Thread(target=call)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def until(found: Callable[[], Any], what: str) -> Any:
    """Return the first true value of `found`; a call that fails meanwhile counts as none, and is printed."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            if value := found():
                return value
        except ShoalError as err:
            print(what, err)
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


def two_readings(client: shoal.Client, other_than: History | None = None) -> History | None:
    """Return a history with two readings, that is not the one of a coord which was killed."""
    found = client.history()
    rates = found.rows.get("double 1", {}).get("rate", ())
    is_other = other_than is None or (found.coord, found.since) != (other_than.coord, other_than.since)
    if len(rates) >= 2 and rates[-1] > 0 and is_other:
        return found
    print(found.coord, found.since, rates, [(node.name, node.missing) for node in found.nodes])
    return None


def test_top_has_the_past_from_the_gateway_and_says_that_it_begins_anew(
    node: Any, onnx_models: Path, tmp_path: Path
) -> None:
    one = node("--replicas", "coord=2")
    one.shoal("models", "push", str(onnx_models / "double.onnx"))
    with shoal.Client(one.gateway) as client, load(one.gateway):

        def seen() -> tuple[History, Any, Any, str] | None:
            """Return the figures of the client and of three commands; None while not all can be had.

            The leader may change, and on a busy machine infer may not answer in time.
            """
            history = two_readings(client)
            if history is None:
                return None
            there = json.loads(one.shoal("top", "--once", "--json", elsewhere=tmp_path).stdout)
            here = json.loads(one.shoal("top", "--once", "--json", "--by", "instance", "--every", "0.5").stdout)
            text = one.shoal("top", "--since", "30m").stdout
            # The gateway asks both coords in turn, and both give the leader's.
            is_steady = {client.history().since for _ in range(8)} == {history.since}
            rates = [row["rate"] for row in there["rows"] if row["name"] == "double 1"]
            return (history, there, here, text) if is_steady and any(rates) else None

        before, there, here, text = until(seen, "coord has read the node twice under load")
        past = there["past"]
        assert [each.name for each in before.nodes] == ["local"]
        assert past["coord"] == before.coord
        assert len(past["rows"]["double 1"]["rate"]) >= 2
        assert any(past["rows"]["double 1"]["p99_ms"])
        # On the node's own machine, too, and with what each process uses.
        assert here["past"]["since"] == past["since"]
        assert any(here["past"]["rows"]["local/infer-0"]["cpu"])
        assert f"when the history of {before.coord} began" in text

        one.kill(before.coord.partition("/")[2])
        # The other one leads or, on a busy machine, this one again, with a history of its own.
        after = until(lambda: two_readings(client, before), "a coord that has started since reads the node")
        anew = json.loads(one.shoal("top", "--once", "--json", elsewhere=tmp_path).stdout)["past"]
        # On a busy machine, that one may have led before, and have an earlier beginning.
        assert after.since != before.since
        assert (anew["coord"], anew["since"]) != (past["coord"], past["since"])
