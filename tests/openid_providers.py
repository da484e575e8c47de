"""A real OpenID provider, oidc-provider on Node, for tests that start and stop it."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

FOLDER = Path(__file__).parent / "clients" / "node"
READY_S = 60.0
BASIC = "Basic YXBwOmFwcC1zZWNyZXQ="
"""Credentials of the client `app` of oidc.js."""


def signing_key(kid: str) -> dict[str, Any]:
    """Return a new private key as a JWK."""
    jwk = jwt.algorithms.RSAAlgorithm.to_jwk(rsa.generate_private_key(65537, 2048), as_dict=True)
    return {**{name: value for name, value in jwk.items() if name != "key_ops"}, "kid": kid, "use": "sig"}


class OidcProvider:
    """The provider at `address` (`host:port`), which signs with the first of its keys and publishes them all.

    Entering the block waits until it serves; leaving ends it.
    """

    def __init__(self, address: str, keys: Sequence[dict[str, Any]], log: Path) -> None:
        self._address = address
        self._keys = keys
        self._log = log

    def __enter__(self) -> OidcProvider:
        if shutil.which("node") is None or not (FOLDER / "node_modules" / "oidc-provider").is_dir():
            pytest.fail("the OpenID provider needs its packages: run tools/clients.sh")
        port = self._address.rpartition(":")[2]
        with self._log.open("wb") as out:
            self._process = subprocess.Popen(
                ["node", "oidc.js", port], cwd=FOLDER, stdin=subprocess.PIPE, stdout=out, stderr=subprocess.STDOUT
            )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"keys": self._keys}).encode())
        self._process.stdin.close()
        deadline = time.monotonic() + READY_S
        while not self._is_serving():
            if self._process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the OpenID provider does not serve: {self._log.read_text()[-2000:]}")
            time.sleep(0.05)
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.wait()

    def token(self) -> str:
        """Return a new access token of the client `app`."""
        form = b"grant_type=client_credentials&scope=use"
        request = urllib.request.Request(f"http://{self._address}/token", form, {"authorization": BASIC})
        with urllib.request.urlopen(request, timeout=30) as response:
            return str(json.load(response)["access_token"])

    def _is_serving(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self._address}/jwks", timeout=30) as response:
                return bool(response.status == 200)
        except urllib.error.URLError:
            return False
