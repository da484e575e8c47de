"""A real object store for tests: SeaweedFS, which speaks S3, in one process of its own.

weed (session)  one server for the whole run; a test takes a prefix of its own there (`weed.prefix()`), which costs
                nothing, or a bucket of its own (`make_bucket`), which costs some volumes
WeedProcess     one of the test's own, to be killed, frozen and brought back
"""

from __future__ import annotations

import json
import socket
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

from obstore.store import S3Store

from tests.breakable import PATIENCE_S, Process

BUCKET = "shoal"
"""The bucket that is there from the start."""
KEY, SECRET = "shoal-key", "shoal-secret"
_REGION = "us-east-1"
_NAMES = ("master", "volume", "filer", "s3", "admin")


class WeedProcess(Process):
    """A SeaweedFS with one identity that may do everything. Its data lies in `folder` and outlives a kill."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        free = _free_ports(2 * len(_NAMES))
        ports, self._grpc_ports = (dict(zip(_NAMES, some, strict=True)) for some in (free[::2], free[1::2]))
        self.endpoint = f"http://127.0.0.1:{ports['s3']}"
        command = _command(folder, ports, self._grpc_ports)
        super().__init__(command, folder / "weed.log", {"TMPDIR": str(folder)})

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        for name, port in self._grpc_ports.items():  # A killed one leaves them, wherever TMPDIR is.
            Path(f"/tmp/seaweedfs-{name}-grpc-{port}.sock").unlink(missing_ok=True)

    @property
    def access(self) -> dict[str, str]:
        """What a process needs to find and use it: the variables that every tool of S3 knows."""
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
        """The URL of a place that no other test uses."""
        return f"s3://{bucket}/{uuid.uuid4().hex[:16]}"

    def store(self, url: str, **changed: Any) -> S3Store:
        """A store at `url` (`s3://bucket/prefix`) as obstore has it. `changed`: other credentials, another endpoint."""
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        given: dict[str, Any] = {"endpoint": self.endpoint, "access_key_id": KEY, "secret_access_key": SECRET}
        return S3Store(
            bucket,
            prefix=prefix or None,
            region=_REGION,
            client_options={"allow_http": True},
            retry_config={"retry_timeout": timedelta(seconds=2)},
            virtual_hosted_style_request=False,
            **{**given, **changed},
        )

    def make_bucket(self, name: str) -> None:
        with closing(self.client()) as client:
            client.create_bucket(Bucket=name)

    def drop_bucket(self, name: str) -> None:
        """Deletes a bucket with all that is in it."""
        with closing(self.client()) as client:
            client.delete_bucket(Bucket=name)

    def client(self) -> Any:
        """botocore's client, for what obstore cannot do: buckets. The caller closes it."""
        # Imported here: it takes half a second, and most tests need none.
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
        """Its ports are open long before a write works, so a write is what is tried."""
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
    # Nothing that listens elsewhere, nothing that calls home, nothing left in the temporary folder.
    argv += ["-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"]
    argv += ["-master.electionTimeout=1s"]  # It is alone: nobody else would vote.
    argv += [f"-filer.localSocket={folder}/f.sock", f"-s3.localSocket={folder}/s.sock"]
    # One bucket takes several volumes at once: small ones, made as they are filled.
    argv += ["-master.volumeSizeLimitMB=64", "-volume.max=200"]
    return argv


def _free_ports(count: int) -> Sequence[int]:
    """So many different free ports, none handed out twice."""
    socks = [socket.socket() for _ in range(count)]
    try:
        for sock in socks:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in socks]
    finally:
        for sock in socks:
            sock.close()
