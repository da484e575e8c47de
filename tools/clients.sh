#!/bin/sh
# Installs what the tests of foreign clients need beside Python: gRPC for C++ (Debian's packages), and grpc-js with its
# like for Node. Takes under a second when everything is there, and about 15 s when nothing is.
set -eu
cd "$(dirname "$0")/.."

missing=""
need() { # need TEST PACKAGE...: TEST is a command line that succeeds when the packages are there
    eval "$1" >/dev/null 2>&1 || { shift; missing="$missing $*"; }
}
need 'command -v g++' g++
need 'command -v pkg-config && pkg-config --exists grpc++ protobuf' pkg-config libgrpc++-dev libprotobuf-dev
need 'command -v protoc && command -v grpc_cpp_plugin' protobuf-compiler protobuf-compiler-grpc
need 'command -v node' nodejs
need 'command -v npm' npm
if [ -n "$missing" ]; then
    [ "$(id -u)" -eq 0 ] || {
        echo "The tests of foreign clients need: apt install$missing" >&2
        exit 1
    }
    apt-get update -qq
    # shellcheck disable=SC2086 # a list of words
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $missing >/dev/null
fi

cd tests/clients/node
if [ ! -e node_modules/.package-lock.json ] || [ package-lock.json -nt node_modules/.package-lock.json ]; then
    npm ci --silent --no-audit --no-fund
fi
