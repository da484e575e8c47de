"""Becomes Envoy: finds out whether that is possible here, and replaces this process by an Envoy that hosts the service.

The process id stays, so whoever started the service goes on watching the same process.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from mesh import sockets
from mesh.embedded.guard import STOP_SIGNALS
from mesh.limits import MESSAGE_BYTES
from mesh.resets import RUNTIME
from shoal.errors import FailedPrecondition

ADMIN_VARIABLE = "SHOAL_EMBEDDED_ADMIN"
LISTEN_VARIABLE = "SHOAL_EMBEDDED_LISTEN"
"""Where Envoy really listens: with port 0, the port that was free."""
PYTHON_VARIABLE = "SHOAL_PYTHON"
"""Which Python this is: inside Envoy, `sys.executable` would be anything."""
PATH_VARIABLE = "SHOAL_EMBEDDED_PYTHONPATH"
"""What PYTHONPATH was: what the service starts should not find our packages before its own."""
FOLDER_VARIABLE = "SHOAL_EMBEDDED_FOLDER"
"""Where the process was before: Envoy starts in a folder of ours, because it puts its own on Python's path."""

_MODULE = "_pyvoy.abi3.so"
_TYPES = "type.googleapis.com/envoy.extensions"
_ROOT = Path(__file__).resolve().parent.parent.parent

ADMIN_FOLDER = "shoal-admin-"
"""How the names of folders begin that are made for one admin socket."""

_STREAM_WINDOW = 1 << 20
_CONNECTION_WINDOW = 16 << 20
_STREAMS = 4096
# In flight on one connection: beyond what a queue holds, more would only be refused.


def obstacle() -> str | None:
    """Why this process cannot run inside Envoy; None when it can."""
    if sys.platform != "linux":
        return f"it needs Linux, this is {sys.platform}"
    if _module() is None:
        return "the package pyvoy is not installed (pip install 'shoal[envoy]')"
    if libpython() is None:
        return "this Python has no shared library (libpython): Envoy cannot load it"
    try:
        envoy_binary()
    except FailedPrecondition as err:
        return err.message
    return None


def _module() -> Path | None:
    spec = importlib.util.find_spec("pyvoy")
    folders = (spec.submodule_search_locations or ()) if spec else ()
    return next((Path(folder) / _MODULE for folder in folders if (Path(folder) / _MODULE).exists()), None)


def libpython() -> Path | None:
    """The shared library of the running Python."""
    variables = sysconfig.get_config_vars()
    names = [variables.get("INSTSONAME"), variables.get("LDLIBRARY")]
    folders = [variables.get("LIBDIR"), variables.get("LIBPL"), os.path.join(sys.base_prefix, "lib")]
    for folder in folders:
        for name in names:
            if folder and name and ".so" in name and (file := Path(folder, name)).exists():
                return file
    return None


def envoy_binary() -> Path:
    """Raises FailedPrecondition when there is none."""
    from mesh.node.parts import find_binary

    return find_binary("envoy")


def become_envoy(
    app: str, listen: str, environ: Mapping[str, str] = os.environ, *, share_port: bool = False
) -> NoReturn:
    """Replaces this process by Envoy, which listens at `listen` and hosts `app` (`module:attribute`).

    Args:
        share_port: other processes may listen at the same port.

    Raises:
        FailedPrecondition: there is an `obstacle`.
        OSError: the address cannot be had; the message names it.
    """
    if (reason := obstacle()) is not None:
        raise FailedPrecondition(f"the front inside Envoy cannot run here: {reason}")
    listen = _claimed(listen, share_port)
    admin = admin_path(listen)
    binary = str(envoy_binary())
    argv = [binary, "--config-yaml", json.dumps(bootstrap(app, listen, admin, share_port=share_port))]
    argv += ["--concurrency", "1", "--disable-hot-restart", "--log-level", "error"]
    # At a goodbye, connections are closed at their next answer, and not one by one over ten minutes.
    argv += ["--drain-strategy", "immediate", "--drain-time-s", "5"]
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    env = environment(environ, admin, listen, Path.cwd())
    os.chdir(_ROOT)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(binary, argv, env)


def _claimed(listen: str, share_port: bool) -> str:
    """The address with its host and port in numbers, once it is sure that Envoy can have it. Raises OSError.

    A TCP port is held by a socket that does not listen, until this process, then Envoy, ends.
    """
    if listen.startswith("unix:"):
        sockets.make_way(listen)
        return listen
    host, _, port = listen.rpartition(":")
    try:
        family, kind, _, _, place = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
        claim = socket.socket(family, kind)
        claim.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if share_port:
            claim.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        claim.bind(place)
    except OSError as err:
        raise OSError(f"cannot listen on {listen}: {err.strerror or err}") from err
    found = claim.getsockname()
    os.set_inheritable(claim.detach(), True)
    return f"[{found[0]}]:{found[1]}" if family == socket.AF_INET6 else f"{found[0]}:{found[1]}"


