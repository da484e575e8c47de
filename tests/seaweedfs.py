"""Real object store for tests: SeaweedFS, which serves S3, in one process.

weed (session)  one server for the whole run; a test uses a prefix of its own there (`weed.prefix()`), which costs
                nothing, or a bucket of its own (`make_bucket`), which costs some volumes
WeedProcess     a server for one test, which the test may kill, freeze and restart
"""

from __future__ import annotations

import json
import sys
import time
import uuid
from collections.abc import Mapping
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

from obstore.store import S3Store

from tests.breakable import PATIENCE_S, Process
from tests.free_ports import free_port

BUCKET = "shoal"
"""Bucket that exists from the start."""
KEY, SECRET = "shoal-key", "shoal-secret"
_REGION = "us-east-1"
_NAMES = ("master", "volume", "filer", "s3", "admin")


class WeedProcess(Process):
    """A SeaweedFS with one identity that has all rights. Its data is in `folder` and survives a kill."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        free = [free_port() for _ in range(2 * len(_NAMES))]
        ports, self._grpc_ports = (dict(zip(_NAMES, some, strict=True)) for some in (free[::2], free[1::2]))
        self.endpoint = f"http://127.0.0.1:{ports['s3']}"
        command = _command(folder, ports, self._grpc_ports)
        super().__init__(command, folder / "weed.log", {"TMPDIR": str(folder)})

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        # A killed server leaves these sockets, whatever TMPDIR is.
        for name, port in self._grpc_ports.items():
            Path(f"/tmp/seaweedfs-{name}-grpc-{port}.sock").unlink(missing_ok=True)

    @property
    def access(self) -> dict[str, str]:
        """Environment variables for a process that uses the server, in the form that all S3 tools read."""
        return {
            "AWS_ENDPOINT": self.endpoint,
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": _REGION,
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def prefix(self, bucket: str = BUCKET) -> str:
        """Return a URL that no other test uses."""
        return f"s3://{bucket}/{uuid.uuid4().hex[:16]}"

    def store(self, url: str, **changed: Any) -> S3Store:
        """Return an obstore store at `url` (`s3://bucket/prefix`). `changed` overrides credentials or the endpoint."""
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        defaults: dict[str, Any] = {"endpoint": self.endpoint, "access_key_id": KEY, "secret_access_key": SECRET}
        return S3Store(
            bucket,
            prefix=prefix or None,
            region=_REGION,
            client_options={"allow_http": True},
            retry_config={"retry_timeout": timedelta(seconds=2)},
            virtual_hosted_style_request=False,
            **{**defaults, **changed},
        )

    def make_bucket(self, name: str) -> None:
        with closing(self.client()) as client:
            client.create_bucket(Bucket=name)

    def drop_bucket(self, name: str) -> None:
        """Delete a bucket with its content."""
        with closing(self.client()) as client:
            client.delete_bucket(Bucket=name)

    def client(self) -> Any:
        """Return a botocore client, for buckets, which obstore cannot create. The caller closes the client."""
        # Imported here: the import takes half a second, and most tests do not need it.
        from botocore.config import Config
        from botocore.session import Session

        return Session().create_client(
            "s3",
            region_name=_REGION,
            endpoint_url=self.endpoint,
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            config=Config(retries={"total_max_attempts": 1}, connect_timeout=2, read_timeout=10, proxies={}),
        )

    def wait_until_ready(self) -> None:
        """Wait until a write succeeds: the ports are open long before that."""
        deadline = time.monotonic() + PATIENCE_S
        while not self._takes_a_write():
            assert self.is_running(), self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, f"SeaweedFS did not become ready:\n{self.log.read_text()[-3000:]}"
            time.sleep(0.05)

    def _takes_a_write(self) -> bool:
        from botocore.exceptions import BotoCoreError, ClientError

        with closing(self.client()) as client:
            try:
                client.put_object(Bucket=BUCKET, Key="ready", Body=b"x")
                return bool(client.get_object(Bucket=BUCKET, Key="ready")["Body"].read() == b"x")
            except (BotoCoreError, ClientError):
                return False


def _command(folder: Path, ports: Mapping[str, int], grpc_ports: Mapping[str, int]) -> list[str]:
    identity = {"name": "shoal", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]}
    identities = folder / "s3.json"
    identities.write_text(json.dumps({"identities": [identity]}))
    data = folder / "data"
    data.mkdir(exist_ok=True)
    argv = [str(Path(sys.executable).parent / "weed"), "mini", f"-dir={data}", f"-bucket={BUCKET}"]
    argv += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-s3.config={identities}", "-s3.autoCreateBucket=false"]
    for name in _NAMES:
        argv += [f"-{name}.port={ports[name]}", f"-{name}.port.grpc={grpc_ports[name]}"]
    # No other listeners, no telemetry, no files in the temporary folder.
    argv += ["-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"]
    # A single master needs no votes of others.
    argv += ["-master.electionTimeout=1s"]
    argv += [f"-filer.localSocket={folder}/f.sock", f"-s3.localSocket={folder}/s.sock"]
    # One bucket uses several volumes at the same time: small ones, created as they are filled.
    argv += ["-master.volumeSizeLimitMB=64", "-volume.max=200"]
    return argv
