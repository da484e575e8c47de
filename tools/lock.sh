#!/bin/sh
# Renews the lock files from pyproject.toml and locks/*.in. Needs uv. Hashes, but no addresses of registries.
set -eu
cd "$(dirname "$0")/.."
common="--quiet --upgrade --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header"
uv pip compile $common --extra node --extra demo --extra dev pyproject.toml locks/build.in -o locks/shoal.txt
uv pip compile $common locks/tritonclient.in -o locks/tritonclient.txt
uv pip compile $common locks/triton.in -o locks/triton.txt
uv pip compile $common locks/cuda12.in -o locks/cuda12.txt
uv pip compile $common locks/cuda13.in -o locks/cuda13.txt
uv pip compile $common locks/uv.in -o locks/uv.txt
# locks/originals.txt has no hashes, and says why: it is what `pip freeze` says, without torch, of an environment that was
# made by hand with `pip install -r locks/originals.in`.
