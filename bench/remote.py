"""Cost of a remote model: the same models called directly, and through another Shoal in front of their server.

    python bench/remote.py [--rounds 5] [--seconds 1.5]

Both servers are `shoal serve`; the load and the tables are those of `infer.py`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from infer_models import save

from examples.serving import serving

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", default="5")
    parser.add_argument("--seconds", default="1.5")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        far, near = Path(folder, "far"), Path(folder, "near")
        far.mkdir()
        names = list(save(far))
        with serving(far) as (direct, pid):
            for name in names:
                (near / name).mkdir(parents=True)
                url = f'key: "url" value {{ string_value: "grpc://{direct}" }}'
                (near / name / "config.pbtxt").write_text(f'backend: "remote" parameters {{ {url} }}')
            with serving(near) as through:
                command = [sys.executable, str(HERE / "infer.py"), "--endpoints-only", "--models", str(far)]
                for name, (address, process) in (("direct", (direct, pid)), ("through", through)):
                    command += ["--endpoint", f"{name}={address}"]
                    command += ["--endpoint-pid", f"{name}={process}"]
                subprocess.run([*command, "--rounds", args.rounds, "--seconds", args.seconds], check=True)


if __name__ == "__main__":
    main()
