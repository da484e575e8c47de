"""What a remote model costs: the same models asked directly, and through another Shoal in front of their server.

    python bench/remote.py [--rounds 5] [--seconds 1.5]

Both servers are `shoal serve` with the front for this machine; the load and the tables are those of `infer.py`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infer_models import save

HERE = Path(__file__).resolve().parent


@contextmanager
def serving(models: Path) -> Iterator[dict[str, Any]]:
    """A `shoal serve` until the block ends: its address and process id."""
    command = [sys.executable, "-m", "shoal.cli.main", "serve", str(models), "--port", "0", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    text = ""
    while not text.endswith("\n}\n"):
        line = process.stdout.readline()
        if not line:
            sys.exit(f"shoal serve ended with {process.wait()}")
        text += line
    try:
        yield json.loads(text)
    finally:
        process.terminate()
        process.wait(30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", default="5")
    parser.add_argument("--seconds", default="1.5")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        far, near = Path(folder, "far"), Path(folder, "near")
        far.mkdir()
        names = list(save(far))
        with serving(far) as direct:
            for name in names:
                (near / name).mkdir(parents=True)
                url = f'key: "url" value {{ string_value: "grpc://{direct["address"]}" }}'
                (near / name / "config.pbtxt").write_text(f'backend: "remote" parameters {{ {url} }}')
            with serving(near) as through:
                command = [sys.executable, str(HERE / "infer.py"), "--fronts", "", "--models", str(far)]
                for name, server in (("direct", direct), ("through", through)):
                    command += ["--endpoint", f"{name}={server['address']}"]
                    command += ["--endpoint-pid", f"{name}={server['pid']}"]
                subprocess.run([*command, "--rounds", given.rounds, "--seconds", given.seconds], check=True)


if __name__ == "__main__":
    main()
