#!/bin/sh
# Builds a virtual environment from a lock file: [UNHASHED=1] tools/venv.sh FOLDER LOCKFILE [EDITABLE_PROJECT]
# UNHASHED=1: the file has no hashes, and says why.
# Uses uv where it is at hand (seconds; UV=/path/to/uv: that one; UV=none: not at all), else Python's own venv and pip.
set -eu
folder=$1 lock=$2 project=${3:-}
python=${PYTHON:-python3}
hashes=--require-hashes
[ -z "${UNHASHED:-}" ] || hashes=

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Shoal needs Python 3.11 or newer; $python is $("$python" -V 2>&1). Set PYTHON=/path/to/a/newer/python3." >&2
    exit 1
}
# Two `make` of one checkout at the same time: the second waits, then finds the work done.
mkdir -p "$folder"
exec 9>"$folder.lock"
flock 9
if [ -e "$folder/.installed" ] && [ "$folder/.installed" -nt "$lock" ] && [ "$folder/.installed" -nt pyproject.toml ]; then
    exit 0
fi

echo "Building $folder from $lock ..."
uv=${UV:-$(command -v uv || :)}
if [ -n "$uv" ] && [ "$uv" != none ]; then
    # Where pip is told to look, uv looks too. (Its own variables stand before.)
    export UV_FIND_LINKS="${UV_FIND_LINKS:-$(echo "${PIP_FIND_LINKS:-}" | tr -s ' ' ,)}"
    export UV_EXTRA_INDEX_URL="${UV_EXTRA_INDEX_URL:-${PIP_EXTRA_INDEX_URL:-}}"
    [ -z "${PIP_INDEX_URL:-}" ] || export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$PIP_INDEX_URL}"
    "$uv" venv --quiet --allow-existing --python "$python" "$folder"
    # uv links the files from its cache, which is keyed by the hashes of the lock: an environment that was built before is
    # there in seconds. `--compile-bytecode` would add 40 s of processor time for the largest, for modules that nothing
    # imports; Python compiles a module when it first imports it.
    if [ -n "$hashes" ]; then
        "$uv" pip sync --quiet $hashes --python "$folder/bin/python" "$lock"
    else
        "$uv" pip install --quiet --python "$folder/bin/python" -r "$lock"
    fi
    [ -z "$project" ] || "$uv" pip install --quiet --no-deps --no-build-isolation --python "$folder/bin/python" -e "$project"
else
    "$python" -m venv "$folder" || {
        echo "$python has no working venv module. On Debian and Ubuntu: apt install python3-venv (or install uv)." >&2
        exit 1
    }
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check $hashes -r "$lock"
    [ -z "$project" ] || "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e "$project"
fi
[ -z "$project" ] || "$folder/bin/python" -m compileall -q shoal mesh services kernels || :
touch "$folder/.installed"