def admin_path(listen: str) -> str:
    """Where the admin socket of an instance that listens at `listen` is: beside it, or in a folder of its own."""
    if listen.startswith("unix:"):
        return listen.removeprefix("unix:") + ".admin"
    _remove_leftovers(Path(tempfile.gettempdir()))
    return os.path.join(tempfile.mkdtemp(prefix=f"{ADMIN_FOLDER}{os.getpid()}-"), "admin.sock")


def _remove_leftovers(folder: Path) -> None:
    """Removes what killed instances of this user left: their process ids are in the names."""
    for left in folder.glob(f"{ADMIN_FOLDER}*"):
        pid = left.name.removeprefix(ADMIN_FOLDER).partition("-")[0]
        with contextlib.suppress(OSError):
            if pid.isdecimal() and not Path("/proc", pid).exists() and left.stat().st_uid == os.getuid():
                shutil.rmtree(left, ignore_errors=True)


def environment(environ: Mapping[str, str], admin: str, listen: str, folder: Path) -> dict[str, str]:
    """What the Envoy process gets: the given, and what Python needs to find itself inside it."""
    paths = [os.path.abspath(path) for path in sys.path if path]
    preload = [path for path in (str(libpython()), environ.get("LD_PRELOAD", "")) if path]
    return {
        **environ,
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
        "LD_PRELOAD": ":".join(preload),
        PYTHON_VARIABLE: sys.executable,
        PATH_VARIABLE: environ.get("PYTHONPATH", ""),
        ADMIN_VARIABLE: admin,
        LISTEN_VARIABLE: listen,
        FOLDER_VARIABLE: str(folder),
    }


def bootstrap(app: str, listen: str, admin: str, *, share_port: bool = False) -> dict[str, Any]:
    """Envoy's configuration: one listener, one filter, and the admin endpoint on a unix socket."""
    return {
        "node": {"id": "embedded", "cluster": "shoal"},
        "admin": {"address": {"pipe": {"path": admin, "mode": 0o600}}},
        "static_resources": {"listeners": [_listener(app, listen, share_port)]},
        "layered_runtime": RUNTIME,
    }


def _listener(app: str, listen: str, share_port: bool) -> dict[str, Any]:
    manager = {
        "@type": f"{_TYPES}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "embedded",
        "codec_type": "HTTP2",
        "http2_protocol_options": {
            "max_concurrent_streams": _STREAMS,
            "initial_stream_window_size": _STREAM_WINDOW,
            "initial_connection_window_size": _CONNECTION_WINDOW,
            "max_outbound_frames": 100_000,
            # The default ends the whole connection at the second empty frame in a row. Some clients send such.
            "max_consecutive_inbound_frames_with_empty_payload": 64,
        },
        # Calls have deadlines of their own, and a stream may be silent for hours.
        "stream_idle_timeout": "0s",
        "drain_timeout": "0.5s",
        "generate_request_id": False,
        "server_header_transformation": "PASS_THROUGH",
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"]}]},
        "http_filters": [_filter(app)],
    }
    return {
        "name": "front",
        "address": _address(listen),
        # Envoy's default would share a port with whoever else shares it.
        "enable_reuse_port": share_port,
        # A request is held in Envoy until Python takes it: the largest one has to have room.
        "per_connection_buffer_limit_bytes": MESSAGE_BYTES + (1 << 20),
        "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}]}],
    }


def _filter(app: str) -> dict[str, Any]:
    config = json.dumps({"app": app, "interface": "asgi", "root_path": "", "lifespan": True, "loop": "uvloop"})
    return {
        "name": "python",
        "typed_config": {
            "@type": f"{_TYPES}.filters.http.dynamic_modules.v3.DynamicModuleFilter",
            "dynamic_module_config": {"module": {"local": {"filename": str(_module())}}},
            "filter_name": "pyvoy",
            "terminal_filter": True,
            "filter_config": {"@type": "type.googleapis.com/google.protobuf.StringValue", "value": config},
        },
    }


def _address(listen: str) -> dict[str, Any]:
    if listen.startswith("unix:"):
        return {"pipe": {"path": listen.removeprefix("unix:"), "mode": 0o600}}
    host, _, port = listen.rpartition(":")
    return {"socket_address": {"address": host.strip("[]"), "port_value": int(port)}}
