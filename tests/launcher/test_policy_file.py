"""Policy file of `shoal serve`: every change reaches the workers, whatever came before it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

import pytest

from shoal.access import policy as policies
from shoal.access import tokens
from shoal.access.policy import Policy
from shoal.access.tokens import Signer
from shoal.node.envoy_edge import Edge
from shoal.node.policy_file import PolicyFile
from tests.access.policies import document, write
from tests.breakable import until


class Envoy:
    """Takes policies as an Edge does; fails while `error` is set."""

    def __init__(self) -> None:
        self.applied: list[Policy] = []
        self.error: Exception | None = None

    async def rejected_policies(self) -> int:
        return 0

    def apply(self, policy: Policy) -> None:
        if self.error is not None:
            raise self.error
        self.applied.append(policy)


@pytest.fixture
def signer(tmp_path: Path) -> Signer:
    return tokens.create_signer(tmp_path / "signer.json")


def followed(source: Path, policy: Policy, envoy: Envoy, reports: list[str]) -> PolicyFile:
    return PolicyFile(source, policy, source.with_name("policy.json"), cast(Edge, envoy), reports.append)


def revoked(source: Path) -> tuple[str, ...]:
    """Return the revoked keys that the workers see."""
    found: Any = Policy.model_validate_json(source.with_name("policy.json").read_bytes())
    return tuple(found.revoked)


async def test_a_change_between_the_reading_and_the_first_look_is_in_force(signer: Signer, tmp_path: Path) -> None:
    source, reports = tmp_path / "p.yaml", list[str]()
    write(source, document(signer))
    policy = policies.load(source)
    write(source, document(signer, revoked=["k-1"]))
    async with followed(source, policy, Envoy(), reports):
        await until(lambda: revoked(source) == ("k-1",), "the change of the policy")


async def test_changes_after_a_document_that_breaks_the_parser_are_in_force(
    signer: Signer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, reports = tmp_path / "p.yaml", list[str]()
    write(source, document(signer))
    policy = policies.load(source)
    async with followed(source, policy, Envoy(), reports):
        with monkeypatch.context() as broken:

            def load(path: Path) -> Policy:
                raise AttributeError("of the parser")

            broken.setattr(policies, "load", load)
            os.utime(source, (1, 1))
            await until(lambda: reports, "the report of the error")
        assert "cannot be applied (AttributeError)" in reports[0]
        write(source, document(signer, revoked=["k-1"]))
        await until(lambda: revoked(source) == ("k-1",), "the change of the policy")


async def test_the_former_policy_can_be_restored_after_a_failed_write(signer: Signer, tmp_path: Path) -> None:
    source, reports, envoy = tmp_path / "p.yaml", list[str](), Envoy()
    write(source, document(signer))
    policy = policies.load(source)
    async with followed(source, policy, envoy, reports):
        envoy.error = OSError(28, "No space left on device")
        write(source, document(signer, revoked=["k-1"]))
        await until(lambda: reports, "the report of the error")
        assert "No space left on device" in reports[0]
        assert "write" in reports[0]
        envoy.error = None
        write(source, document(signer))
        await until(lambda: revoked(source) == (), "the former policy")
        await until(lambda: envoy.applied == [policy], "the former policy in Envoy")
