"""The attack suite in short: bystanders are served right during each attack, and the server keeps within its memory.

`make siege` measures times; here they are not asserted. Attacks run for a third of a second, one after the other, on
one server.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from bench.siege import models, servers
from bench.siege.attack import Siege
from bench.siege.bystander import OK, PATIENCE_S, Bystander, Call
from bench.siege.catalogue import CATALOGUE, attacks_at
from bench.siege.row import CEILINGS_MIB, TENANTS, is_allowed
from bench.siege.servers import Server
from tests.long_form import by_form

SECONDS = by_form(0.3, 2.0)
RATE = 25.0
STOP_S = 30.0
"""The drain is 5 s; the cores are busy."""
MAX_CONNECTIONS = 200


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("siege")
    models.write(folder / "models")
    with servers.serve(servers.here(), folder / "models", folder) as running:
        yield running


class Bystanders:
    """One of the attacker's tenant, and one of another; each calls for half a second longer than the attack."""

    def __init__(self, address: str) -> None:
        self._each = [Bystander(address, tenant) for tenant in TENANTS]
        start, end = time.monotonic(), time.monotonic() + SECONDS + 0.5
        self.expected = int((end - start) * RATE)
        self._threads = [threading.Thread(target=each.run, args=(start, end, RATE)) for each in self._each]

    def __enter__(self) -> Bystanders:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        for thread in self._threads:
            thread.join()

    def calls(self) -> list[list[Call]]:
        return [each.calls for each in self._each]


@pytest.mark.parametrize("attack", attacks_at("serve"))
def test_bystanders_are_served_during(attack: str, server: Server) -> None:
    # A process of the tests may open 1024 files.
    attacks = [replace(each, connections=min(each.connections, MAX_CONNECTIONS)) for each in CATALOGUE[attack]]
    servers.reset_peak(server.infer)
    before = servers.resident_mib(server.infer)
    siege = Siege(attacks, server.address)
    # The server may still be busy with the last attack.
    assert siege.begin(time.monotonic() + PATIENCE_S), siege.tally
    with Bystanders(server.address) as bystanders:
        tally = siege.run(time.monotonic() + SECONDS)
    own, others = bystanders.calls()
    assert [outcome for _, _, outcome in others if outcome != OK] == []
    assert [outcome for _, _, outcome in own if not is_allowed(outcome, attacks)] == []
    assert len(own) == len(others) == bystanders.expected
    assert servers.peak_mib(server.infer) - before <= CEILINGS_MIB["infer"], tally
    assert server.is_running()


def test_sigterm_ends_a_server_under_attack(server: Server) -> None:
    stopping = threading.Thread(target=server.stop)
    siege = Siege(CATALOGUE["all-at-once"], server.address)
    assert siege.begin(time.monotonic() + PATIENCE_S), siege.tally
    threading.Timer(0.5, stopping.start).start()
    siege.run(time.monotonic() + 2.0)
    stopping.join(STOP_S)
    assert not stopping.is_alive()
    assert server.process.returncode == 0
